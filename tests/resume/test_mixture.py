"""A mixture that is gone on with in the middle of an epoch is the one that was never stopped."""

import pytest

from tests.resume.conftest import RECIPE, Run
from tests.resume.test_kill import RANKS, assert_goes_on_after_a_kill
from tests.resume.test_positions import EVERY_STEP, crash, fit  # noqa: F401

MIXTURE = """\
data:
  class_path: MixedPairs
  init_args:
    batch_size: 4
    num_workers: 0
    epoch_pairs: 20
    sources:
      one: {dataset: DIR, caption_column: {caption: 0.6, label: 0.4}, weight: 2}
      two: {dataset: DIR, captions: first, negative_column: label, weight: 1}
"""


@pytest.fixture
def recipe(workdir, pictures):
    """In the place of the recipe of one source."""
    (workdir / "again.yaml").write_text(RECIPE)
    (workdir / "mixture.yaml").write_text(MIXTURE.replace("DIR", str(pictures)))
    return ["fit", "-c", "base", "-c", "again.yaml", "-c", "mixture.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--data.num_workers=2"], RANKS], ids=["workers", "ranks"])
def test_killed(start, workdir, words):
    assert_goes_on_after_a_kill(start, workdir, words, steps=7)


@pytest.mark.parametrize(("step", "workers"), [(7, 0), (8, 2)])
def test_stopped_within_an_epoch(fit, workdir, step, workers):  # noqa: F811
    assert fit("whole") == 0
    more = [*EVERY_STEP, f"--data.num_workers={workers}"]
    with pytest.raises(RuntimeError, match="crash"):
        fit("stopped", *more, *crash("on_train_batch_end", step))
    assert fit("stopped", *more, "--ckpt_path=last") == 0
    whole = Run(workdir / "runs" / "again" / "whole")
    counts = {name: value for name, at, value in whole.points if at == 14 and "_pairs" in name}
    assert counts == {"data/one_pairs": 39, "data/two_pairs": 21}
    Run(workdir / "runs" / "again" / "stopped").assert_same(whole)


def test_another_mixture_within_an_epoch_is_refused(fit, capsys):  # noqa: F811
    with pytest.raises(RuntimeError, match="crash"):
        fit("stopped", *EVERY_STEP, *crash("on_train_batch_end", 7))
    words = ["--data.sources.two.weight=3", "--ckpt_path=last"]
    assert fit("stopped", *EVERY_STEP, *words) == 2
    assert "was trained with pairs of one an epoch 13, not 8" in capsys.readouterr().err
