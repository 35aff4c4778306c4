"""The gradient of a batch as one process has it, written as the papers write it.

Everything at once and in full: no ranks, no micro-batches, captions padded to the context, the
whole matrix of logits. It shares no code with what it is to verify.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipkit.check.everyone import alone
from clipkit.data.samples import PairBatch
from clipkit.errors import UserError
from clipkit.losses import Ids, InfoNCELoss, SigLIPLoss
from clipkit.module import CLIPModule


def joined(shares: list[PairBatch], module: CLIPModule) -> PairBatch:
    """Return the ranks' shares as one batch, on the module's device, padded to the context."""
    contract = module.tokenizer.contract

    def column(name: str) -> Tensor:
        return torch.cat([one[name] for one in shares]).to(module.device)  # type: ignore[literal-required]

    def tokens(name: str) -> Tensor:
        padded = [
            F.pad(some, (0, contract.context_length - some.shape[1]), value=contract.pad_id)
            for some in (one[name] for one in shares)  # type: ignore[literal-required]
        ]
        return torch.cat(padded).to(module.device)

    batch = PairBatch(
        images=column("images"),
        tokens=tokens("tokens"),
        caption_ids=column("caption_ids"),
        image_ids=column("image_ids"),
        rows=column("rows"),
        truncated=column("truncated"),
    )
    if "negatives" in shares[0]:
        batch["negatives"], batch["negative_ids"] = tokens("negatives"), column("negative_ids")
    return batch


def gradients(module: CLIPModule, batch: PairBatch) -> dict[str, Tensor]:
    """Return the gradient of the batch's loss for every trained parameter, zeros where none.

    Raises:
        UserError: a loss of the user's own needs other ranks.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with alone(), torch.enable_grad():
        # Not `backward`, which would tell DDP that a step is made.
        found = torch.autograd.grad(
            _loss(module, batch), list(trained.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(trained, found, strict=True))


def _loss(module: CLIPModule, batch: PairBatch) -> Tensor:
    pixels = batch["images"]
    if not pixels.is_floating_point():
        pixels = pixels.to(module.scale.dtype) / 255
    image = _unit(module.image_head(module.image_encoder(pixels)))
    tokens, captions = batch["tokens"], batch["caption_ids"]
    if "negatives" in batch:
        tokens = torch.cat([tokens, batch["negatives"]])
        captions = torch.cat([captions, batch["negative_ids"]])
    text = _unit(module.text_head(module.text_encoder(tokens)))  # (B + E, D)
    scale, bias = module.temperature.scale, module.temperature.bias
    ids = Ids(captions, batch["image_ids"])
    # A class derived from these is the user's own.
    if type(module.loss) is InfoNCELoss:
        return info_nce(image, text, scale, ids, module.loss)
    if type(module.loss) is SigLIPLoss:
        return siglip(image, text, scale, bias, ids, module.loss)
    try:
        rows = Ids(batch["caption_ids"], batch["image_ids"])
        own: Tensor = module.loss(
            image,
            text[: len(image)],
            image,
            text,
            offset=0,
            scale=scale,
            bias=bias,
            ids=rows,
            all_ids=ids,
        ).loss
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"model.loss: {type(module.loss).__name__} does not run in one process, to which all "
            f"ranks would be compared ({error})"
        ) from error
    return own


def info_nce(image: Tensor, text: Tensor, scale: Tensor, ids: Ids, loss: InfoNCELoss) -> Tensor:
    """Return the mean of both cross-entropies over the whole matrix of logits (B, B + E)."""
    logits = scale * image @ text.T
    repeated = _repeated(ids) if loss.duplicates != "negative" else torch.zeros_like(logits).bool()
    own = torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)

    def asked(logits: Tensor, repeated: Tensor, own: Tensor) -> Tensor:
        if loss.duplicates == "positive":
            candidate, target = torch.ones_like(repeated), own + repeated
        else:
            candidate, target = ~repeated, own
        even = candidate.to(logits.dtype) / candidate.sum(1, keepdim=True)
        target = target / target.sum(1, keepdim=True)
        target = (1 - loss.label_smoothing) * target + loss.label_smoothing * even
        log_probability = logits.masked_fill(~candidate, -torch.inf).log_softmax(1)
        found: Tensor = (target * log_probability.masked_fill(~candidate, 0)).sum(1).mean()
        return -found

    # A caption asks as a picture does; those that are nobody's ask for nobody.
    pairs = len(logits)
    back = (part[:, :pairs].T for part in (logits, repeated, own))
    return (asked(logits, repeated, own) + asked(*back)) / 2


def siglip(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Ids, loss: SigLIPLoss
) -> Tensor:
    """Return the sum of all binary questions (B, B + E) over B."""
    logits = scale * image @ text.T + (0 if bias is None else bias)
    repeated = _repeated(ids) if loss.duplicates != "negative" else torch.zeros_like(logits).bool()
    positive = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    if loss.duplicates == "positive":
        positive, asked = positive | repeated, torch.ones_like(repeated)
    else:
        asked = ~repeated
    questions = F.logsigmoid(torch.where(positive, logits, -logits))
    total: Tensor = questions.masked_fill(~asked, 0).sum()
    return -total / len(logits)


def _repeated(ids: Ids) -> Tensor:
    """Mark where a column (B + E) has the caption or picture of a row (B), but for its own."""
    pairs = len(ids.image)
    same = ids.caption[:pairs, None] == ids.caption
    same[:, :pairs] |= ids.image[:, None] == ids.image
    itself = torch.eye(*same.shape, dtype=torch.bool, device=same.device)
    return same.masked_fill(itself, False)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(dim=1, keepdim=True).sqrt()
