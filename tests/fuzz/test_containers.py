"""Damaged containers end in a sentence, in broken rows with reasons, or in the rows that were."""

from pathlib import Path

import pytest

from tests.fuzz import campaign
from tests.fuzz.containers import FORMS, judge, mutate, victim, with_pictures


@pytest.fixture
def folder():
    with with_pictures() as path:
        yield Path(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_file_is_the_same(form, folder):
    assert judge(form, victim(form).data, folder) == "same rows"


def test_some_hundred_mutations(folder):
    for number in range(240):
        form, kind, data = mutate(number, seed=1)
        try:
            judge(form, data, folder)
        except AssertionError as error:
            raise AssertionError(f"mutation {number}, {kind} of {form}") from error


@pytest.mark.slow
def test_ten_thousand_mutations():
    tally = campaign.run(10_000, module="tests.fuzz.container_worker", forms=FORMS)
    print(campaign.table(tally, FORMS))
    assert not tally.wrong
    assert tally.total == 10_000
