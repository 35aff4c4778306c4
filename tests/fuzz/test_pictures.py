"""Damaged pictures end in a reason or in PIL's picture, whatever the damage; never in a crash."""

import pytest

from tests.fuzz import campaign
from tests.fuzz.judge import judge, pixels_of
from tests.fuzz.mutations import mutate
from tests.fuzz.worker import victims


def test_some_hundred_mutations() -> None:
    every = victims()
    whole = [pixels_of(victim.data) for victim in every]
    for number in range(300):
        place = number % len(every)
        kind, data = mutate(every[place], number, seed=1)
        try:
            outcome = judge(data, whole[place])
        except AssertionError as error:
            raise AssertionError(f"mutation {number}, {kind} of {every[place].form}") from error
        assert outcome in ("same", "changed") or every[place].data != data


def test_the_same_numbers_give_the_same_file() -> None:
    one, other = (mutate(victims()[7], 7, seed=2) for _ in range(2))
    assert one == other


def test_a_process_that_dies_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        [{"begins": 0}, {"number": 0, "form": "jpeg", "kind": "cut off", "outcome": "truncated"},
         {"begins": 1}],
        [{"begins": 2}, {"number": 2, "form": "webp", "kind": "cut off", "outcome": "same"}],
    ]  # fmt: skip
    monkeypatch.setattr(campaign, "_lines", lambda *_: said.pop(0))
    tally = campaign.run(3, workers=1)
    assert tally.total == 3
    assert len(tally.wrong) == 1
    assert tally.wrong[0].startswith("mutation 1 of seed 0: ")
    assert "CRASH" in campaign.table(tally)


@pytest.mark.slow
def test_ten_thousand_mutations() -> None:
    tally = campaign.run(10_000)
    print(campaign.table(tally))
    assert not tally.wrong
    assert tally.total == 10_000
