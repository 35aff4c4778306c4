"""The page about clusters holds what its script computes; the model says what it must."""

import pytest

from benchmarks.scaling import CARDS, MODELS, PAGE, filled, fit, step_of, tables

B32, H200 = MODELS["ViT-B/32"], CARDS["H200"]


def test_the_page_holds_the_scripts_tables():
    page = PAGE.read_text(encoding="utf-8")
    made = tables()
    assert filled(page, made) == page, "python -m benchmarks.scaling --write"
    for name, table in made.items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page


def test_operations_are_those_of_open_clips_profile():
    # open_clip's model_profile.csv: image 8.82, text 5.96; 35.13; 162.0 and 13.30 GFLOPs forward.
    for name, forward in (("ViT-B/32", 14.78), ("ViT-B/16", 41.09), ("ViT-L/14", 175.3)):
        assert MODELS[name].operations(77) / 3 == pytest.approx(forward * 1e9, rel=2e-3)


def test_one_card_talks_to_nobody_and_more_cards_take_less_time():
    alone = step_of(B32, H200, 1, 8192)
    assert alone.gathering == alone.gradients == 0
    eight = step_of(B32, H200, 8, 8192)
    assert alone.seconds / 8 < eight.seconds < alone.seconds


def test_the_share_of_the_loss_grows_with_the_batch_over_all_cards():
    shares = [step_of(B32, H200, 64, batch).share("loss") for batch in (16_384, 65_536, 262_144)]
    assert shares == sorted(shares)
    assert shares[-1] > 2 * shares[0]


def test_measurements_of_the_model_itself_are_found_again(tmp_path):
    """Files that the model would have written: what is foretold is then right."""
    import json

    speed = 1e11
    rates = {
        "clipkit, padded": {"median": speed / B32.operations(77)},
        "clipkit": {"median": speed / B32.operations()},
    }
    step = {"settings": {"model": "ViT-B-32", "steps": 1}, "pairs_per_second": rates}
    sizes = [
        {"pairs": pairs, "seconds": {"clipkit": {"median": 8 * 512 * pairs**2 / 2e10}}}
        for pairs in (1024, 4096)
    ]
    loss = {"settings": {"width": 512}, "losses": {"info_nce": sizes}}
    # Two ranks of 16 pairs lose a second to 1e9 bytes.
    of_ranks = {
        f"{name}, {ranks}": {"median": value}
        for name, alone in (("clipkit", 2.0), ("clipkit, padded", 4.0))
        for ranks, value in (("1 rank", 16 / alone), ("2 ranks", 32 / (alone + 1)))
    }
    ranks = {"settings": {"ranks": 2, "batch": 16}, "parameters": 0.25e9}
    for name, result in (
        ("step", step), ("loss", loss), ("ranks", ranks | {"pairs_per_second": of_ranks}),
    ):  # fmt: skip
        (tmp_path / f"2026-01-01-{name}.json").write_text(json.dumps(result))
    found = fit(tmp_path)
    assert found.towers == pytest.approx(speed)
    assert found.products == pytest.approx(2e10)
    assert found.network == pytest.approx(1e9)
    assert len(found.checks) == 6
    for check in found.checks:
        assert check.model is None or check.model == pytest.approx(check.measured)
