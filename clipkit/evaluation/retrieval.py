"""Retrieval in both directions, with any number of captions an image and of images a caption.

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
from clipkit.evaluation.metric import Metric
from clipkit.evaluation.statistics import interval, mean_interval, median_interval


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryOutcomes:
    """What became of the R queries of one direction that have a right answer; on the CPU."""

    rows: Tensor  # (R,) int64, the row of each query in the embeddings given
    groups: Tensor  # (R,) int64, rows of one group are not independent (see `connected`)
    num_right: Tensor  # (R,) int64, how many right answers it has
    hit1: Tensor  # (R,) float64, chance that a right answer is the first
    hit5: Tensor  # (R,) float64
    hit10: Tensor  # (R,) float64
    recall5: Tensor  # (R,) float64, expected share of the right answers among the first 5
    rank: Tensor  # (R,) float64, expected rank of the best right answer, from 1
    strict_hit1: Tensor  # (R,) bool, a right answer beats every wrong one
    tied: Tensor  # (R,) bool, the best right answer is tied with a wrong one
    num_candidates: int


@dataclass(frozen=True, eq=False, kw_only=True)
class RetrievalOutcomes:
    """Both directions: a query image finds its texts, a query text finds its images."""

    image_to_text: QueryOutcomes
    text_to_image: QueryOutcomes


class BatchAccuracy(NamedTuple):
    """Share of the batch whose nearest candidate is right; 0-dim float32 on the batch's device."""

    image_to_text: Tensor
    text_to_image: Tensor


def pairs_of(image_of_text: Tensor) -> Tensor:
    """Returns the pairs (M, 2) of captions that have one image each: its row (M,)."""
    return torch.stack([image_of_text, torch.arange(len(image_of_text)).to(image_of_text)], dim=1)


@torch.no_grad()
def retrieve(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    pairs: Tensor,
    *,
    block_size: int | None = None,
) -> RetrievalOutcomes:
    """Ranks all texts for each image and all images for each text.

    An image without a text, or a text without an image, is no query, but stays a candidate.

    Args:
        image_embeddings: (N, D)
        text_embeddings: (M, D)
        pairs: (P, 2) int64, rows of an image and a text that belong together, in any order; a pair
            given twice counts once. `pairs_of` makes them where each text has one image.
        block_size: queries at a time; the result does not depend on it.

    Raises:
        UserError: embeddings that are not finite, or a pair of what is not there.
    """
    images = ties.unit(image_embeddings, "image")
    texts = ties.unit(text_embeddings, "text")
    pairs = torch.unique(_checked(pairs, len(images), len(texts)).cpu(), dim=0)
    of_image, of_text = connected(pairs, len(images), len(texts))
    image, text = pairs.T
    by_text = text.argsort(stable=True)
    return RetrievalOutcomes(
        image_to_text=_rank(images, texts, image, text, of_image, block_size),
        text_to_image=_rank(texts, images, text[by_text], image[by_text], of_text, block_size),
    )


def connected(pairs: Tensor, num_images: int, num_texts: int) -> tuple[Tensor, Tensor]:
    """Returns the group of each image (N,) and of each text (M,): what chains of pairs connect.

    With one image a caption a group is an image with its captions, numbered by the image. Where
    captions have several images too, all that shares one falls together, so the groups stay
    independent of each other, and a relation that connects everything is a single group: one
    observation, whose interval is everything. A group bears the number of its lowest image; texts
    without an image are numbered after the images.

    Args:
        pairs: (P, 2) int64, rows of an image and a text
        num_images: N
        num_texts: M
    """
    image, text = pairs.cpu().T
    text = text + num_images
    group = torch.arange(num_images + num_texts)
    while not torch.equal(group[image], group[text]):
        # Of each pair the higher group joins the lower one, whole, and follows it to its end.
        one, other = group[image], group[text]
        group = group.scatter_reduce(
            0, torch.maximum(one, other), torch.minimum(one, other), "amin"
        )
        while not torch.equal(group[group], group):
            group = group[group]
    of_image, of_text = torch.split(group, [num_images, num_texts])
    return of_image, of_text


def retrieval_metrics(outcomes: RetrievalOutcomes) -> dict[str, Metric]:
    """Returns r1, r5, r10, recall5, mean_rank, median_rank, strict_r1 and tie_rate.

    Each is named by its direction in front. The median is that of the expected ranks, the mean of
    the middle two where their number is even. In strict_r1 a right answer must beat every wrong
    one; tie_rate is the share of queries whose best right answer is tied with a wrong one. The
    intervals are clustered by the groups.
    """
    if not len(outcomes.image_to_text.rows):
        raise ValueError("there is no row to average over")
    return {
        f"{direction}_{name}": metric
        for direction, of in [
            ("image_to_text", outcomes.image_to_text),
            ("text_to_image", outcomes.text_to_image),
        ]
        for name, metric in _query_metrics(of).items()
    }


def _query_metrics(of: QueryOutcomes) -> dict[str, Metric]:
    n = len(torch.unique(of.groups))
    everything = torch.full_like(of.num_right, of.num_candidates)
    alike = ties.Places(torch.zeros_like(everything), everything)
    bounds = (1.0, float(of.num_candidates))

    def share(values: Tensor, chance: Tensor) -> Metric:
        values = values.double()
        mean = float(values.mean())
        return Metric(mean, interval(values, of.groups), n, float(chance.double().mean()))

    metrics = {
        f"r{k}": share(hit, ties.hit_within(k, alike, of.num_right))
        for k, hit in ((1, of.hit1), (5, of.hit5), (10, of.hit10))
    }
    most = float((5 / of.num_right.double()).clamp(max=1.0).mean())
    metrics["recall5"] = share(of.recall5, ties.share_within(5, alike))._replace(best=most)
    rank = ties.best_rank(alike, of.num_right)
    metrics["mean_rank"] = Metric(
        float(of.rank.mean()),
        mean_interval(of.rank, of.groups, bounds=bounds),
        n,
        float(rank.mean()),
    )
    metrics["median_rank"] = Metric(
        _median(of.rank), median_interval(of.rank, of.groups, bounds=bounds), n, _median(rank)
    )
    metrics["strict_r1"] = share(of.strict_hit1, alike.tied == of.num_right)
    metrics["tie_rate"] = share(of.tied, of.tied)._replace(chance=None, best=0.0)
    return metrics


def _median(values: Tensor) -> float:
    return float(values.sort().values[[(len(values) - 1) // 2, len(values) // 2]].mean())


def _checked(pairs: Tensor, num_images: int, num_texts: int) -> Tensor:
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs are {tuple(pairs.shape)}; they must be (P, 2): image, text")
    if pairs.dtype.is_floating_point or pairs.dtype is torch.bool:
        raise ValueError(f"pairs are {pairs.dtype}; integer rows are needed")
    ends = torch.tensor([num_images, num_texts], device=pairs.device)
    outside = int(((pairs < 0) | (pairs >= ends)).any(dim=1).sum())
    if outside:
        raise UserError(
            f"{outside} of {len(pairs)} pairs name an image or a text outside the "
            f"{num_images} images and {num_texts} texts"
        )
    return pairs.long()


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
    groups: Tensor,
    block_size: int | None,
) -> QueryOutcomes:
    """Ranks the candidates for each query; the pairs (P,) that are right come sorted by query."""
    score, at = _pair_places(queries, candidates, query_of_pair, candidate_of_pair, block_size)
    rows, query, counts = torch.unique_consecutive(
        query_of_pair, return_inverse=True, return_counts=True
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
        groups=groups[rows],
        num_right=counts,
        hit1=ties.hit_within(1, best_at, tied_right),
        hit5=ties.hit_within(5, best_at, tied_right),
        hit10=ties.hit_within(10, best_at, tied_right),
        recall5=found / counts,
        rank=ties.best_rank(best_at, tied_right),
        strict_hit1=(best_at.greater == 0) & (best_at.tied == tied_right),
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
    num_pairs = torch.bincount(query_of_pair, minlength=len(queries))
    ends = num_pairs.cumsum(0).tolist()
    # Filled in place: small tensors kept between the large ones of each block hold on to freed
    # memory, two gigabytes at 4,000 images and 20,000 texts.
    score = torch.empty(len(query_of_pair), dtype=queries.dtype)
    greater, tied = torch.empty_like(query_of_pair), torch.empty_like(query_of_pair)
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
            score[pairs], greater[pairs], tied[pairs] = positives, at.greater, at.tied
    return score, ties.Places(greater, tied)
