"""When the evaluations run, what they log, and what they keep of every sample."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import clipkit
from clipkit.evaluation.classification import build_classifier, classify
from clipkit.evaluation.prompts import expand
from clipkit.tracking.mlflow_runs import Store
from clipkit.tracking.sources import resolve

NAME = "retrieval/own/text_to_image_r1"
RETRIEVAL = [
    "--trainer.callbacks+=ZeroShotRetrieval",
    "--trainer.callbacks.datasets={own: {split: train}}",
]
CLASSES = [
    "--trainer.callbacks+=ZeroShotClassification",
    "--trainer.callbacks.datasets={own: {split: train, label_column: label}}",
]


def points(lines, name=NAME):
    return [(line["epoch"], line["step"]) for line in lines if name in line]


def test_once_before_the_first_step_and_after_every_epoch(fit):
    lines = fit(*RETRIEVAL, "--trainer.max_epochs=3")
    assert points(lines) == [(0, 0), (0, 2), (1, 4), (2, 6)]
    assert {f"{NAME}_low", f"{NAME}_high"} <= set(lines[0])
    # The initial evaluation reaches no checkpoint callback: it is no metric of epoch one.
    assert "val/loss" not in lines[0]


def test_every_n_epochs_the_first_and_the_last(fit):
    lines = fit(*RETRIEVAL, "--trainer.callbacks.every_n_epochs=2", "--trainer.max_epochs=5")
    assert points(lines) == [(0, 0), (0, 2), (1, 4), (3, 8), (4, 10)]


def test_monitoring_works_also_when_an_epoch_skips_the_evaluation(fit):
    fit(
        *RETRIEVAL, "--trainer.callbacks.every_n_epochs=2", "--trainer.max_epochs=4",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.monitor={NAME}", "--trainer.callbacks.mode=max",
        "--trainer.callbacks.filename=best",
    )  # fmt: skip
    assert Path("runs/tiny/run/checkpoints/best.ckpt").is_file()
    chosen = pq.read_schema("runs/tiny/run/outcomes/retrieval-own-chosen.parquet")
    step = json.loads(chosen.metadata[b"clipkit"])["step"]
    assert step in (2, 4, 6, 8)
    said = json.loads(Path("runs/tiny/run/status.json").read_text())
    assert (said["status"], said["chosen"]["step"]) == ("finished", step)
    assert (said["chosen"]["monitor"], said["chosen"]["checkpoint"]) == (NAME, "best.ckpt")
    (run,) = resolve("runs/tiny/run", Store())
    (recorded,) = resolve("tiny", Store())
    assert run.chosen_step == recorded.chosen_step == step
    assert run.identity == recorded.identity
    assert run.chosen(NAME) == recorded.chosen(NAME)
    assert run.chosen(NAME).value == pytest.approx(said["chosen"]["score"], abs=1e-6)
    assert run.chosen("val/loss").step == step


def test_every_n_steps_and_samples(fit):
    words = [*RETRIEVAL, "--trainer.max_epochs=4"]
    steps = fit(*words, "--trainer.callbacks.every_n_steps=3", name="a")
    # The first validation too, for whoever monitors it, and the end.
    assert points(steps) == [(0, 0), (0, 2), (1, 3), (2, 6), (3, 8)]
    samples = fit(*words, "--trainer.callbacks.every_n_samples=24", name="b")
    assert points(samples) == points(steps)


@pytest.mark.parametrize("saving", [(), ("--trainer.callbacks.every_n_train_steps=2",)])
def test_the_chosen_weights_had_the_score_they_were_chosen_by(fit, command, capsys, saving):
    """Evaluated within epochs of two steps, saved at their ends or after every other step."""
    rank = "retrieval/own/text_to_image_mean_rank"
    for seed in (1, 2, 3):
        name = f"seed{seed}"
        fit(
            *RETRIEVAL, "--trainer.callbacks.every_n_steps=3", "--trainer.max_epochs=5",
            "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", *saving,
            f"--trainer.callbacks.monitor={rank}", "--trainer.callbacks.mode=min",
            "--trainer.callbacks.filename=best", "--model.optimizer.lr=0.02",
            f"--seed_everything={seed}", name=name,
        )  # fmt: skip
        said = json.loads(Path(f"runs/tiny/{name}/status.json").read_text())["chosen"]
        (run,) = resolve(f"runs/tiny/{name}", Store())
        assert run.chosen(rank).value == pytest.approx(said["score"])
        assert run.chosen(rank).step == said["step"]
        outcomes = pq.read_schema(f"runs/tiny/{name}/outcomes/retrieval-own-chosen.parquet")
        assert json.loads(outcomes.metadata[b"clipkit"])["step"] == said["step"]
        capsys.readouterr()
        checkpoint = f"runs/tiny/{name}/checkpoints/best.ckpt"
        assert command("validate", "--ckpt_path", checkpoint) == 0
        (line,) = (
            line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{rank} ")
        )
        assert float(line.split()[1]) == pytest.approx(said["score"])


def test_evaluating_does_not_change_what_is_trained(fit):
    """Dropout draws the same numbers, whatever is evaluated beside it."""
    words = ["--model.text_encoder.dropout=0.5", "--trainer.max_epochs=3"]
    alone = fit(*words, name="alone")
    beside = fit(*words, *RETRIEVAL, *CLASSES, "--trainer.callbacks.every_n_steps=1", name="beside")
    losses = [
        [line["train/loss"] for line in lines if "train/loss" in line] for lines in (alone, beside)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_a_run_whose_checkpoint_cannot_be_read_back_is_finished(fit, workdir):
    (workdir / "mine.py").write_text(
        "import datetime\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class When(Callback):\n"
        "    def state_dict(self):\n"
        "        return {'when': datetime.datetime(2020, 1, 1)}\n"
    )
    with pytest.warns(UserWarning, match="the step of this checkpoint is not known"):
        fit(
            "--trainer.callbacks+=mine.When",
            "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
            "--trainer.callbacks.monitor=val/loss",
        )
    said = json.loads(Path("runs/tiny/run/status.json").read_text())
    assert (said["status"], said["chosen"]["step"]) == ("finished", None)


def test_pairs_seen_count_what_is_accumulated(fit):
    words = ["--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=5"]
    lines = fit(*RETRIEVAL, *words, "--trainer.callbacks.every_n_samples=24")
    # One step of 16 pairs an epoch: 24 are passed at 32, 48 at 48, 72 at 80; and the first.
    assert [step for _, step in points(lines)] == [0, 1, 2, 3, 5]


def test_the_console_prints_what_was_just_measured(fit, capsys):
    fit(*RETRIEVAL, "--trainer.callbacks.every_n_epochs=3", "--trainer.max_epochs=5")
    said = re.split(r"^epoch \d", capsys.readouterr().out, flags=re.M)
    # Before the first step, after epochs 1, 3 and the last, which is the fifth.
    assert ["T→I R@1" in part for part in said] == [True, True, False, True, False, True]


def test_a_probe_does_not_learn_from_what_it_is_scored_on(workdir, pictures, command, capsys):
    assert command(
        "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures,
        "--trainer.callbacks+=LinearProbe",
        "--trainer.callbacks.datasets={own: {split: train}}",
    ) == 2  # fmt: skip
    assert "train_split: 'train' is the split that is scored" in capsys.readouterr().err


def test_the_weights_that_a_run_ends_with_are_evaluated(fit):
    words = ["--trainer.max_epochs=-1", "--trainer.max_steps=5"]
    lines = fit(*RETRIEVAL, *words, "--trainer.callbacks.every_n_epochs=9")
    assert points(lines)[-1][1] == 5


def test_the_chosen_outcomes_of_every_set_are_kept(fit):
    fit(
        RETRIEVAL[0], "--trainer.callbacks.datasets={own: {split: train}, more: {split: train}}",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.monitor={NAME}", "--trainer.callbacks.mode=max",
    )  # fmt: skip
    kept = {file.name for file in Path("runs/tiny/run/outcomes").glob("*-chosen.parquet")}
    assert kept == {"retrieval-own-chosen.parquet", "retrieval-more-chosen.parquet"}


def test_a_share_of_the_time(fit):
    words = ["--trainer.callbacks.every_n_steps=1", "--trainer.max_epochs=4"]
    lines = fit(*RETRIEVAL, *words, "--trainer.callbacks.max_time_ratio=1e-6")
    assert points(lines) == [(0, 0), (0, 2), (3, 8)]


def test_probes(fit):
    data = "{digits: {path: digits, split: test, limit: 100}}"
    lines = fit(
        "--trainer.callbacks+=LinearProbe", f"--trainer.callbacks.datasets={data}",
        "--trainer.callbacks+=NearestNeighbours", f"--trainer.callbacks.datasets={data}",
        "--trainer.callbacks.k=3",
    )  # fmt: skip
    for name in ("probe/digits/top1", "knn/digits/top1"):
        assert points(lines, name) == [(0, 0), (0, 2)]


def test_a_set_that_breaks_does_not_end_the_training(fit, pictures, workdir):
    shutil.copytree(pictures, workdir / "broken")
    for picture in (workdir / "broken").glob("*.png"):
        picture.write_bytes(picture.read_bytes()[:100])
    data = "{broken: {path: broken, split: train}, own: {split: train}}"
    with pytest.warns(UserWarning, match="retrieval/broken: not evaluated .*is broken"):
        lines = fit(RETRIEVAL[0], f"--trainer.callbacks.datasets={data}")
    assert points(lines) == [(0, 0), (0, 2)]
    assert not any("retrieval/broken/text_to_image_r1" in line for line in lines)


def test_outcomes_are_kept_with_the_run_in_mlflow(fit):
    from mlflow.tracking import MlflowClient

    fit(*RETRIEVAL)
    mlflow = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("tiny").experiment_id])
    kept = [file.path for file in mlflow.list_artifacts(run.info.run_id, "outcomes")]
    assert kept == [f"outcomes/retrieval-own-last{n}" for n in ("-examples.json", ".parquet")]
    examples = json.loads(
        Path("runs/tiny/run/outcomes/retrieval-own-last-examples.json").read_text()
    )
    assert 0 < len(examples) <= 16
    assert all(one["image"].startswith("data:image/jpeg;base64,") for one in examples)


def test_an_evaluation_for_the_end_is_made_once_and_only_there(fit):
    lines = fit(
        "--trainer.callbacks+=ZeroShotRetrieval",
        "--trainer.callbacks.datasets={own: {split: train, when: end}}", "--trainer.max_epochs=2",
    )  # fmt: skip
    assert points(lines) == [(2, 4)]


def test_nothing_is_evaluated_in_the_sanity_check(fit):
    lines = fit(*RETRIEVAL, "--trainer.num_sanity_val_steps=1")
    assert points(lines) == [(0, 0), (0, 2)]


def test_values_are_those_of_the_functions_on_the_final_weights(fit):
    lines = fit(*CLASSES, "--trainer.max_epochs=2")
    logged = next(line for line in reversed(lines) if "zeroshot/own/top1" in line)
    model, data, _ = clipkit.build(
        "base", "tiny.yaml", overrides=[f"data.dataset={_dataset()}", "run_name=again"]
    )
    state = torch.load("runs/tiny/run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict(state)
    model.eval()
    data.trainer = None
    rows = data.evaluation_rows("train")
    labels = rows.labels("label")
    prompts = expand(labels.names, "photo")
    texts = model.embed_texts(prompts.unique)[prompts.prompt_index]
    classifier = build_classifier(texts, prompts.class_of_prompt, len(labels.names))
    images = model.embed_images([rows.image(i) for i in range(len(rows))])
    outcomes = classify(images, classifier, torch.from_numpy(labels.ids))
    assert logged["zeroshot/own/top1"] == pytest.approx(float(outcomes.top1.mean()), abs=1e-9)
    kept = pq.read_table("runs/tiny/run/outcomes/zeroshot-own-last.parquet")
    assert kept.column_names == ["metric", "row", "group", "outcome", "label", "predicted"]
    kept = kept.filter(pc.equal(kept["metric"], "top1"))
    assert kept["predicted"].to_pylist() == outcomes.predicted.tolist()
    assert kept["outcome"].to_pylist() == pytest.approx(outcomes.top1.tolist())


def _dataset():
    import yaml

    return yaml.safe_load(Path("runs/tiny/run/config.yaml").read_text())["data"]["init_args"][
        "dataset"
    ]


def test_outcomes_of_retrieval_average_to_its_metrics(fit):
    lines = fit(*RETRIEVAL)
    table = pq.read_table("runs/tiny/run/outcomes/retrieval-own-last.parquet").to_pandas()
    means = table.groupby("metric").outcome.mean()
    for metric in ("text_to_image_r1", "image_to_text_r10"):
        logged = [line for line in lines if f"retrieval/own/{metric}" in line]
        assert means[metric] == pytest.approx(logged[-1][f"retrieval/own/{metric}"], abs=1e-9)


def test_pictures_are_embedded_once_for_all_callbacks(fit, monkeypatch):
    from clipkit.suite import encoding

    calls = []
    embed = encoding._embed
    monkeypatch.setattr(encoding, "_embed", lambda *a: calls.append(1) or embed(*a))
    fit(*RETRIEVAL, *CLASSES, "--trainer.max_epochs=2")
    assert len(calls) == 3  # before the first step, and after each of two epochs


def test_the_text_side_is_rebuilt_with_the_current_weights(fit):
    """With the image tower locked and heads too, only texts can move the classifier."""
    lines = fit(*CLASSES, "--model.lock_image=0", "--model.image_lr=0", "--model.optimizer.lr=0.1",
                "--trainer.max_epochs=3", "--model.schedule.warmup_steps=0")  # fmt: skip
    values = [line["zeroshot/own/top1"] for line in lines if "zeroshot/own/top1" in line]
    fives = [line["zeroshot/own/top5"] for line in lines if "zeroshot/own/top5" in line]
    assert len(set(values + fives)) > 2
