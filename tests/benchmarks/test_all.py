"""Every question in turn: a failure is named, and does not end the others."""

import argparse

import pytest
import torch

from benchmarks import all as everything
from benchmarks.findings import (
    Finding,
    Measured,
    of_step,
    of_trains_as_well,
    of_whatever,
    spread_of,
)
from benchmarks.overview import PAGE, blocks
from benchmarks.questions import GPU, OTHERS, Question, latest
from benchmarks.scaling import filled


@pytest.mark.parametrize(
    ("measured", "at_most", "verdict"),
    [
        ((2.0, 1.6, 2.4), False, "met"),
        ((2.0, 1.4, 2.4), False, "open"),
        ((1.2, 1.1, 1.4), False, "not met"),
        ((1.2, 1.1, 1.4), True, "met"),
        ((1.2, 1.1, 1.6), True, "open"),
        ((1.5, 1.5, 1.5), False, "met"),
    ],
)
def test_a_goal_is_met_where_the_whole_interval_is(measured, at_most, verdict):
    assert Finding("x", Measured(*measured), 1.5, at_most=at_most).verdict == verdict


def test_what_was_not_measured_says_so():
    finding = Finding("x", None, 1.5, " times")
    assert (finding.shown, finding.verdict) == ("not measured", "")
    assert finding.must_show == "at least 1.5 times"


def test_an_interval_of_few_rounds_says_how_sure_it_is():
    spread = {"median": 2.0, "low": 1.6, "high": 2.4, "coverage": 0.75}
    assert Finding("x", spread_of(spread), 1.5).shown == "2 (1.6-2.4), 75 % sure"


def test_one_seed_a_side_meets_no_goal():
    result = {"difference": {"value": 1.0, "welch": None, "paired": None},
              "must_show": {"difference_low": -3.0}}  # fmt: skip
    (found,) = of_trains_as_well(result)
    assert (found.shown, found.verdict) == ("1 points", "")


def test_a_step_is_read_where_only_theirs_was_compiled():
    spread = {"median": 2.0, "low": 1.6, "high": 2.4}
    names = ("open_clip", "open_clip, compiled", "clipkit", "clipkit, padded")
    result = {
        "pairs_per_second": dict.fromkeys(names, spread),
        "times_as_fast": dict.fromkeys(names[2:], spread),
        "must_show": {"times_as_fast": {"clipkit": 1.5, "clipkit, padded": 1.0}},
    }
    assert [found.verdict for found in of_step(result)] == ["met", "", "met", ""]


def options(tmp_path):
    return argparse.Namespace(
        results=tmp_path / "results", rehearse=True, device="cpu", only=None, data=tmp_path / "none"
    )


def test_a_failure_is_named_and_the_others_are_asked(tmp_path, capfd):
    broken = Question("broken", "what cannot be asked", "no_such_script", "", of_whatever)
    whole = next(question for question in OTHERS if question.name == "retrieval-scale")
    assert everything.ask_all([broken, whole], options(tmp_path)) == 1
    output = capfd.readouterr().out
    row = next(line for line in output.splitlines() if line.startswith("broken "))
    assert "ended with 1" in row
    assert row.endswith("FAILED")
    assert "2 questions" in output
    assert "failed: broken" in output
    assert latest(whole, tmp_path / "results") is not None
    assert all(f"{question.name} " in output for question in GPU)
    assert "needs a GPU" in output


def test_what_takes_too_long_is_ended(tmp_path):
    slow = Question("slow", "?", "start_up", "", of_whatever, minutes=0.01)
    answer = everything.ask(slow, options(tmp_path))
    assert answer.path is None
    assert answer.failure == "not done after 0.01 minutes"


def test_a_question_whose_data_is_not_there_says_so(tmp_path):
    wants = Question("wants", "?", "tokens", "", of_whatever, needs_data=True)
    failure = everything.ask(wants, options(tmp_path)).failure
    assert failure.startswith("not asked: ")
    assert "--data" in failure


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "stepp"], "no question 'stepp'"),
        (["--rehearse"], "its figures mean nothing"),
        pytest.param(
            ["--device", "cuda"],
            "there is no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_mistakes_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        everything.main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_gpus_questions_are_three_parts_of_under_ten_minutes():
    for part in (1, 2, 3):
        asked = [question for question in GPU if question.part == part]
        assert asked
        assert sum(question.minutes for question in asked) < 10


def test_the_page_holds_the_latest_figures():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, blocks()) == page, "python -m benchmarks.overview --write"
