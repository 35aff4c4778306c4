import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from clipkit.evaluation import Difference, configuration_difference, holm, paired_difference


def naive_bootstrap(first: Tensor, second: Tensor, groups: Tensor, samples: int) -> list[float]:
    random = np.random.default_rng(1)
    rows = {
        which: (second[groups == which] - first[groups == which]).tolist()
        for which in groups.unique().tolist()
    }
    found = []
    for _ in range(samples):
        drawn = [row for which in random.choice(list(rows), len(rows)) for row in rows[which]]
        found.append(sum(drawn) / len(drawn))
    return found


@pytest.mark.parametrize("kind", ["hits", "ranks"])
def test_the_bootstrap_is_the_naive_one(kind: str) -> None:
    groups = torch.randint(30, (90,))  # uneven
    common = torch.randn(30)[groups]
    first, second = (common + torch.randn(90) for _ in range(2))
    if kind == "hits":
        first, second = (first > 0).double(), (second > -0.3).double()
    found = paired_difference(first, second, groups)
    num_groups = len(groups.unique())
    expected = naive_bootstrap(first, second, groups, 1500)
    wider = stats.t.ppf(0.975, num_groups - 1) / stats.norm.ppf(0.975)
    wider *= math.sqrt(num_groups / (num_groups - 1))
    value = float((second - first).double().mean())
    assert found.value == pytest.approx(value)
    low, high = value + wider * (np.quantile(expected, [0.025, 0.975]) - value)
    spread = float(np.std(expected))
    assert found.interval == pytest.approx((low, high), abs=0.25 * spread)
    beyond = np.mean((value + wider * (np.array(expected) - value)) <= 0)
    assert found.p == pytest.approx(2 * min(beyond, 1 - beyond), abs=0.05)


def test_it_agrees_with_the_paired_t_test_where_that_is_right() -> None:
    first = torch.randn(400)
    second = first + 0.1 + torch.randn(400)
    found = paired_difference(first, second)
    expected = stats.ttest_rel(second.numpy(), first.numpy())
    assert found.p == pytest.approx(float(expected.pvalue), abs=0.01)
    ends = expected.confidence_interval()
    assert found.interval == pytest.approx((ends.low, ends.high), abs=0.01)


def test_groups_that_are_alike_are_drawn_as_those_one_by_one() -> None:
    first, second = (torch.rand(600) < 0.6).double(), (torch.rand(600) < 0.7).double()
    few = paired_difference(first, second)
    # Tiny differences make every group another one.
    many = paired_difference(first, second + 1e-5 * torch.rand(600))
    assert few.interval == pytest.approx(many.interval, abs=4e-3)
    assert few.p == pytest.approx(many.p, abs=0.01)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_interval_and_p_tell_one_story(data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 40))
    sides = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=rows, max_size=rows)
    first, second = torch.tensor(data.draw(sides)), torch.tensor(data.draw(sides))
    groups = torch.arange(rows) // data.draw(st.integers(1, rows // 2))
    found = paired_difference(first, second, groups, samples=200)
    assert 0 < found.p <= 1
    assert found.interval.low <= found.interval.high
    if found.p < 0.04:
        assert not found.interval.low <= 0 <= found.interval.high
    if found.p > 0.07:  # 200 samples are coarse
        assert found.interval.low <= 0 <= found.interval.high
    # The other way round is the same claim.
    turned = paired_difference(second, first, groups, samples=200)
    assert turned.value == pytest.approx(-found.value)
    # Neither the order of rows nor the names of groups matter.
    order = torch.randperm(rows)
    again = paired_difference(first[order], second[order], 7 * groups[order] + 3, samples=200)
    assert again.p == found.p
    assert again.interval == pytest.approx(found.interval)


def test_the_same_outcomes_are_no_difference() -> None:
    outcomes = torch.rand(50)
    assert paired_difference(outcomes, outcomes) == Difference(0.0, (0.0, 0.0), 1.0)


def test_copies_of_a_row_say_no_more_than_the_row() -> None:
    first, second = torch.rand(100), torch.rand(100)
    once = paired_difference(first, second)
    copied = paired_difference(
        first.repeat_interleave(5), second.repeat_interleave(5), torch.arange(500) // 5
    )
    assert copied.interval == pytest.approx(once.interval)
    assert copied.p == once.p


@pytest.mark.parametrize(("differing", "least"), [(1, 1.0), (3, 0.25), (5, 0.0625)])
def test_a_few_rows_that_differ_are_no_proof(differing: int, least: float) -> None:
    second = torch.zeros(1000)
    second[:differing] = 1
    found = paired_difference(torch.zeros(1000), second)
    assert found.p >= least
    assert found.interval.low <= 0


@pytest.mark.parametrize(
    ("first", "second", "groups", "message"),
    [
        (torch.zeros(3), torch.zeros(4), None, "pairs of rows"),
        (torch.zeros(3), torch.zeros(3), torch.zeros(4), "groups are"),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3), "at least two"),
        (torch.zeros(2), torch.tensor([0.0, math.nan]), None, "finite"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(
    first: Tensor, second: Tensor, groups: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second, groups)


def two_models(gain: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Outcomes on 1,000 rows of two models that mostly find the same rows hard."""
    hard = 0.9 * torch.randn(1000, generator=generator)
    own = 0.436 * torch.randn(2, 1000, generator=generator)
    level = torch.special.ndtri(torch.tensor([0.6, 0.6 + gain]))
    first, second = (hard + own < level.unsqueeze(1)).double()
    return first, second


def test_checkpoints_of_equal_truth_are_told_apart_as_often_as_the_level_says() -> None:
    generator = torch.Generator().manual_seed(0)
    alarms = [
        paired_difference(*two_models(0.0, generator), samples=1000).p < 0.05 for _ in range(600)
    ]
    assert 0.03 <= sum(alarms) / 600 <= 0.07


def test_pairs_find_two_points_more_often_than_two_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    paired = unpaired = 0
    for _ in range(200):
        first, second = two_models(0.02, generator)
        paired += paired_difference(first, second, samples=1000).p < 0.05
        unpaired += float(stats.ttest_ind(first.numpy(), second.numpy()).pvalue) < 0.05
    assert paired > 1.8 * unpaired


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True),
    st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True),
)
def test_seeds_are_compared_as_scipy_does(ones: list[int], others: list[int]) -> None:
    first, second = [one / 1000 for one in ones], [other / 1000 for other in others]
    found = configuration_difference(first, second)
    expected = stats.ttest_ind(second, first, equal_var=False)
    ends = expected.confidence_interval()
    assert found is not None
    assert found.value == pytest.approx(np.mean(second) - np.mean(first), abs=1e-9)
    assert found.interval == pytest.approx((ends.low, ends.high), rel=1e-6, abs=1e-6)
    assert found.p == pytest.approx(float(expected.pvalue), rel=1e-6, abs=1e-12)
    assert found.p > 0


def test_one_seed_a_side_says_nothing_about_the_next() -> None:
    assert configuration_difference([0.5], [0.6, 0.7]) is None
    assert configuration_difference([0.5, 0.6], [0.7]) is None
    assert configuration_difference([0.5, 0.5], [0.7, 0.7]) is None


def test_configurations_of_equal_truth_are_told_apart_as_often_as_the_level_says() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = math.sqrt(0.6 * 0.4 / 1000)
    alarms = checkpoint = 0
    for _ in range(400):
        truths = 0.6 + 2 * sample * torch.randn(10, generator=generator)
        outcomes = (torch.rand(10, 1000, generator=generator) < truths.unsqueeze(1)).double()
        means = outcomes.mean(dim=1).tolist()
        claim = configuration_difference(means[:5], means[5:])
        alarms += claim is not None and claim.p < 0.05
        checkpoint += paired_difference(outcomes[0], outcomes[5], samples=500).p < 0.05
    assert 0.03 <= alarms / 400 <= 0.07
    assert checkpoint / 400 > 0.25  # seeds are not in the samples


def test_holm_against_the_example_of_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(1e-6, 1), max_size=8))
def test_holm_steps_down(p: list[float]) -> None:
    adjusted = holm(p)
    # Rejected at any level: the smallest while each is below its share of the level.
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for place, which in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[which] * (len(p) - place) > level:
                break
            rejected.add(which)
        assert {which for which, value in enumerate(adjusted) if value <= level} == rejected
    assert all(before <= after <= 1 for before, after in zip(p, adjusted, strict=True))
