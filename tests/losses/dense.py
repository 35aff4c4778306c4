"""The losses over the whole matrix of logits, as their papers write them: what tiles must equal."""

import torch
from torch.nn import functional as F


def duplicate_columns(rows, columns, offset):
    """Mark the columns (b, N + E) that repeat a row's caption or picture, its own left out."""
    same = rows.caption[:, None] == columns.caption[None]
    same[:, : len(columns.image)] |= rows.image[:, None] == columns.image[None]
    own = torch.arange(len(rows.caption))
    same[own, own + offset] = False
    return same


def info_nce(rows, columns, *, offset, scale, repeated=None, positive=False, smoothing=0.0):
    logits = scale * rows @ columns.T
    own = torch.arange(len(rows)) + offset
    target = F.one_hot(own, len(columns)).to(logits.dtype)
    candidates = torch.ones_like(target)
    if repeated is not None and positive:
        target = (target + repeated) / (1 + repeated.sum(1, keepdim=True))
    elif repeated is not None:
        candidates = candidates.masked_fill(repeated, 0.0)
        logits = logits.masked_fill(repeated, torch.finfo(logits.dtype).min)
    target = (1 - smoothing) * target + smoothing * candidates / candidates.sum(1, keepdim=True)
    log_probability = F.log_softmax(logits, dim=1).masked_fill(candidates == 0, 0.0)
    return -(target * log_probability).sum(1).mean()


def siglip(rows, columns, *, offset, scale, bias, repeated=None, positive=False):
    logits = scale * rows @ columns.T + bias
    own = torch.arange(len(rows))
    is_positive = torch.zeros_like(logits, dtype=torch.bool)
    is_positive[own, own + offset] = True
    if repeated is not None and positive:
        is_positive |= repeated
    terms = F.logsigmoid(torch.where(is_positive, logits, -logits))
    if repeated is not None and not positive:
        terms = terms.masked_fill(repeated, 0.0)
    return -terms.sum() / len(rows)
