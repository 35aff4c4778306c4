"""Compositionality: captions, or pictures, that differ in how the same things are put together.

Winoground (https://arxiv.org/abs/2204.03162) has two images and two captions of the same words an
example, SugarCrepe (https://arxiv.org/abs/2306.14610) one image, its caption and a changed one. A
comparison lost or won by nothing decides these scores: ties are shared fairly (see `ties`), and the
papers' strict values stand beside them. Each image and text is embedded once and named by its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.evaluation.metric import Metric
from clipkit.evaluation.retrieval import connected
from clipkit.evaluation.statistics import interval

# Numbers held at a time: 16 MB in float32.
_BLOCK_NUMBERS = 2**22


@dataclass(frozen=True, eq=False, kw_only=True)
class WinogroundOutcomes:
    """What became of each of R examples; on the CPU."""

    groups: Tensor  # (R,) int64, examples that share an image are one group
    text: Tensor  # (R,) float64, chance that each image finds its caption
    image: Tensor  # (R,) float64, chance that each caption finds its image
    group: Tensor  # (R,) float64, chance of both
    strict_text: Tensor  # (R,) bool, by more than the tolerance of ties, as in the paper
    strict_image: Tensor  # (R,) bool
    strict_group: Tensor  # (R,) bool
    tied: Tensor  # (R,) bool, no comparison is lost and a tie decides


@dataclass(frozen=True, eq=False, kw_only=True)
class SugarCrepeOutcomes:
    """What became of each of R examples; on the CPU."""

    groups: Tensor  # (R,) int64, the row of its image: examples of one image are not independent
    accuracy: Tensor  # (R,) float64, 1 where the caption beats the changed one, 0.5 for a tie
    strict_accuracy: Tensor  # (R,) bool, it wins by more than the tolerance, as in the paper
    tied: Tensor  # (R,) bool


@torch.no_grad()
def winoground(
    image_embeddings: Tensor, text_embeddings: Tensor, images: Tensor, texts: Tensor
) -> WinogroundOutcomes:
    """Compares the two images and two captions of each of R examples; ties in random order.

    The four scores of an example are put in order, tied ones at random: alike, they give a quarter
    for text and for image and a sixth for group, the chances that the paper names.

    Args:
        image_embeddings: (N, D)
        text_embeddings: (M, D)
        images: (R, 2) int64, rows of the images
        texts: (R, 2) int64, rows of their captions, in the same order.

    Raises:
        UserError: embeddings that are not finite, or rows that are not there.
    """
    scores = _scores(image_embeddings, text_embeddings, images, texts)
    own = scores.diagonal(dim1=1, dim2=2)  # (R, 2), the two right scores
    others = scores.flip(2).diagonal(dim1=1, dim2=2)  # (R, 2), each image with the other's caption
    # Of each image the captions are compared, of each caption the images.
    captions, pictures = _compare(own, others), _compare(own, others.flip(1))
    text, image, group = _three_chances(captions, pictures)
    return WinogroundOutcomes(
        groups=_sharing(images),
        text=text,
        image=image,
        group=group,
        strict_text=(captions > 0).all(dim=1),
        strict_image=(pictures > 0).all(dim=1),
        strict_group=((captions > 0) & (pictures > 0)).all(dim=1),
        tied=((text > 0) & (text < 1)) | ((image > 0) & (image < 1)),
    )


def winoground_metrics(outcomes: WinogroundOutcomes) -> dict[str, Metric]:
    """Returns text, image and group, each with its strict value in front, and tie_rate.

    A strict value counts an example only where every comparison is won by more than the tolerance;
    tie_rate is the share of examples whose text or image score a tie decides.
    """
    alike = torch.zeros(1, 2, dtype=torch.int64)
    metrics = {}
    for name, chance in zip(("text", "image", "group"), _three_chances(alike, alike), strict=True):
        metrics[name] = _share(getattr(outcomes, name), outcomes.groups, float(chance))
        strict = getattr(outcomes, f"strict_{name}")
        metrics[f"strict_{name}"] = _share(strict, outcomes.groups, 0.0)
    metrics["tie_rate"] = _share(outcomes.tied, outcomes.groups, None)._replace(best=0.0)
    return metrics


@torch.no_grad()
def sugarcrepe(
    image_embeddings: Tensor, text_embeddings: Tensor, images: Tensor, texts: Tensor
) -> SugarCrepeOutcomes:
    """Compares the caption and the changed caption of each of R images.

    Args:
        image_embeddings: (N, D)
        text_embeddings: (M, D)
        images: (R,) int64, rows of the images
        texts: (R, 2) int64, rows of the right caption and of the changed one.

    Raises:
        UserError: embeddings that are not finite, or rows that are not there.
    """
    if images.ndim != 1:
        raise ValueError(f"images are {tuple(images.shape)}; one row (R,) an example is needed")
    right, changed = _scores(image_embeddings, text_embeddings, images.unsqueeze(1), texts)[:, 0].T
    result = _compare(right, changed)
    return SugarCrepeOutcomes(
        groups=images.long().cpu(),
        accuracy=_expected(result),
        strict_accuracy=result > 0,
        tied=result == 0,
    )


def sugarcrepe_metrics(outcomes: SugarCrepeOutcomes) -> dict[str, Metric]:
    """Returns accuracy, strict_accuracy (only the caption that wins counts) and tie_rate."""
    chance = float(_expected(torch.zeros(1, dtype=torch.int64)))
    return {
        "accuracy": _share(outcomes.accuracy, outcomes.groups, chance),
        "strict_accuracy": _share(outcomes.strict_accuracy, outcomes.groups, 0.0),
        "tie_rate": _share(outcomes.tied, outcomes.groups, None)._replace(best=0.0),
    }


def _scores(
    image_embeddings: Tensor, text_embeddings: Tensor, images: Tensor, texts: Tensor
) -> Tensor:
    """Returns scores (R, I, T) on the CPU, for images (R, I) and texts (R, T) given by their row.

    Sums of products, not a matrix product: few numbers an example, and no setting rounds them.
    """
    image, text = ties.unit(image_embeddings, "image"), ties.unit(text_embeddings, "text")
    images = _rows(images, len(image), "images", len(images)).to(image.device)
    texts = _rows(texts, len(text), "texts", len(images)).to(image.device)
    size = max(1, _BLOCK_NUMBERS // (images.shape[1] * texts.shape[1] * max(1, image.shape[1])))
    found = [
        (image[i].unsqueeze(2) * text[t].unsqueeze(1)).sum(dim=3).cpu()
        for i, t in zip(torch.split(images, size), torch.split(texts, size), strict=True)
    ]
    return torch.cat(found)


def _rows(rows: Tensor, num_rows: int, name: str, num_examples: int) -> Tensor:
    if rows.ndim != 2 or len(rows) != num_examples or rows.shape[1] not in (1, 2):
        raise ValueError(f"{name} are {tuple(rows.shape)} for {num_examples} examples")
    if rows.dtype.is_floating_point or rows.dtype is torch.bool:
        raise ValueError(f"{name} are {rows.dtype}; integer rows are needed")
    outside = int(((rows < 0) | (rows >= num_rows)).any(dim=1).sum())
    if outside:
        raise UserError(
            f"{outside} of {num_examples} examples name {name} outside the {num_rows} embeddings"
        )
    return rows.long()


def _compare(right: Tensor, wrong: Tensor) -> Tensor:
    """Returns 1 where the right score wins, 0 where the two are tied, -1 where it loses; int64."""
    wins, loses = right > wrong + ties.TIE_TOLERANCE, right < ties.lowest_tied(wrong)
    return wins.long() - loses.long()


def _expected(result: Tensor) -> Tensor:
    return (result.double() + 1) / 2


def _three_chances(captions: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the chances (R,) of text, image and group, from the results (R, 2) of each."""
    won = torch.ones_like(captions)
    return (
        _chance(torch.cat([captions, won], dim=1)),
        _chance(torch.cat([won, pictures], dim=1)),
        _chance(torch.cat([captions, pictures], dim=1)),
    )


def _chance(results: Tensor) -> Tensor:
    """Returns the chance (R,) float64 that all four comparisons (R, 4) are won.

    Those that are tied are decided by one random order of the four scores: the same score wins or
    loses in both of its comparisons.
    """
    pattern = ((results == 0) * torch.tensor([1, 2, 4, 8])).sum(dim=1)
    return torch.where((results >= 0).all(dim=1), _SHARE_OF_ORDERS[pattern], 0.0)


def _share_of_orders(pattern: int) -> float:
    orders = list(permutations(range(4)))
    won = 0
    for first, second, other, another in orders:
        # In the order of `_chance`: both images between captions, both captions between images.
        beaten = (first > other, second > another, first > another, second > other)
        won += all(beaten[which] for which in range(4) if pattern >> which & 1)
    return won / len(orders)


_SHARE_OF_ORDERS = torch.tensor([_share_of_orders(p) for p in range(16)], dtype=torch.float64)


def _sharing(images: Tensor) -> Tensor:
    """Returns the group (R,) of each example: those that share an image, in a chain too, are one.

    Args:
        images: (R, 2), rows of the images.
    """
    images = images.cpu().long()
    examples = torch.arange(len(images)).unsqueeze(1).expand_as(images)
    pairs = torch.stack([images.flatten(), examples.flatten()], dim=1)
    return connected(pairs, int(images.max()) + 1 if len(images) else 0, len(images))[1]


def _share(values: Tensor, groups: Tensor, chance: float | None) -> Metric:
    if not len(values):
        raise ValueError("there is no row to average over")
    values = values.double()
    return Metric(float(values.mean()), interval(values, groups), len(torch.unique(groups)), chance)
