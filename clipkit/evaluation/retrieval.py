"""Retrieval in both directions, with any number of captions an image.

R@k is the field's: at least one right answer among the first k. The share of the right answers
among the first k, which other fields call recall, is `recall5`. Everything is cosine similarity;
ties are shared fairly (see `ties`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.evaluation.statistics import Interval, interval, mean_interval, median_interval


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryOutcomes:
    """What became of the R queries of one direction that have a right answer; on the CPU."""

    rows: Tensor  # (R,) int64, the row of each query in the embeddings given
    groups: Tensor  # (R,) int64, its image: captions of one image are not independent
    hit1: Tensor  # (R,) float64, chance that a right answer is the first
    hit5: Tensor  # (R,) float64
    hit10: Tensor  # (R,) float64
    recall5: Tensor  # (R,) float64, expected share of the right answers among the first 5
    rank: Tensor  # (R,) float64, expected rank of the best right answer, from 1
    tied: Tensor  # (R,) bool, the best right answer is tied with a wrong one
    num_candidates: int


@dataclass(frozen=True, eq=False, kw_only=True)
class RetrievalOutcomes:
    """Both directions: a query image finds its texts, a query text finds its image."""

    image_to_text: QueryOutcomes
    text_to_image: QueryOutcomes


class BatchAccuracy(NamedTuple):
    """Share of the batch whose nearest candidate is right; 0-dim float32 on the batch's device."""

    image_to_text: Tensor
    text_to_image: Tensor


@torch.no_grad()
def retrieve(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_of_text: Tensor,
    *,
    block_size: int | None = None,
) -> RetrievalOutcomes:
    """Ranks all texts for each image and all images for each text.

    An image without a text is no query, but stays a candidate for the texts.

    Args:
        image_embeddings: (N, D)
        text_embeddings: (M, D)
        image_of_text: (M,) int64, the row of each text's image
        block_size: queries at a time; the result does not depend on it.

    Raises:
        UserError: embeddings that are not finite, or a text whose image is not there.
    """
    images = ties.unit(image_embeddings, "image")
    texts = ties.unit(text_embeddings, "text")
    if image_of_text.shape != (len(texts),):
        raise ValueError(
            f"image_of_text is {tuple(image_of_text.shape)} for {len(texts)} texts; "
            "one row of the images a text is needed"
        )
    outside = int(((image_of_text < 0) | (image_of_text >= len(images))).sum())
    if outside:
        raise UserError(
            f"{outside} of {len(texts)} texts belong to none of the {len(images)} images"
        )
    owners = image_of_text.long().to(images.device)
    by_image = owners.argsort(stable=True)
    all_texts = torch.arange(len(texts), device=images.device)
    return RetrievalOutcomes(
        image_to_text=_rank(images, texts, owners[by_image], by_image, None, block_size),
        text_to_image=_rank(texts, images, all_texts, owners, owners, block_size),
    )


def retrieval_metrics(outcomes: RetrievalOutcomes) -> dict[str, float]:
    """Returns r1, r5, r10, recall5, mean_rank and median_rank, named by direction in front.

    The median is that of the expected ranks, the mean of the middle two where their number is even.
    """
    metrics = {}
    for direction, of in _directions(outcomes):
        metrics[f"{direction}_r1"] = float(of.hit1.mean())
        metrics[f"{direction}_r5"] = float(of.hit5.mean())
        metrics[f"{direction}_r10"] = float(of.hit10.mean())
        metrics[f"{direction}_recall5"] = float(of.recall5.mean())
        metrics[f"{direction}_mean_rank"] = float(of.rank.mean())
        middle = of.rank.sort().values[[(len(of.rank) - 1) // 2, len(of.rank) // 2]]
        metrics[f"{direction}_median_rank"] = float(middle.mean())
    return metrics


def retrieval_intervals(outcomes: RetrievalOutcomes) -> dict[str, Interval]:
    """Returns the 95 % interval of each of `retrieval_metrics`, clustered by image."""
    intervals = {}
    for direction, of in _directions(outcomes):
        bounds = (1.0, float(of.num_candidates))
        intervals[f"{direction}_r1"] = interval(of.hit1, of.groups)
        intervals[f"{direction}_r5"] = interval(of.hit5, of.groups)
        intervals[f"{direction}_r10"] = interval(of.hit10, of.groups)
        intervals[f"{direction}_recall5"] = interval(of.recall5, of.groups)
        intervals[f"{direction}_mean_rank"] = mean_interval(of.rank, of.groups, bounds=bounds)
        intervals[f"{direction}_median_rank"] = median_interval(of.rank, of.groups, bounds=bounds)
    return intervals


@torch.no_grad()
def batch_accuracy(
    image: Tensor,
    text: Tensor,
    *,
    all_image: Tensor | None = None,
    all_text: Tensor | None = None,
    offset: int = 0,
    caption_ids: Tensor | None = None,
    image_ids: Tensor | None = None,
    all_caption_ids: Tensor | None = None,
    all_image_ids: Tensor | None = None,
    block_size: int | None = None,
) -> BatchAccuracy:
    """Share of rows whose nearest candidate in the batch is their pair or a duplicate of it.

    A duplicate has an equal caption id or an equal image id. Made for every training step: nothing
    waits for the device, and embeddings that are not finite give NaN instead of an error.

    Args:
        image: (b, D)
        text: (b, D)
        all_image: (N, D), all candidates; the rows themselves by default
        all_text: (N + E, D), with E extra texts that are nobody's pair
        offset: the candidate that is the pair of row 0
        caption_ids: (b,), as the losses take them
        image_ids: (b,)
        all_caption_ids: (N + E,); those of the rows by default
        all_image_ids: (N,); those of the rows by default
        block_size: rows at a time.
    """
    all_image = image if all_image is None else all_image
    all_text = text if all_text is None else all_text
    all_caption_ids = caption_ids if all_caption_ids is None else all_caption_ids
    all_image_ids = image_ids if all_image_ids is None else all_image_ids
    num_pairs = len(all_image)

    def share(queries: Tensor, candidates: Tensor) -> Tensor:
        num_right = queries.new_zeros((), dtype=torch.float32)
        columns = torch.arange(len(candidates), device=queries.device)
        for start, scores in ties.score_blocks(
            ties.normalise(queries), ties.normalise(candidates), block_size
        ):
            rows = torch.arange(start, start + len(scores), device=queries.device)
            right = columns == (rows + offset).unsqueeze(1)
            if caption_ids is not None and all_caption_ids is not None:
                right |= caption_ids[rows].unsqueeze(1) == all_caption_ids[: len(candidates)]
            if image_ids is not None and all_image_ids is not None:
                equal = image_ids[rows].unsqueeze(1) == all_image_ids
                right[:, :num_pairs] |= equal
            num_right += _first_share(scores, right).sum()
        return num_right / len(queries)

    return BatchAccuracy(share(image, all_text), share(text, all_image))


def _first_share(scores: Tensor, right: Tensor) -> Tensor:
    """Returns the chance (R,) that the first of scores (R, C) is right (R, C), NaN for NaN."""
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1)
    at = ties.places(scores, best)
    num_right = (right & (scores >= ties.lowest_tied(best).unsqueeze(1))).sum(dim=1)
    share = num_right / at.tied  # 0 / 0 where a score is NaN
    return torch.where(at.greater == 0, share, 0.0).float()


def _rank(
    queries: Tensor,
    candidates: Tensor,
    query_of_pair: Tensor,
    candidate_of_pair: Tensor,
    groups: Tensor | None,
    block_size: int | None,
) -> QueryOutcomes:
    """Ranks the candidates for each query; the pairs (P,) that are right come sorted by query."""
    score, at = _pair_places(queries, candidates, query_of_pair, candidate_of_pair, block_size)
    rows, query, counts = torch.unique_consecutive(
        query_of_pair.cpu(), return_inverse=True, return_counts=True
    )
    best = score.new_full(rows.shape, -torch.inf).scatter_reduce(0, query, score, "amax")
    is_best = score == best[query]  # equal scores of one row have equal places
    none = torch.zeros_like(rows)
    best_at = ties.Places(
        none.scatter_reduce(0, query, at.greater * is_best, "amax"),
        none.scatter_reduce(0, query, at.tied * is_best, "amax"),
    )
    tied_right = torch.bincount(query[score >= ties.lowest_tied(best)[query]], minlength=len(rows))
    found = torch.bincount(query, ties.share_within(5, at), len(rows))
    return QueryOutcomes(
        rows=rows,
        groups=rows if groups is None else groups.cpu()[rows],
        hit1=ties.hit_within(1, best_at, tied_right),
        hit5=ties.hit_within(5, best_at, tied_right),
        hit10=ties.hit_within(10, best_at, tied_right),
        recall5=found / counts,
        rank=ties.best_rank(best_at, tied_right),
        tied=best_at.tied > tied_right,
        num_candidates=len(candidates),
    )


def _pair_places(
    queries: Tensor,
    candidates: Tensor,
    query_of_pair: Tensor,
    candidate_of_pair: Tensor,
    block_size: int | None,
) -> tuple[Tensor, ties.Places]:
    """Returns the score (P,) and the places of each right pair, on the CPU."""
    num_pairs = torch.bincount(query_of_pair, minlength=len(queries)).cpu()
    ends = num_pairs.cumsum(0).tolist()
    scores_found, greater, tied = [], [], []
    for start, scores in ties.score_blocks(queries, candidates, block_size):
        first = ends[start - 1] if start else 0
        last = ends[start + len(scores) - 1]
        # Captions share the row of their image: as many pairs at a time as the block has rows keeps
        # the copy of their rows no larger than the block.
        for pair in range(first, last, len(scores)):
            pairs = slice(pair, min(pair + len(scores), last))
            row = query_of_pair[pairs] - start
            positives = scores[row, candidate_of_pair[pairs]]
            at = ties.places(scores[row], positives)
            scores_found.append(positives.cpu())
            greater.append(at.greater.cpu())
            tied.append(at.tied.cpu())
    if not scores_found:
        nothing = torch.zeros(0, dtype=torch.int64)
        return torch.zeros(0, dtype=queries.dtype), ties.Places(nothing, nothing)
    return torch.cat(scores_found), ties.Places(torch.cat(greater), torch.cat(tied))


def _directions(outcomes: RetrievalOutcomes) -> list[tuple[str, QueryOutcomes]]:
    if not len(outcomes.image_to_text.rows):
        raise ValueError("there is no row to average over")
    return [
        ("image_to_text", outcomes.image_to_text),
        ("text_to_image", outcomes.text_to_image),
    ]
