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
    QueryOutcomes,
    RetrievalOutcomes,
    batch_accuracy,
    retrieval_intervals,
    retrieval_metrics,
    retrieve,
)

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
    image: Tensor, text: Tensor, owners: Tensor
) -> list[dict[int, tuple[list[float], set[int]]]]:
    """The scores and the right answers of each query that has one, for both directions."""
    image, text = image.double(), text.double()
    image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    scores = [[round(float(i @ t), 6) for t in text] for i in image]
    by_image = {
        row: (scores[row], {t for t, owner in enumerate(owners.tolist()) if owner == row})
        for row in range(len(image))
        if row in owners.tolist()
    }
    by_text = {
        t: ([scores[row][t] for row in range(len(image))], {owner})
        for t, owner in enumerate(owners.tolist())
    }
    return [by_image, by_text]


def sides(outcomes: RetrievalOutcomes) -> list[QueryOutcomes]:
    return [outcomes.image_to_text, outcomes.text_to_image]


def several_captions(num_images: int, num_texts: int) -> tuple[Tensor, Tensor, Tensor]:
    owners = torch.randint(num_images, (num_texts,))
    images = torch.randn(num_images, 12)
    return images, images[owners] + 1.5 * torch.randn(num_texts, 12), owners


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_outcomes_are_the_mean_over_all_orders_of_ties(data: st.DataObject) -> None:
    images = DIRECTIONS[data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))]
    texts = DIRECTIONS[data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))]
    owners = torch.tensor([data.draw(st.integers(0, len(images) - 1)) for _ in texts])
    outcomes = retrieve(images, texts, owners, block_size=data.draw(st.integers(1, 7)))
    for side, queries in zip(sides(outcomes), naive_sides(images, texts, owners), strict=True):
        assert side.rows.tolist() == list(queries)
        for at, (scores, right) in enumerate(queries.values()):
            runs = [naive_values(scores, right, o) for o in permutations(range(len(scores)))]
            expected = {name: mean(run[name] for run in runs) for name in VALUES}
            assert {name: float(getattr(side, name)[at]) for name in VALUES} == pytest.approx(
                expected
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_are_those_of_a_loop(dtype: torch.dtype) -> None:
    images, texts, owners = several_captions(30, 70)  # some images have no text
    assert len(owners.unique()) < 30
    outcomes = retrieve(images.to(dtype), texts.to(dtype), owners)
    metrics = retrieval_metrics(outcomes)
    names = ["image_to_text", "text_to_image"]
    for name, queries in zip(names, naive_sides(images, texts, owners), strict=True):
        rows = [naive_values(s, right, tuple(range(len(s)))) for s, right in queries.values()]
        expected = {
            "r1": mean(row["hit1"] for row in rows),
            "r5": mean(row["hit5"] for row in rows),
            "r10": mean(row["hit10"] for row in rows),
            "recall5": mean(row["recall5"] for row in rows),
            "mean_rank": mean(row["rank"] for row in rows),
            "median_rank": median(row["rank"] for row in rows),
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
        torch.full((num_images, 5), value), torch.full((num_texts, 5), value), owners, block_size=5
    )
    metrics = retrieval_metrics(outcomes)
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
    whole = retrieve(images, texts, owners, block_size=1000)
    blocks = retrieve(images, texts, owners, block_size=block_size)
    for one, other in zip(sides(whole), sides(blocks), strict=True):
        for name in ("rows", "groups", "tied", *VALUES):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_order_of_rows_changes_nothing() -> None:
    images, texts, owners = several_captions(25, 60)
    texts[7] = texts[8]  # a tie
    image_order, text_order = torch.randperm(25), torch.randperm(60)
    moved = image_order.argsort()[owners[text_order]]
    shuffled = retrieve(images[image_order], texts[text_order], moved)
    assert retrieval_metrics(shuffled) == pytest.approx(
        retrieval_metrics(retrieve(images, texts, owners)), abs=1e-12
    )


def test_an_image_without_text_is_a_candidate_and_no_query() -> None:
    images = torch.eye(3)
    outcomes = retrieve(images, torch.tensor([[0.9, 1.0, 0.0]]), torch.tensor([0]))
    assert outcomes.image_to_text.rows.tolist() == [0]
    assert outcomes.text_to_image.rank.tolist() == [2.0]
    assert outcomes.text_to_image.num_candidates == 3


def test_right_answers_within_the_tolerance_share_the_first_place() -> None:
    nearness = torch.tensor([0.5, 0.5 + 4e-7, 0.5 + 2e-7], dtype=torch.float64)
    texts = torch.stack([nearness, (1 - nearness**2).sqrt()], dim=1)
    outcomes = retrieve(torch.eye(2).double(), texts, torch.tensor([0, 0, 1])).image_to_text
    assert float(outcomes.hit1[0]) == pytest.approx(2 / 3)
    assert float(outcomes.rank[0]) == pytest.approx(4 / 3)
    assert outcomes.tied[0]


def test_groups_are_the_images() -> None:
    outcomes = retrieve(torch.eye(3), torch.eye(3)[[2, 0, 2]], torch.tensor([2, 0, 2]))
    assert outcomes.image_to_text.groups.tolist() == [0, 2]
    assert outcomes.text_to_image.groups.tolist() == [2, 0, 2]
    assert outcomes.text_to_image.tied.tolist() == [False, False, False]


def test_half_precision_and_any_norm_are_ranked_by_cosine() -> None:
    images, texts, owners = several_captions(20, 40)
    halves = images.bfloat16(), texts.bfloat16()
    scaled = retrieve(
        halves[0] * 8, halves[1] * torch.tensor([[4.0], [0.5]] * 20).bfloat16(), owners
    )
    expected = retrieve(halves[0].double(), halves[1].double(), owners)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = retrieve(*halves, owners)
    assert retrieval_metrics(scaled) == pytest.approx(retrieval_metrics(expected))
    assert retrieval_metrics(inside) == pytest.approx(retrieval_metrics(expected))


def test_every_metric_has_an_interval_around_it() -> None:
    outcomes = retrieve(*several_captions(30, 90))
    intervals = retrieval_intervals(outcomes)
    for name, value in retrieval_metrics(outcomes).items():
        found = intervals.pop(name)
        assert found.low <= value <= found.high
        assert math.isfinite(found.low)
        assert math.isfinite(found.high)
    assert not intervals


@pytest.mark.parametrize(
    ("owners", "message"),
    [([0, 2], "1 of 2 texts belong to none of the 2 images"), ([-1, -1], "2 of 2 texts")],
)
def test_a_text_without_its_image_is_refused(owners: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        retrieve(torch.eye(2), torch.eye(2), torch.tensor(owners))


@pytest.mark.parametrize("side", ["image", "text"])
def test_embeddings_that_are_not_finite_are_refused(side: str) -> None:
    image, text = torch.eye(2), torch.eye(2)
    {"image": image, "text": text}[side][1] = torch.inf
    with pytest.raises(UserError, match=f"1 of 2 rows of the {side} embeddings"):
        retrieve(image, text, torch.tensor([0, 1]))


def test_nothing_to_retrieve_has_no_mean() -> None:
    outcomes = retrieve(torch.eye(2), torch.ones(0, 2), torch.zeros(0, dtype=torch.int64))
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
