"""clipkit compare: what it reads, what it claims, what it refuses."""

import csv
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.errors import UserError
from clipkit.evaluation.comparison import configuration_difference, paired_difference
from clipkit.tracking import outcomes
from clipkit.tracking.command import run
from clipkit.tracking.latex import escape
from clipkit.tracking.metric_names import higher_is_better, main_metrics, number, short
from clipkit.tracking.tables import Column, layout, short_params
from tests.tracking.conftest import CONFIGURATION, changed


@pytest.fixture
def compare(capsys):
    def call(*words):
        assert run([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def two_by_two(recorder):
    """Two configurations with two seeds each."""
    for seed in (0, 1):
        recorder.run(f"seed{seed}", 0.55 + 0.01 * seed, seed=seed)
        recorder.run(f"siglip-seed{seed}", 0.65 + 0.01 * seed, seed=seed, model__loss="SigLIPLoss")
    return recorder


def as_json(text):
    return json.loads(text, parse_constant=pytest.fail)


def refuses(*words):
    with pytest.raises(UserError) as caught:
        run([str(word) for word in words])
    assert "\n" not in caught.value.sentence
    return caught.value.sentence


# --- What is read --------------------------------------------------------------------------------


def test_an_experiment(two_by_two, compare):
    found = as_json(compare("drawn", "--format", "json"))
    assert [one["label"] for one in found["configurations"]] == ["A", "B"]
    assert [one["seeds"] for one in found["configurations"]] == [["0", "1"], ["0", "1"]]
    assert found["differing_params"] == ["model.loss", "model.loss.label_smoothing"]
    names = [metric["name"] for metric in found["metrics"]]
    # No val/loss: the values of two losses are of two scales.
    assert names == ["zeroshot/digits/top1", "retrieval/own/text_to_image_r1"]
    (first,) = (one for one in found["runs"] if one["name"] == "seed0")
    score = first["scores"]["zeroshot/digits/top1"]
    top1, _ = two_by_two.zeroshot(0.55, 0)
    assert score["value"] == pytest.approx(top1.mean(), abs=1e-12)
    assert score["low"] < score["value"] < score["high"]


def test_mlflow_folders_and_files_say_the_same(recorder, compare):
    folder = recorder.run("one", 0.6)
    outputs = [
        as_json(compare(what, "--format", "json"))["runs"][0]
        for what in ("drawn", "one", "drawn/one", folder, "runs/drawn/one", "runs/drawn")
    ]
    for found in outputs[1:]:
        assert found["scores"] == outputs[0]["scores"]
        assert found["step"] == outputs[0]["step"]
    run_id = recorder.client.search_runs(
        [recorder.client.get_experiment_by_name("drawn").experiment_id]
    )[0].info.run_id
    assert as_json(compare(run_id, "--format", "json"))["runs"][0] == outputs[0]


def test_a_run_named_twice_is_shown_once(recorder, compare):
    folder = recorder.run("one", 0.6)
    found = as_json(compare("drawn", folder, "one", "--format", "json"))
    assert [one["label"] for one in found["runs"]] == ["A"]


def test_an_experiment_that_mlflow_does_not_know_is_found_in_its_folders(recorder, compare):
    recorder.run("one", 0.6, mlflow=False)
    assert as_json(compare("drawn", "--format", "json"))["runs"][0]["name"] == "one"


def test_a_folder_whose_name_was_taken_anew_is_another_run(recorder, compare):
    import shutil

    folder = recorder.run("one", 0.5)
    said = json.loads((folder / "status.json").read_text())
    shutil.rmtree(folder)
    recorder.run("one", 0.7, mlflow=False)
    (folder / "status.json").write_text(json.dumps({**said, "id": "another"}))
    found = as_json(compare("drawn", folder, "--format", "json"))
    first, second = (one["scores"]["zeroshot/digits/top1"]["value"] for one in found["runs"])
    assert first < second
    # The rows of the first are gone with its folder; those of the second are not taken for them.
    reasons = {refusal["reason"] for refusal in found["checkpoint_claims"]["refused"]}
    assert "A1 has no outcomes sample by sample" in reasons


def test_a_moved_folder_is_the_same_run(recorder, compare):
    folder = recorder.run("one", 0.5)
    moved = folder.rename(folder.with_name("moved"))
    assert len(as_json(compare("drawn", moved, "--format", "json"))["runs"]) == 1


def test_asking_makes_no_database(tmp_path, monkeypatch, recorder, compare):
    folder = recorder.run("one", 0.6, mlflow=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    compare(folder)
    assert "sqlite:///mlflow.db holds no experiment" in refuses("nothing")
    assert not [*elsewhere.iterdir()]


def test_everything_mixed(two_by_two, compare):
    two_by_two.result("base.json", 0.7)
    found = as_json(compare("drawn", "base.json", "--baseline", "base.json", "--format", "json"))
    labels = [one["label"] for one in found["runs"]]
    assert labels == ["A1", "A2", "B1", "B2", "C"]
    assert found["baseline"] == "C"
    # What a result file does not say does not differ.
    assert found["differing_params"] == ["model.loss", "model.loss.label_smoothing"]
    assert {claim["first"] for claim in found["checkpoint_claims"]["made"]} == {"C"}


def test_outcomes_come_from_the_store_where_the_folder_is_gone(recorder, compare):
    import shutil

    for name, skill in (("one", 0.5), ("two", 0.6)):
        folder = recorder.run(name, skill)
        (run_id,) = (
            found.info.run_id
            for found in recorder.client.search_runs(
                [recorder.client.get_experiment_by_name("drawn").experiment_id]
            )
            if found.info.run_name == name
        )
        for file in sorted((folder / "outcomes").iterdir()):
            recorder.client.log_artifact(run_id, str(file), "outcomes")
        shutil.rmtree(folder)
    found = as_json(compare("drawn", "--format", "json"))
    assert len(found["checkpoint_claims"]["made"]) == 2


def test_a_journal_cut_short_is_read(recorder, compare):
    folder = recorder.run("one", 0.6, mlflow=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"time": 12')
    assert "one" in compare(folder)


# --- The value of a run --------------------------------------------------------------------------


def falling(recorder, name="falling", **differences):
    """A run that was best in the middle: by its validation retrieval and by its top-1."""
    folder = recorder.run(name, 0.6, mlflow=False, **differences)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    at = [index for index, line in enumerate(lines) if "zeroshot/digits/top1" in line]
    for index, value in zip(at, (0.1, 0.3, 0.5, 0.4, 0.35), strict=True):
        lines[index]["retrieval/own/text_to_image_r1"] = value
        lines[index]["zeroshot/digits/top1"] = value + 0.2 if value != 0.4 else 0.9
        lines[index]["zeroshot/digits/top1_low"] = value
        lines[index]["zeroshot/digits/top1_high"] = value + 0.4
    said = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**said, "chosen": {"step": 20}}))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_the_last_value_the_chosen_one_and_the_best(recorder, compare):
    folder = falling(recorder)

    def top1(*words):
        found = as_json(compare(folder, "--format", "json", *words))
        return found["runs"][0]["scores"]["zeroshot/digits/top1"], found

    last, found = top1()
    assert last["value"] == pytest.approx(0.55)
    assert found["value"] == "last"
    chosen, found = top1("--chosen")
    assert (chosen["value"], chosen["low"], chosen["high"]) == pytest.approx((0.7, 0.5, 0.9))
    assert chosen["step"] == 20
    assert "validation of own, by retrieval/own/text_to_image_r1" in found["value_in_words"]
    flattering = {m["name"] for m in found["metrics"] if m["chose_the_checkpoint"]}
    assert flattering == {"retrieval/own/text_to_image_r1"}
    best, found = top1("--best-over-epochs")
    assert best["value"] == pytest.approx(0.9)
    assert "BEST OVER EPOCHS" in compare(folder, "--best-over-epochs")


def test_a_best_over_epochs_claims_nothing(two_by_two, compare):
    found = as_json(compare("drawn", "--best_over_epochs", "--format", "json"))
    for kind in ("checkpoint_claims", "configuration_claims"):
        assert not found[kind]["made"]
        assert found[kind]["refused"]


def test_a_chosen_value_is_shown_for_no_run_that_chose_nothing(recorder, compare):
    free = {"trainer__callbacks": []}
    recorder.run("one", 0.6, mlflow=False, chosen=None, **free)
    assert "chose no checkpoint by a metric" in compare("runs/drawn/one", "--chosen")


def test_outcomes_of_another_step_than_the_chosen_are_not_paired(recorder, compare):
    recorder.run("one", 0.5)
    recorder.run("two", 0.6, chosen=30)
    words = ["drawn", "--chosen", "--metric", "zeroshot/digits/top1"]
    found = as_json(compare(*words, "--format", "json"))
    assert not found["checkpoint_claims"]["made"]
    (refusal,) = found["checkpoint_claims"]["refused"]
    assert "B" in refusal["reason"] or "A2" in refusal["reason"]
    assert "kept the outcomes of step 40 and chose that of step 30" in refusal["reason"]


def test_a_run_that_was_ended_early_is_taken_at_its_best_logged_point(recorder, compare):
    folder = falling(recorder)
    (folder / "status.json").write_text('{"id": "x", "status": "unfinished"}')
    found = as_json(compare(folder, "--chosen", "--format", "json"))
    assert found["runs"][0]["scores"]["zeroshot/digits/top1"]["step"] == 20


def test_metrics_by_name_end_and_pattern(recorder, compare):
    recorder.run("one", 0.6)

    def names(*words):
        found = as_json(compare("one", "--format", "json", *words))
        return [metric["name"] for metric in found["metrics"]]

    assert names("--metric", "val/loss", "--metric", "top5") == ["val/loss", "zeroshot/digits/top5"]
    assert names("--metric", "retrieval/*") == [
        "retrieval/own/text_to_image_r1",
        "retrieval/own/text_to_image_mean_rank",
    ]
    assert "did you mean top1?" in refuses("one", "--metric", "topp1")


# --- The claims ----------------------------------------------------------------------------------


def test_the_checkpoint_claim_is_the_paired_difference(recorder, compare):
    recorder.run("a", 0.55)
    recorder.run("b", 0.65, model__embed_dim=128)
    found = as_json(compare("a", "b", "--format", "json", "--metric", "*_r1", "--metric", "top1"))
    claims = {claim["metric"]: claim for claim in found["checkpoint_claims"]["made"]}
    first, second = (
        outcomes.read(recorder.folder / f"runs/drawn/{name}/outcomes/retrieval-own-last.parquet")
        for name in ("a", "b")
    )
    a, b, groups = outcomes.pair(first, second, "text_to_image_r1")
    assert len(groups.unique()) == recorder.rows
    expected = paired_difference(a, b, groups)
    claim = claims["retrieval/own/text_to_image_r1"]
    assert (claim["difference"], claim["low"], claim["high"], claim["p"]) == pytest.approx(
        (expected.value, *expected.interval, expected.p)
    )
    assert claim["verdict"] == "better"
    assert claim["n"] == "1200 in 400 groups"
    assert claim["p_holm"] >= claim["p"]
    # The configuration claim needs seeds.
    assert not found["configuration_claims"]["made"]
    (refusal,) = found["configuration_claims"]["refused"]
    assert refusal["reason"] == "fewer than two finished seeds on a side"


def test_the_configuration_claim_is_over_the_seeds(two_by_two, compare):
    found = as_json(compare("drawn", "--format", "json", "--metric", "top1"))
    values = {
        letter: [
            one["scores"]["zeroshot/digits/top1"]["value"]
            for one in found["runs"] if one["configuration"] == letter
        ]
        for letter in "AB"
    }  # fmt: skip
    expected = configuration_difference(values["A"], values["B"])
    (claim,) = found["configuration_claims"]["made"]
    assert (claim["first"], claim["second"], claim["n"]) == ("A", "B", "2 and 2")
    assert (claim["difference"], claim["p"]) == pytest.approx((expected.value, expected.p))


def test_a_seed_run_twice_is_one_seed(recorder, compare):
    recorder.run("a", 0.55, seed=0)
    recorder.run("a-2", 0.56, seed=0)
    for seed in (0, 1):
        recorder.run(f"b{seed}", 0.65, seed=seed, model__loss="SigLIPLoss")
    found = as_json(compare("drawn", "--format", "json"))
    assert not found["configuration_claims"]["made"]
    assert any("more than once with seed 0" in note for note in found["notes"])


def test_a_failed_run_is_no_seed(recorder, compare):
    recorder.run("a", 0.55, seed=0)
    recorder.run("a1", 0.56, seed=1, status="FAILED")
    for seed in (0, 1):
        recorder.run(f"b{seed}", 0.65, seed=seed, model__loss="SigLIPLoss")
    found = as_json(compare("drawn", "--format", "json"))
    assert not found["configuration_claims"]["made"]
    assert "A2 has the status failed and counts as no seed" in found["notes"]


def test_lower_is_better_for_a_loss(two_by_two, compare):
    found = as_json(compare("drawn", "--metric", "val/loss", "--format", "json"))
    (claim,) = found["configuration_claims"]["made"]
    assert claim["difference"] < 0
    assert claim["verdict"] in ("better", "undecided")


def test_different_data_are_not_paired(recorder, compare):
    recorder.run("a", 0.55)
    recorder.run("b", 0.65, digest="0ther0ther", model__embed_dim=128)
    text = " ".join(compare("a", "b", "--metric", "top1").split())
    assert "measured on different data (digests d1g35t00 and 0ther0th)" in text
    assert "zeroshot/digits was measured on different data" in text


def test_what_cannot_be_paired_says_why(recorder, compare):
    recorder.run("a", 0.55)
    for name in ("fewer", "regrouped", "undigested", "broken", "newer", "gone"):
        folder = recorder.run(name, 0.6, data__batch_size=len(name) * 10 + ord(name[0]))
        file = folder / "outcomes" / "zeroshot-digits-last.parquet"
        table = pq.read_table(file)
        about = json.loads(table.schema.metadata[b"clipkit"])
        if name == "fewer":
            table = table.slice(0, 100)
        elif name == "regrouped":
            table = table.set_column(2, "group", pa.array(np.zeros(len(table), np.int64)))
        elif name == "undigested":
            about.pop("data")
        elif name == "newer":
            about["schema"] = 2
        pq.write_table(table.replace_schema_metadata({"clipkit": json.dumps(about)}), file)
        if name == "broken":
            file.write_bytes(b"no parquet")
        elif name == "gone":
            file.unlink()
    found = as_json(compare("drawn", "--metric", "top1", "--format", "json"))
    names = {one["label"]: one["name"] for one in found["runs"]}
    reasons = {names[one["second"]]: one["reason"] for one in found["checkpoint_claims"]["refused"]}
    expected = {
        "fewer": "measured on different rows (400 and 100, 100 of them shared)",
        "regrouped": "their rows are grouped differently",
        "undigested": "do not say what data they were measured on",
        "broken": "the outcomes cannot be read",
        "newer": "outcomes of schema 2; this clipkit reads 1",
        "gone": "has no outcomes sample by sample",
    }
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name]


def test_a_baseline_of_several_configurations_is_refused(two_by_two):
    assert "4 runs of several configurations" in refuses("drawn", "--baseline", "drawn")


def test_a_baseline_from_elsewhere_is_added(recorder, compare):
    recorder.run("a", 0.55)
    recorder.run("other", 0.6, experiment="elsewhere")
    found = as_json(compare("drawn", "--baseline", "other", "--format", "json"))
    assert [one["name"] for one in found["runs"]] == ["a", "other"]
    assert "--baseline nowhere: not found" in refuses("drawn", "--baseline", "nowhere")


# --- Formats -------------------------------------------------------------------------------------


def test_the_terminal_holds_a_hundred_columns(recorder, compare):
    for index in range(8):
        recorder.run(
            f"a-rather-long-name-of-a-run-whose-batch_size={2**index}-lr={index + 1}e-4",
            0.5 + 0.02 * index, data__batch_size=2**index, model__embed_dim=32 * (index + 1),
            model__optimizer__lr=(index + 1) * 1e-4,
            data__dataset=f"/a/very/long/path/to/some/data/set/number/{index}",
        )  # fmt: skip
    text = compare("drawn", "--metric", "zeroshot/*", "--metric", "retrieval/*")
    assert max(map(len, text.splitlines())) <= 100
    assert "THIS CHECKPOINT BEATS THAT ONE" in text
    assert text.index("THIS CHECKPOINT") < text.index("THIS CONFIGURATION BEATS THAT ONE")
    assert "* the baseline: the first, since --baseline names none" in text
    parts = text.split("WHAT DIFFERS")[1].split("WHAT THEY SCORED")[0]
    for column in ("lr", "batch_size", "embed_dim", "dataset"):
        assert re.search(rf"\b{column}\b", parts)
    assert "max_epochs" not in parts


def test_few_runs_of_many_metrics_stand_side_by_side(recorder, compare):
    recorder.result("a.json", 0.6)
    recorder.result("b.json", 0.7, spec="open_clip:b")
    result = json.loads((recorder.folder / "b.json").read_text())
    for index in range(6):
        result["tasks"].append({**result["tasks"][0], "set": f"set{index}", "outcomes": None})
    for name in ("a", "b"):
        (recorder.folder / f"{name}.json").write_text(json.dumps(result))
    lines = compare("a.json", "b.json").splitlines()
    assert any(line.startswith("zeroshot/set3  top-1 % ↑") for line in lines)


def test_csv_is_one_row_a_run(two_by_two, compare):
    rows = list(csv.DictReader(io.StringIO(compare("drawn", "--format", "csv"))))
    assert [row["label"] for row in rows] == ["A1", "A2", "B1", "B2"]
    assert [row["model.loss"] for row in rows] == ["InfoNCELoss"] * 2 + ["SigLIPLoss"] * 2
    top1, _ = two_by_two.zeroshot(0.55, 0)
    assert float(rows[0]["zeroshot/digits/top1"]) == pytest.approx(top1.mean(), abs=1e-12)
    assert float(rows[0]["zeroshot/digits/top1_low"]) < top1.mean()
    with_loss = compare("drawn", "--metric", "val/loss", "--format", "csv")
    assert next(csv.DictReader(io.StringIO(with_loss)))["val/loss_low"] == ""


def test_json_has_no_nan(recorder, compare):
    recorder.run("a", 0.5, outcomes=False)
    folder = recorder.run("b", 0.6, model__embed_dim=128)
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    lines[-1]["val/loss"] = "nan"
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = as_json(compare("a", folder, "--format", "json"))
    assert found["schema"] == 1
    assert found["kind"] == "clipkit-comparison"


def test_latex_is_bold_only_where_it_is_significant(recorder, compare):
    recorder.run("a_1", 0.55)
    recorder.run("b", 0.70, model__embed_dim=128)
    text = compare("drawn", "--format", "latex")
    assert text.count(r"\textbf{") == 2
    assert r"a\_1" in text
    assert r"T$\to$I R@1 (\%) $\uparrow$" in text
    assert r"loss $\downarrow$" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text
    rows = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert {row.count(" & ") for row in rows} == {4}
    assert "the second best" in text
    # Two that hardly differ.
    recorder.run("c", 0.551, model__embed_dim=32)
    assert r"\textbf" not in compare("a_1", "c", "--format", "latex")
    named = compare("a_1", "b", "c", "--baseline", "c", "--format", "latex")
    assert "the baseline, c" in named
    assert named.count(r"\textbf{") == 2


def test_latex_of_seeds_is_of_configurations(two_by_two, compare):
    text = compare("drawn", "--format", "latex")
    rows = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(rows) == 2
    assert all(r"$\pm$" in row for row in rows)
    assert "Welch's t over the seeds" in text


def test_latex_escapes():
    assert escape("50% of a_b & {c} $x^2~ #1 \\d") == (
        r"50\% of a\_b \& \{c\} \$x\textasciicircum{}2\textasciitilde{} \#1 \textbackslash{}d"
    )


def test_the_difference_of_two_configurations(recorder, compare):
    recorder.run("a", 0.55)
    recorder.run("b", 0.6, seed=3, model__loss="SigLIPLoss")
    text = compare("a", "b", "--diff")
    assert "model.loss " in text
    assert "seed_everything" in text
    assert "embed_dim" not in text
    found = as_json(compare("a", "b", "--diff", "--format", "json"))
    assert found["params"]["model.loss"] == ["InfoNCELoss", "SigLIPLoss"]
    assert found["params"]["model.loss.label_smoothing"] == ["0.1", None]
    assert compare("a", "b", "--diff", "--format", "csv").startswith("key,drawn/a,drawn/b\n")
    assert "takes two runs, and 1" in refuses("a", "--diff")
    assert found["params"] == as_json(
        compare("b", "--baseline", "a", "--diff", "--format", "json")
    )["params"]  # fmt: skip


def test_one_run_alone(recorder, compare):
    recorder.run("a", 0.55)
    text = compare("a")
    assert "THIS CHECKPOINT" not in text
    assert "WHAT THEY SCORED" in text


# --- What a user gets wrong ----------------------------------------------------------------------


def test_an_experiment_without_a_run(recorder):
    recorder.client.create_experiment("empty")
    assert "compare empty: the experiment has no run" in refuses("empty")


def test_runs_that_recorded_nothing(recorder, compare):
    experiment = recorder.client.create_experiment("crashed")
    recorder.client.create_run(experiment, run_name="nothing")
    assert "none of the 1 runs has recorded a metric" in refuses("crashed")
    recorder.run("one", 0.6)
    assert "left out, since nothing was recorded: nothing" in compare("crashed", "drawn")


def test_something_unknown(recorder):
    recorder.run("emoji-large", 0.6)
    sentence = refuses("emoji-larg")
    assert "did you mean emoji-large?" in sentence
    assert "a result file (*.json)" in sentence
    assert "holds the experiments drawn" in sentence
    (recorder.folder / "empty").mkdir()
    assert "the folder holds no run" in refuses("empty")
    (recorder.folder / "mine.json").write_text("{}")
    assert "did you mean mine.json?" in refuses("mne.json")
    (recorder.folder / "notes.txt").write_text("notes")
    assert "a file, but no result file" in refuses("notes.txt")


def test_a_name_that_two_runs_have(recorder):
    recorder.run("one", 0.6)
    recorder.run("one", 0.6, experiment="elsewhere")
    assert "2 runs have this name; say drawn/one or elsewhere/one" in refuses("one")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"kind": "other"}', "no result file; `clipkit benchmark X --output x.json` writes one"),
        ("[]", "no result file"),
        ('{"kind": "clipkit-benchmark",\n nope}', "x.json, line 2, column 2: no JSON"),
        ('{"kind": "clipkit-benchmark", "schema": 0}', "of the older schema 0; this clipkit reads"),
        ('{"kind": "clipkit-benchmark", "schema": 2}', "of the newer schema 2; this clipkit reads"),
        ('{"kind": "clipkit-benchmark", "schema": 1}', "a broken result file (lacks 'model')"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_result_file(workdir, content, part):
    (workdir / "x.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert part in refuses("x.json")


def test_a_configuration_that_cannot_be_read(recorder):
    folder = recorder.run("one", 0.6, mlflow=False)
    (folder / "config.yaml").write_text("a: [1,\nb: 2")
    assert "config.yaml, line 2: the configuration cannot be read" in refuses(folder)


def test_a_server_that_does_not_answer(workdir):
    sentence = refuses("emoji", "--tracking_uri", "http://127.0.0.1:9")
    assert sentence.startswith("--tracking_uri: http://127.0.0.1:9 cannot be reached")


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--help"])
    assert stop.value.code == 0
    assert "clipkit compare emoji --baseline run_a --html report.html" in capsys.readouterr().out


# --- Small things --------------------------------------------------------------------------------


def test_the_main_metrics():
    names = [
        "train/loss", "val/loss", "zeroshot/a/top1", "zeroshot/a/top1_low", "zeroshot/a/top5",
        "zeroshot/voc/map", "zeroshot/voc/map_11point", "retrieval/f/image_to_text_r1",
        "retrieval/f/text_to_image_r1", "sugarcrepe/swap/accuracy", "mine/b/score",
        "mine/b/strict_score", "sugarcrepe/swap/tie_rate",
    ]  # fmt: skip
    assert main_metrics(names) == [
        "zeroshot/a/top1", "retrieval/f/text_to_image_r1", "retrieval/f/image_to_text_r1",
        "sugarcrepe/swap/accuracy", "zeroshot/voc/map", "mine/b/score", "val/loss",
    ]  # fmt: skip
    assert main_metrics(["train/loss", "train/scale"]) == ["train/loss"]


def test_metric_names_in_print():
    assert short("retrieval/f/text_to_image_r10") == "T→I R@10"
    assert short("retrieval/f/image_to_text_strict_r1") == "I→T strict R@1"
    assert short("retrieval/f/image_to_text_recall5") == "I→T recall@5"
    assert short("zeroshot/a/mean_class_top1") == "mean per class"
    assert [higher_is_better(name) for name in ("zeroshot/a/top1", "val/loss", "train/scale")] == [
        True, False, None,
    ]  # fmt: skip
    assert higher_is_better("retrieval/f/text_to_image_mean_rank") is False
    assert number("zeroshot/a/top1", 0.5815) == "58.1"
    assert number("val/loss", -0.0617, signed=True) == "-0.062"


def test_parameters_by_their_shortest_names():
    keys = ["model.optimizer.lr", "model.image_lr", "data.batch_size", "a.b.lr"]
    assert short_params(keys) == {
        "model.optimizer.lr": "optimizer.lr",
        "model.image_lr": "image_lr",
        "data.batch_size": "batch_size",
        "a.b.lr": "b.lr",
    }


def test_columns_that_do_not_fit_stand_below():
    columns = [Column(("",), ["A", "B"])]
    columns += [Column((f"c{i}",), ["x" * 20, "y"]) for i in range(6)]
    text = layout(columns, 70)
    assert max(map(len, text.splitlines())) <= 70
    assert text.count("A  ") == 2


# --- What does not compare -----------------------------------------------------------------------


def test_other_prompts_are_no_other_seed(recorder, compare):
    for name, seed, settings in (("a", 0, "5e77"), ("b", 1, "other"), ("c", 2, "5e77")):
        recorder.run(name, 0.5, seed=seed, settings=settings)
    for seed in range(2):
        recorder.run(f"d{seed}", 0.6, seed=seed, model__embed_dim=128)
    words = ["drawn", "--metric", "zeroshot/digits/top1", "--format", "json"]
    found = as_json(compare(*words))
    assert not found["configuration_claims"]["made"]
    (refusal,) = found["configuration_claims"]["refused"]
    assert refusal["reason"] == "evaluated with other class names, prompts or arguments"
    # Two checkpoints on the same rows do compare; that it may be the prompts is said.
    assert len(found["checkpoint_claims"]["made"]) == 4
    assert any("a difference may be theirs" in note for note in found["notes"])


def test_of_a_seed_run_twice_the_later_counts_in_folders_too(recorder, compare):
    # "late" was run first, whatever the alphabet says.
    late = recorder.run("late", 0.5, mlflow=False)
    lines = [json.loads(line) for line in (late / "metrics.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps({**line, "time": line["time"] - 900}) for line in lines)
    (late / "metrics.jsonl").write_text(text)
    recorder.run("again", 0.7, mlflow=False)
    recorder.run("other", 0.6, seed=1, mlflow=False)
    found = as_json(compare("runs/drawn", "--format", "json"))
    assert [one["name"] for one in found["runs"]] == ["late", "again", "other"]
    (configuration,) = found["configurations"]
    values = [recorder.zeroshot(skill, seed)[0].mean() for skill, seed in ((0.7, 0), (0.6, 1))]
    mean = configuration["means"]["zeroshot/digits/top1"]["mean"]
    assert mean == pytest.approx(sum(values) / 2)


def test_a_failed_seed_is_not_counted_in_the_papers_table(two_by_two, compare):
    two_by_two.run("seed7", 0.5, seed=7, status="FAILED")
    rows = [line for line in compare("drawn", "--format", "latex").splitlines() if "&" in line]
    assert sum(" & 2 & " in row for row in rows) == 2


def test_equal_weights_and_nothing_in_common_are_said(recorder, compare):
    for name in ("a.json", "b.json"):
        recorder.result(name, 0.6)
    assert "A, B have the same weights" in compare("a.json", "b.json")
    result = json.loads((recorder.folder / "a.json").read_text())
    for task in result["tasks"]:
        task["set"] = "other"
    (recorder.folder / "c.json").write_text(json.dumps(result))
    assert "nothing to compare" in compare("b.json", "c.json")


def test_a_result_file_of_a_checkpoint_knows_its_configuration(recorder, compare):
    def model(seed):
        return {**json.loads((recorder.folder / "x.json").read_text())["model"],
                "configuration": changed(seed_everything=seed)}  # fmt: skip

    recorder.result("x.json", 0.6)
    for seed in range(2):
        recorder.result(f"{seed}.json", 0.6, seed=seed, model=model(seed))
    found = as_json(compare("0.json", "1.json", "--format", "json"))
    assert [one["seeds"] for one in found["configurations"]] == [["0", "1"]]
    assert "seed_everything" in compare("0.json", "1.json", "--diff")


def test_a_format_that_is_none(recorder):
    recorder.run("one", 0.6)
    assert "did you mean json?" in refuses("one", "--format", "jsn")


def test_result_files_without_their_outcomes_do_not_pool_other_prompts(recorder, compare):
    import shutil

    def settings(name, prompts):
        path = recorder.folder / name
        result = json.loads(path.read_text())
        for task in result["tasks"]:
            task["settings"] = {"arguments": {}, "prompts": prompts}
        path.write_text(json.dumps(result))
        shutil.rmtree(recorder.folder / f"{path.stem}.outcomes")

    recorder.result("x.json", 0.6)
    model = json.loads((recorder.folder / "x.json").read_text())["model"]
    for width in (64, 128):
        for seed in range(2):
            configuration = changed(seed_everything=seed, model__embed_dim=width)
            name = f"{width}-{seed}.json"
            recorder.result(name, 0.6, seed=seed, model={**model, "configuration": configuration})
            settings(name, "photo" if width == 64 or seed == 0 else "sketch")
    names = [f"{width}-{seed}.json" for width in (64, 128) for seed in range(2)]
    found = as_json(compare(*names, "--format", "json"))
    assert not found["configuration_claims"]["made"]
    reasons = {refusal["reason"] for refusal in found["configuration_claims"]["refused"]}
    assert reasons == {"evaluated with other class names, prompts or arguments"}


def test_a_run_and_somebody_elses_model_differ(recorder, compare):
    recorder.result("base.json", 0.6)
    model = json.loads((recorder.folder / "base.json").read_text())["model"]
    mine = {**model, "spec": "last.ckpt", "embed_dim": 64, "configuration": changed()}
    recorder.result("mine.json", 0.5, model=mine)
    found = as_json(compare("mine.json", "base.json", "--format", "json"))
    assert {"model", "embed_dim"} <= set(found["differing_params"])
    assert r"open\_clip:ViT-B-32/openai" in compare("mine.json", "base.json", "--format", "latex")


def test_a_callback_that_only_measures_makes_no_other_configuration(recorder, compare):
    chooser, retrieval = CONFIGURATION["trainer"]["callbacks"]
    for name, seed, callbacks in (("a", 0, [retrieval, chooser]), ("b", 1, [chooser])):
        recorder.run(name, 0.5, seed=seed, mlflow=False, trainer__callbacks=callbacks)
    found = as_json(compare("runs/drawn", "--format", "json"))
    assert [one["seeds"] for one in found["configurations"]] == [["0", "1"]]


def test_infinity_is_read_from_a_database_as_it_was_logged(recorder, compare):
    recorder.run("one", 0.5)
    experiment = recorder.client.get_experiment_by_name("drawn").experiment_id
    (run,) = recorder.client.search_runs([experiment])
    recorder.client.log_metric(run.info.run_id, "val/loss", float("inf"), step=50)
    found = as_json(compare("drawn", "--format", "json"))
    assert found["runs"][0]["scores"]["val/loss"]["value"] is None
