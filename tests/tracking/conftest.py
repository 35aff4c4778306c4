"""Runs as clipkit records them, written with known numbers: MLflow, run folders, result files."""

import base64
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CONFIGURATION = {
    "seed_everything": 0,
    "experiment": "drawn",
    "run_name": "run",
    "model": {
        "embed_dim": 64,
        "loss": {"class_path": "clipkit.losses.InfoNCELoss", "init_args": {"label_smoothing": 0.1}},
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 1e-3, "betas": [0.9, 0.98]},
        },
    },
    "data": {
        "class_path": "clipkit.data.HuggingFacePairs",
        "init_args": {"dataset": "/data/drawn", "batch_size": 256, "seed": None},
    },
    "trainer": {
        "max_epochs": 4,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"monitor": "retrieval/own/text_to_image_r1", "mode": "max"},
            },
            {
                "class_path": "clipkit.callbacks.ZeroShotRetrieval",
                "init_args": {"datasets": {"own": {"path": None, "split": "validation"}}},
            },
        ],
    },
}


def changed(**differences):
    """The configuration with dotted keys (dots written as __) replaced."""
    configuration = json.loads(json.dumps(CONFIGURATION))
    for key, value in differences.items():
        *path, last = key.split("__")
        place = configuration
        for part in path:
            place = place[part]
            place = place.get("init_args", place) if part in ("optimizer", "data") else place
        place[last] = value
    return configuration


def wilson(mean, n):
    centre = (mean + 1.92 / n) / (1 + 3.84 / n)
    half = 1.96 * math.sqrt(mean * (1 - mean) / n + 0.96 / n**2) / (1 + 3.84 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


class Recorder:
    """Writes runs whose outcomes are drawn: the same rows are hard for every run."""

    rows = 400
    captions = 3

    def __init__(self, folder, client):
        self.folder, self.client = folder, client
        self.began = 1_000_000  # each run an hour after the last
        random = np.random.default_rng(0)
        self.labels = random.integers(0, 10, self.rows)
        self.difficulty = random.random(self.rows)
        self.caption_difficulty = np.repeat(random.random(self.rows), self.captions)

    # --- Outcomes

    def zeroshot(self, skill, seed):
        """top1 outcomes, labels and predictions of a model of this skill."""
        random = np.random.default_rng(seed)
        right = self.difficulty + random.normal(0, 0.1, self.rows) < skill
        wrong = (self.labels + random.choice([1, 1, 1, 5, 7], self.rows)) % 10
        return right.astype(float), np.where(right, self.labels, wrong)

    def retrieval(self, skill, seed):
        random = np.random.default_rng(seed + 100)
        noise = random.normal(0, 0.1, len(self.caption_difficulty))
        return (self.caption_difficulty + noise < skill).astype(float)

    def write_outcomes(self, path, kind, name, skill, seed, *, digest="d1g35t00aa", step=40,
                       settings="5e77"):  # fmt: skip
        if kind == "zeroshot":
            outcome, predicted = self.zeroshot(skill, seed)
            row = group = np.arange(self.rows)
            label = self.labels
            metric = "top1"
        else:
            outcome = self.retrieval(skill, seed)
            row = np.arange(len(outcome))
            group = row // self.captions
            label = predicted = None
            metric = "text_to_image_r1"
        empty = pa.nulls(len(row), pa.int64())
        table = pa.table(
            {
                "metric": [metric] * len(row),
                "row": row.astype(np.int64),
                "group": group.astype(np.int64),
                "outcome": outcome,
                "label": empty if label is None else label.astype(np.int64),
                "predicted": empty if predicted is None else predicted.astype(np.int64),
            }
        )
        about = {
            "schema": 1,
            "data": digest,
            "settings": settings,
            "task": kind,
            "set": name,
            "step": step,
        }
        about["class_names"] = NAMES if kind == "zeroshot" else None
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"clipkit": json.dumps(about)}), path)
        return outcome.mean()

    def write_examples(self, path):
        from PIL import Image

        from clipkit.data.drawing import captions, draw, sample

        examples = []
        for index in range(8):
            drawing = sample(0, "test", index)
            buffer = io.BytesIO()
            Image.fromarray(draw(drawing, 64)).save(buffer, "JPEG")
            text = base64.b64encode(buffer.getvalue()).decode()
            right = index % 2 == 0
            truth = captions(drawing)[-1]
            examples.append(
                {
                    "row": index,
                    "right": right,
                    "image": f"data:image/jpeg;base64,{text}",
                    "query": truth,
                    "truth": truth,
                    "found": truth if right else "a <b>red</b> circle & more",
                }
            )
        path.write_text(json.dumps(examples))

    # --- Runs

    def points(self, zeroshot, retrieval, epochs=5):
        """The journal's lines: before the first step, then each epoch of ten steps."""
        for epoch in range(epochs):
            step = 10 * epoch
            if epoch:
                loss = 3.0 * math.exp(-0.4 * epoch) + 1.2 - zeroshot
                yield (
                    step - 1,
                    {
                        "train/loss": loss,
                        "train/samples_seen": 256.0 * step,
                        "train/scale": 14.3 + epoch,
                    },
                )
            share = 1 - math.exp(-epoch) if epoch < epochs - 1 else 1.0
            # Lightning numbers from 0 what it logs; evaluations say how many steps were made.
            if epoch:
                yield step - 1, {"val/loss": 3.2 * math.exp(-0.3 * epoch) + 1.5 - zeroshot}
            values = {}
            for metric, final, chance, n in (
                ("zeroshot/digits/top1", zeroshot, 0.1, self.rows),
                ("zeroshot/digits/top5", 0.5 + zeroshot / 2, 0.5, self.rows),
                ("retrieval/own/text_to_image_r1", retrieval, 0.01, self.rows),
                ("retrieval/own/text_to_image_mean_rank", 40 * (1.1 - retrieval), 200.0, None),
            ):
                value = chance + (final - chance) * share
                values[metric] = value
                low, high = wilson(value, n) if n else (value * 0.9, value * 1.1)
                values[f"{metric}_low"], values[f"{metric}_high"] = low, high
            yield step, values

    def run(self, name, skill, *, seed=0, digest="d1g35t00aa", outcomes=True, mlflow=True,
            experiment="drawn", status="FINISHED", examples=False, chosen=40, settings="5e77",
            **differences):  # fmt: skip
        """Write a run folder, and the same run to MLflow."""
        configuration = changed(seed_everything=seed, run_name=name, **differences)
        configuration["experiment"] = experiment
        folder = self.folder / "runs" / experiment / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
        said = {"id": f"id-of-{folder}", "status": "finished", "steps": 40}
        said["chosen"] = None if chosen is None else {"step": chosen}
        (folder / "status.json").write_text(json.dumps(said))
        zeroshot, _ = self.zeroshot(skill, seed)
        retrieval = self.retrieval(skill, seed)
        if outcomes:
            for which in ("last", "chosen"):
                at = folder / "outcomes"
                self.write_outcomes(
                    at / f"zeroshot-digits-{which}.parquet", "zeroshot", "digits", skill, seed,
                    digest=digest, settings=settings,
                )  # fmt: skip
                self.write_outcomes(
                    at / f"retrieval-own-{which}.parquet", "retrieval", "own", skill, seed,
                    digest=digest, settings=settings,
                )  # fmt: skip
            if examples:
                for which in ("last", "chosen"):
                    self.write_examples(folder / f"outcomes/retrieval-own-{which}-examples.json")
        lines = [*self.points(float(zeroshot.mean()), float(retrieval.mean()))]
        with (folder / "metrics.jsonl").open("w") as file:
            for number, (step, values) in enumerate(lines):
                line = {"time": 1000.0 + 90 * number, "step": step, "epoch": step // 10, **values}
                file.write(json.dumps(line) + "\n")
        if mlflow:
            self.to_mlflow(experiment, name, configuration, lines, folder, status, chosen)
        return folder

    def to_mlflow(self, experiment, name, configuration, lines, folder, status, chosen):
        from mlflow.entities import Metric, Param

        from clipkit.tracking.config import flatten

        found = self.client.get_experiment_by_name(experiment)
        experiment_id = (
            found.experiment_id if found else self.client.create_experiment(
                experiment, artifact_location=(self.folder / "artifacts").as_uri()
            )
        )  # fmt: skip
        self.began += 3_600_000
        run = self.client.create_run(experiment_id, start_time=self.began, run_name=name)
        run_id = run.info.run_id
        params = [Param(key, str(value)[:250]) for key, value in flatten(configuration).items()]
        metrics = [
            Metric(key, value, self.began + 90_000 * number, step)
            for number, (step, values) in enumerate(lines)
            for key, value in values.items()
        ]
        self.client.log_batch(run_id, metrics=metrics, params=params)
        for key, value in {
            "clipkit.run_folder": str(folder),
            "clipkit.id": f"id-of-{folder}",
            "clipkit.chosen_step": str(chosen or ""),
            "clipkit.version.torch": "2.15.0",
            "clipkit.world_size": "1",
            "mlflow.source.git.commit": "c0ffee",
        }.items():
            self.client.set_tag(run_id, key, value)
        self.client.set_terminated(run_id, status)

    def result(self, file, skill, *, seed=0, digest="d1g35t00aa", spec="open_clip:ViT-B-32/openai",
               **changes):  # fmt: skip
        """Write a result file and its outcomes."""
        path = self.folder / file
        tasks = []
        for kind, name, measure in (
            ("zeroshot", "digits", "top1"),
            ("retrieval", "own", "text_to_image_r1"),
        ):
            outcomes = f"{path.stem}.outcomes/{kind}-{name}.parquet"
            value = self.write_outcomes(
                self.folder / outcomes, kind, name, skill, seed, digest=digest, step=None
            )
            low, high = wilson(value, self.rows)
            tasks.append(
                {
                    "task": kind, "set": name, "main_metric": measure, "verified": True,
                    "data": {
                        "id": name, "revision": None, "split": "test", "n": self.rows,
                        "digest": digest, "classes": 10, "class_names": None, "templates": None,
                    },
                    "metrics": {
                        measure: {
                            "value": value, "low": low, "high": high, "n": self.rows,
                            "chance": 0.1, "normalised": (value - 0.1) / 0.9,
                        }
                    },
                    "seconds": 1.0, "images_per_second": 400.0, "outcomes": outcomes,
                }
            )  # fmt: skip
        result = {
            "schema": 1, "kind": "clipkit-benchmark", "created": "2026-01-01T00:00:00+00:00",
            "model": {
                "spec": spec, "name": spec.partition(":")[2], "weights": f"{seed:064x}",
                "tokenizer": None, "preprocess": None, "embed_dim": 512, "dtype": "float32",
                "scale": 100.0,
            },
            "suite": "builtin", "settings": {"batch_size": 64, "seed": 0, "limit": None},
            "environment": {
                "clipkit": "0.1.0", "torch": "2.15.0", "python": "3.11", "device": "a CPU",
                "commit": None,
            },
            "tasks": tasks, "failed": [],
        } | changes  # fmt: skip
        path.write_text(json.dumps(result))
        return path


@pytest.fixture
def recorder(workdir):
    """Writes runs into the working folder and its MLflow store."""
    import os

    from mlflow.tracking import MlflowClient

    return Recorder(workdir, MlflowClient(os.environ["MLFLOW_TRACKING_URI"]))
