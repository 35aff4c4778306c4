import math
from itertools import permutations
from statistics import mean, median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import (
    Interval,
    Metric,
    QueryOutcomes,
    RetrievalOutcomes,
    batch_accuracy,
    pairs_of,
    retrieval_metrics,
    retrieve,
)
from clipkit.evaluation.retrieval import connected

DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
VALUES = ("hit1", "hit5", "hit10", "recall5", "rank")


def naive_values(scores: list[float], right: set[int], order: tuple[int, ...]) -> dict[str, float]:
    ranking = sorted(order, key=lambda which: -scores[which])
    places = [place for place, which in enumerate(ranking, 1) if which in right]
    return {
        "hit1": float(places[0] <= 1),
        "hit5": float(places[0] <= 5),
        "hit10": float(places[0] <= 10),
        "recall5": sum(place <= 5 for place in places) / len(places),
        "rank": float(places[0]),
    }


def naive_sides(
    image: Tensor, text: Tensor, pairs: Tensor
) -> list[dict[int, tuple[list[float], set[int]]]]:
    """The scores and the right answers of each query that has one, for both directions."""
    image, text = image.double(), text.double()
    image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    scores = [[round(float(i @ t), 6) for t in text] for i in image]
    right = {(int(row), int(which)) for row, which in pairs}
    by_image = {
        row: (scores[row], {t for t in range(len(text)) if (row, t) in right})
        for row in range(len(image))
        if any(row == owner for owner, _ in right)
    }
    by_text = {
        t: ([row[t] for row in scores], {row for row in range(len(image)) if (row, t) in right})
        for t in range(len(text))
        if any(t == which for _, which in right)
    }
    return [by_image, by_text]


def sides(outcomes: RetrievalOutcomes) -> list[QueryOutcomes]:
    return [outcomes.image_to_text, outcomes.text_to_image]


def values(metrics: dict[str, Metric]) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics.items()}


def several_captions(num_images: int, num_texts: int) -> tuple[Tensor, Tensor, Tensor]:
    owners = torch.randint(num_images, (num_texts,))
    images = torch.randn(num_images, 12)
    return images, images[owners] + 1.5 * torch.randn(num_texts, 12), owners


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_outcomes_are_the_mean_over_all_orders_of_ties(data: st.DataObject) -> None:
    images = DIRECTIONS[data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))]
    texts = DIRECTIONS[data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))]
    pair = st.tuples(st.integers(0, len(images) - 1), st.integers(0, len(texts) - 1))
    pairs = torch.tensor(data.draw(st.lists(pair, min_size=1, max_size=12)))
    outcomes = retrieve(images, texts, pairs, block_size=data.draw(st.integers(1, 7)))
    for side, queries in zip(sides(outcomes), naive_sides(images, texts, pairs), strict=True):
        assert side.rows.tolist() == list(queries)
        for at, (scores, right) in enumerate(queries.values()):
            runs = [naive_values(scores, right, o) for o in permutations(range(len(scores)))]
            expected = {name: mean(run[name] for run in runs) for name in VALUES}
            assert {name: float(getattr(side, name)[at]) for name in VALUES} == pytest.approx(
                expected
            )
            hits = [run["hit1"] for run in runs]
            assert bool(side.strict_hit1[at]) == all(hits)
            assert int(side.num_right[at]) == len(right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_are_those_of_a_loop(dtype: torch.dtype) -> None:
    images, texts, owners = several_captions(30, 70)  # some images have no text
    assert len(owners.unique()) < 30
    # Ten captions belong to a second image too.
    pairs = torch.cat([pairs_of(owners), torch.stack([torch.arange(10), torch.arange(10)]).T])
    outcomes = retrieve(images.to(dtype), texts.to(dtype), pairs)
    metrics = values(retrieval_metrics(outcomes))
    names = ["image_to_text", "text_to_image"]
    for name, queries in zip(names, naive_sides(images, texts, pairs), strict=True):
        rows = [naive_values(s, right, tuple(range(len(s)))) for s, right in queries.values()]
        expected = {
            "r1": mean(row["hit1"] for row in rows),
            "r5": mean(row["hit5"] for row in rows),
            "r10": mean(row["hit10"] for row in rows),
            "recall5": mean(row["recall5"] for row in rows),
            "mean_rank": mean(row["rank"] for row in rows),
            "median_rank": median(row["rank"] for row in rows),
            "strict_r1": mean(row["hit1"] for row in rows),
            "tie_rate": 0.0,
        }
        for metric, value in expected.items():
            assert metrics.pop(f"{name}_{metric}") == pytest.approx(value)
    assert not metrics


@settings(deadline=None, max_examples=30)
@given(num_images=st.integers(1, 12), captions=st.integers(1, 4), value=st.sampled_from([0.0, 1.0]))
def test_a_constant_model_scores_chance(num_images: int, captions: int, value: float) -> None:
    num_texts = num_images * captions
    owners = torch.arange(num_images).repeat(captions)
    outcomes = retrieve(
        torch.full((num_images, 5), value),
        torch.full((num_texts, 5), value),
        pairs_of(owners),
        block_size=5,
    )
    found = retrieval_metrics(outcomes)
    metrics = values(found)
    chances = {name: m.chance for name, m in found.items() if not name.endswith("tie_rate")}
    assert {name: metrics[name] for name in chances} == pytest.approx(chances, rel=1e-12)
    for k in (1, 5, 10):
        looked = min(k, num_texts)
        miss = math.comb(num_texts - captions, looked) / math.comb(num_texts, looked)
        assert metrics[f"image_to_text_r{k}"] == pytest.approx(1 - miss)
        assert metrics[f"text_to_image_r{k}"] == pytest.approx(min(1, k / num_images))
    assert metrics["image_to_text_recall5"] == pytest.approx(min(1, 5 / num_texts))
    assert metrics["image_to_text_mean_rank"] == pytest.approx((num_texts + 1) / (captions + 1))
    assert metrics["text_to_image_median_rank"] == pytest.approx((num_images + 1) / 2)


@pytest.mark.parametrize("block_size", [1, 3, 17, None])
def test_blocks_change_nothing(block_size: int | None) -> None:
    images, texts, owners = several_captions(40, 130)
    whole = retrieve(images, texts, pairs_of(owners), block_size=1000)
    blocks = retrieve(images, texts, pairs_of(owners), block_size=block_size)
    for one, other in zip(sides(whole), sides(blocks), strict=True):
        for name in ("rows", "groups", "tied", *VALUES):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_order_of_rows_changes_nothing() -> None:
    images, texts, owners = several_captions(25, 60)
    texts[7] = texts[8]  # a tie
    image_order, text_order = torch.randperm(25), torch.randperm(60)
    moved = image_order.argsort()[owners[text_order]]
    shuffled = retrieve(images[image_order], texts[text_order], pairs_of(moved))
    assert values(retrieval_metrics(shuffled)) == pytest.approx(
        values(retrieval_metrics(retrieve(images, texts, pairs_of(owners)))), abs=1e-12
    )


def test_an_image_without_text_is_a_candidate_and_no_query() -> None:
    images = torch.eye(3)
    outcomes = retrieve(images, torch.tensor([[0.9, 1.0, 0.0]]), torch.tensor([[0, 0]]))
    assert outcomes.image_to_text.rows.tolist() == [0]
    assert outcomes.text_to_image.rank.tolist() == [2.0]
    assert outcomes.text_to_image.num_candidates == 3


def test_right_answers_within_the_tolerance_share_the_first_place() -> None:
    nearness = torch.tensor([0.5, 0.5 + 4e-7, 0.5 + 2e-7], dtype=torch.float64)
    texts = torch.stack([nearness, (1 - nearness**2).sqrt()], dim=1)
    outcomes = retrieve(
        torch.eye(2).double(), texts, pairs_of(torch.tensor([0, 0, 1]))
    ).image_to_text
    assert float(outcomes.hit1[0]) == pytest.approx(2 / 3)
    assert float(outcomes.rank[0]) == pytest.approx(4 / 3)
    assert outcomes.tied[0]


def test_groups_are_the_images_where_a_caption_has_one() -> None:
    pairs = pairs_of(torch.tensor([2, 0, 2]))
    outcomes = retrieve(torch.eye(3), torch.eye(3)[[2, 0, 2]], pairs)
    assert outcomes.image_to_text.groups.tolist() == [0, 2]
    assert outcomes.text_to_image.groups.tolist() == [2, 0, 2]
    assert outcomes.text_to_image.tied.tolist() == [False, False, False]


def test_a_group_is_all_that_a_chain_of_pairs_connects() -> None:
    # Caption 1 joins images 0 and 1, caption 2 images 1 and 4; image 2 and caption 4 have none.
    pairs = torch.tensor([[4, 2], [1, 2], [1, 1], [0, 1], [0, 0], [3, 3], [3, 3]])
    outcomes = retrieve(torch.eye(5), torch.eye(5), pairs)
    assert outcomes.image_to_text.rows.tolist() == [0, 1, 3, 4]
    assert outcomes.image_to_text.groups.tolist() == [0, 0, 3, 0]
    assert outcomes.text_to_image.rows.tolist() == [0, 1, 2, 3]
    assert outcomes.text_to_image.groups.tolist() == [0, 0, 0, 3]
    assert outcomes.image_to_text.num_right.tolist() == [2, 2, 1, 1]
    assert retrieval_metrics(outcomes)["text_to_image_r1"].n == 2


def test_what_connects_everything_is_one_observation() -> None:
    everything = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    metric = retrieval_metrics(retrieve(torch.randn(4, 8), torch.randn(3, 8), everything))
    assert metric["image_to_text_r1"] == Metric(1.0, Interval(0.0, 1.0), 1, 1.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=25))
def test_groups_are_the_connected_components(found: list[tuple[int, int]]) -> None:
    of_image, of_text = connected(torch.tensor(found).reshape(-1, 2).long(), 12, 12)
    groups = list(range(24))  # joined pair by pair
    for image, text in found:
        one, other = groups[image], groups[12 + text]
        groups = [min(one, other) if group in (one, other) else group for group in groups]
    assert of_image.tolist() + of_text.tolist() == groups


def test_a_long_chain_is_one_group() -> None:
    steps, order = torch.arange(2000), torch.randperm(2001)
    pairs = torch.cat(
        [torch.stack([order[steps], steps]), torch.stack([order[steps + 1], steps])], 1
    )
    of_image, of_text = connected(pairs.T, 2001, 2000)
    assert of_image.tolist() == [0] * 2001
    assert of_text.tolist() == [0] * 2000


def test_half_precision_and_any_norm_are_ranked_by_cosine() -> None:
    images, texts, owners = several_captions(20, 40)
    halves = images.bfloat16(), texts.bfloat16()
    scaled = retrieve(
        halves[0] * 8, halves[1] * torch.tensor([[4.0], [0.5]] * 20).bfloat16(), pairs_of(owners)
    )
    expected = retrieve(halves[0].double(), halves[1].double(), pairs_of(owners))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = retrieve(*halves, pairs_of(owners))
    wanted = pytest.approx(values(retrieval_metrics(expected)))
    assert values(retrieval_metrics(scaled)) == wanted
    assert values(retrieval_metrics(inside)) == wanted


def test_every_metric_has_an_interval_around_it_and_a_best() -> None:
    images, texts, owners = several_captions(30, 240)
    found = retrieval_metrics(retrieve(images, texts, pairs_of(owners)))
    perfect = retrieval_metrics(retrieve(images, images[owners], pairs_of(owners)))
    for name, metric in found.items():
        assert metric.interval is not None
        assert metric.interval.low <= metric.value <= metric.interval.high
        assert all(map(math.isfinite, metric.interval))
        assert metric.n == len(owners.unique())
        assert perfect[name].value == pytest.approx(metric.best), name
    assert found["image_to_text_recall5"].best < 1.0
    assert found["text_to_image_mean_rank"].chance == 15.5


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, 0], [2, 1]], "1 of 2 pairs name an image or a text outside the 2 images and 2 texts"),
        ([[-1, 0], [0, 2]], "2 of 2 pairs"),
    ],
)
def test_a_pair_of_what_is_not_there_is_refused(pairs: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        retrieve(torch.eye(2), torch.eye(2), torch.tensor(pairs))


def test_pairs_have_two_integer_columns() -> None:
    with pytest.raises(ValueError, match=r"must be \(P, 2\)"):
        retrieve(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="integer rows"):
        retrieve(torch.eye(2), torch.eye(2), torch.zeros(1, 2))


@pytest.mark.parametrize("side", ["image", "text"])
def test_embeddings_that_are_not_finite_are_refused(side: str) -> None:
    image, text = torch.eye(2), torch.eye(2)
    {"image": image, "text": text}[side][1] = torch.inf
    with pytest.raises(UserError, match=f"1 of 2 rows of the {side} embeddings"):
        retrieve(image, text, pairs_of(torch.tensor([0, 1])))


def test_nothing_to_retrieve_has_no_mean() -> None:
    outcomes = retrieve(torch.eye(2), torch.ones(0, 2), torch.zeros(0, 2, dtype=torch.int64))
    assert len(outcomes.image_to_text.rows) == 0
    with pytest.raises(ValueError, match="no row"):
        retrieval_metrics(outcomes)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_batch_accuracy_is_the_mean_over_all_orders_of_ties(data: st.DataObject) -> None:
    size, extra = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 2))

    def ids(count: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))

    image, text = DIRECTIONS[ids(size)], DIRECTIONS[ids(size + extra)]
    captions, pictures = ids(size + extra), ids(size)
    found = batch_accuracy(
        image,
        text[:size],
        all_text=text,
        caption_ids=captions[:size],
        image_ids=pictures,
        all_caption_ids=captions,
        block_size=data.draw(st.integers(1, 5)),
    )

    def expected(queries: Tensor, candidates: Tensor) -> float:
        values = []
        for row, query in enumerate(queries):
            scores = [round(float(query @ other), 5) for other in candidates]
            right = {
                other
                for other in range(len(candidates))
                if other == row
                or captions[other] == captions[row]
                or (other < size and pictures[other] == pictures[row])
            }
            orders = permutations(range(len(scores)))
            values += [naive_values(scores, right, order)["hit1"] for order in orders]
        return mean(values)

    assert float(found.image_to_text) == pytest.approx(expected(image, text), abs=1e-6)
    assert float(found.text_to_image) == pytest.approx(expected(text[:size], image), abs=1e-6)


def test_batch_accuracy_of_shares_averages_to_that_of_the_batch() -> None:
    image, text = torch.randn(10, 4), torch.randn(10, 4)
    whole = torch.stack(batch_accuracy(image, text))
    shares = [
        torch.stack(
            batch_accuracy(
                image[rows], text[rows], all_image=image, all_text=text, offset=int(rows.start)
            )
        )
        for rows in (slice(0, 5), slice(5, 10))
    ]
    torch.testing.assert_close(torch.stack(shares).mean(dim=0), whole)


def test_batch_accuracy_of_embeddings_that_are_not_finite_is_nan() -> None:
    image, text = torch.eye(3, requires_grad=True), torch.eye(3)
    assert [float(share) for share in batch_accuracy(image, text)] == [1.0, 1.0]
    text[1] = torch.nan
    assert math.isnan(batch_accuracy(image, text).text_to_image)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=20))
def test_a_constant_model_scores_chance_for_any_pairs(found: list[tuple[int, int]]) -> None:
    pairs = torch.tensor(found)
    metrics = retrieval_metrics(retrieve(torch.ones(6, 3), torch.ones(8, 3), pairs))
    for name, metric in metrics.items():
        if not name.endswith("tie_rate"):
            assert metric.value == pytest.approx(metric.chance, rel=1e-12), name


def test_a_tie_is_worth_no_more_where_it_favours_the_right_answer() -> None:
    # Coarse embeddings, the right text always the first of four of the same embedding.
    images = torch.eye(5)
    pairs = torch.stack([torch.arange(5), 4 * torch.arange(5)], dim=1)
    texts = images.repeat_interleave(4, dim=0)
    metrics = values(retrieval_metrics(retrieve(images, texts, pairs)))
    assert metrics["image_to_text_r1"] == 0.25
    assert metrics["image_to_text_strict_r1"] == 0.0
    assert metrics["image_to_text_tie_rate"] == 1.0
    assert metrics["text_to_image_strict_r1"] == 1.0
