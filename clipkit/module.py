"""CLIPModule: two towers, a temperature, a loss and an optimiser, joined for Lightning."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipkit import checkpoint as checkpoints
from clipkit.compiling import Tower, compiled_image_tower, compiled_text_tower
from clipkit.data.images import decode_image, resize_for_eval, to_uint8
from clipkit.data.samples import PairBatch
from clipkit.distributed import gather, gather_ragged, least, rank
from clipkit.encoders import ImageEncoder, TextEncoder
from clipkit.encoders.base import PackingTextEncoder
from clipkit.encoders.locking import lock
from clipkit.encoders.packing import Packed, places_of
from clipkit.errors import UserError
from clipkit.evaluation.retrieval import batch_accuracy
from clipkit.heads import Head
from clipkit.losses import ContrastiveLoss, Ids, InfoNCELoss, SigLIPLoss
from clipkit.optim import OptimizerFactory, ScheduleFactory, fuse, parameter_groups
from clipkit.pieces import Span, counting_norms, embed_pieces, number_of_pieces, spans_of
from clipkit.ranges import check_number, check_whole
from clipkit.resume import Position, epochs_done, seed_step, settle
from clipkit.temperature import Temperature
from clipkit.tokenizer import TextContract, Tokenizer

log = logging.getLogger(__name__)

# How many tokens cost as much as calling the text tower once more. On a CPU measured, by
# benchmarks/text_lengths.py; on a GPU assumed.
_GROUP_OVERHEAD = {"cpu": 64}
_GPU_GROUP_OVERHEAD = 4096

_NEVER = torch.iinfo(torch.int64).max  # later than any step

VALIDATION_BLOCK = 256
"""Pairs per block of ``val/loss``: fixed, so that runs of different batch sizes compare."""


class Embeddings(NamedTuple):
    """Unit-norm embeddings of a batch."""

    image: Tensor  # (b, D)
    text: Tensor  # (b + e, D), the captions that are negatives only behind those of the pairs


class CaptionGroups(NamedTuple):
    """How the captions of a batch are embedded: in this order, or in their own, cut into spans."""

    order: Tensor | None  # (b,)
    spans: list[Span]
    packed: bool = False  # without any padding


class TextEncoderFactory(Protocol):
    """What makes a text encoder: it needs the tokenizer's contract."""

    def __call__(self, contract: TextContract) -> TextEncoder:
        """Return the encoder."""


class HeadFactory(Protocol):
    """What makes a head: it needs both widths."""

    def __call__(self, in_dim: int, out_dim: int) -> Head:
        """Return the head."""


class CLIPModule(L.LightningModule):
    """Contrastive language-image pre-training (https://arxiv.org/abs/2103.00020).

    Args:
        image_encoder: pixels in [0, 1] to features.
        text_encoder: what makes the text encoder from the tokenizer's contract.
        tokenizer: captions to tokens.
        image_head: what makes the projection of image features to the joint space.
        text_head: what makes the projection of text features to the joint space.
        temperature: scale and bias of the logits.
        loss: over a batch of embeddings.
        optimizer: what makes the optimiser from parameter groups.
        schedule: what makes the schedule from the optimiser and the number of steps.
        embed_dim: width D of the joint space.
        image_lr: rate of the image tower (encoder and head), if not the optimiser's.
        text_lr: rate of the text tower (encoder and head), if not the optimiser's.
        lock_image: freeze the image encoder but for its top n blocks (0: all of it), as in LiT
            (https://arxiv.org/abs/2111.07991); its head stays trainable.
        lock_text: freeze the text encoder but for its top n blocks.
        micro_batch: pairs that a device holds at a time. Loss and gradient are those of the whole
            batch, with all its negatives; each tower runs forward twice.
        compile: train the towers through `torch.compile`. Evaluation runs them as they are.
    """

    configuration: dict[str, Any] | None = None
    """The parsed configuration that built this module; it travels in the checkpoint."""

    def __init__(
        self,
        *,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoderFactory,
        tokenizer: Tokenizer,
        image_head: HeadFactory,
        text_head: HeadFactory,
        temperature: Temperature,
        loss: ContrastiveLoss,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        embed_dim: int = 512,
        image_lr: float | None = None,
        text_lr: float | None = None,
        lock_image: int | None = None,
        lock_text: int | None = None,
        micro_batch: int | None = None,
        compile: bool = False,
    ) -> None:
        check_whole("model.embed_dim", embed_dim)
        for key, rate in (("image_lr", image_lr), ("text_lr", text_lr)):
            if rate is not None:
                check_number(f"model.{key}", rate, least=0, most=1000)
        super().__init__()
        self.tokenizer = tokenizer
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder(tokenizer.contract)
        self.image_head = image_head(image_encoder.feature_dim, embed_dim)
        self.text_head = text_head(self.text_encoder.feature_dim, embed_dim)
        self.temperature = temperature
        self.loss = loss
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        if micro_batch is not None and micro_batch < 1:
            raise UserError(f"model.micro_batch: {micro_batch} is not a positive number of pairs")
        self.micro_batch = micro_batch
        self.compiles = compile
        self._compiled: dict[str, Tower] = {}
        self.embed_dim = embed_dim
        self.learning_rates = {"image": image_lr, "text": text_lr}
        if isinstance(loss, SigLIPLoss) and temperature.bias is None:
            log.warning(
                "warning: model.loss: SigLIPLoss wants a bias; add --model.temperature.bias prior "
                "--model.temperature.init 0.1, as ablations/siglip does"
            )
        if lock_image is not None:
            lock(self.image_encoder, lock_image)
        if lock_text is not None:
            lock(self.text_encoder, lock_text)
        self._validation: list[dict[str, Tensor]] = []
        self._first_bad_step = torch.tensor(_NEVER)
        self._warned_of_no_learning = False
        self._reported_truncation = False
        self._seed = 0

    # --- The public verbs --------------------------------------------------------------------

    @property
    def scale(self) -> Tensor:
        """exp(log_scale), a 0-D tensor: what multiplies the cosines."""
        return self.temperature.scale

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed pictures: uint8, or float in [0, 1], (B, 3, H, W) to (B, D) of unit norm."""
        if not images.is_floating_point():
            images = images.to(self.scale.dtype) / 255
        return _normalize(self.image_head(self._tower("image")(images)))

    def encode_text(self, tokens: Tensor, packed: Packed | None = None) -> Tensor:
        """Embed tokens: (B, L) int64 to (B, D) of unit norm.

        With `packed`, the real tokens alone, for a tower that takes them (`PackingTextEncoder`).
        """
        if packed is not None:
            return _normalize(self.text_head(self._tower("text")(tokens, packed)))
        contract = self.tokenizer.contract
        missing = contract.context_length - tokens.shape[1]
        if missing > 0 and not self.text_encoder.trim_is_exact:
            tokens = F.pad(tokens, (0, missing), value=contract.pad_id)
        return _normalize(self.text_head(self._tower("text")(tokens)))

    def _tower(self, side: Literal["image", "text"]) -> Tower:
        # Evaluation sees other shapes, and its numbers are to be those of the loaded checkpoint.
        encoder: Tower = self.image_encoder if side == "image" else self.text_encoder
        return self._compiled.get(side, encoder) if self.training else encoder

    @torch.no_grad()
    def embed_images(
        self, images: Sequence[Image.Image | str | bytes], *, batch_size: int = 64
    ) -> Tensor:
        """Embed a list of pictures (PIL, paths, encoded bytes) to (N, D) of unit norm, on the CPU.

        Batching and resizing are included; the module should be in eval mode.
        """
        if isinstance(images, str | bytes | Image.Image):
            images = [images]
        blocks = [self.scale.new_zeros(0, self.embed_dim).cpu()]
        for start in range(0, len(images), batch_size):
            pixels = torch.stack([self._pixels(i) for i in images[start : start + batch_size]])
            blocks.append(self.encode_image(pixels.to(self.device)).cpu())
        return torch.cat(blocks)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Embed texts to (N, D) of unit norm, on the CPU, batching and tokenising included.

        Texts of like length share a batch, the longest first, so that little of it is padding.
        """
        if isinstance(texts, str):  # a sequence of letters otherwise
            texts = [texts]
        tokens = self.tokenizer(list(texts))  # (N, L)
        lengths = self.tokenizer.contract.lengths(tokens)
        dtype = torch.promote_types(self.scale.dtype, torch.float32)
        embeddings = torch.zeros(len(tokens), self.embed_dim, dtype=dtype)
        for rows in torch.split(lengths.argsort(descending=True, stable=True), batch_size):
            if len(rows):
                # A tower that attends to its padding gets it back in encode_text.
                batch = tokens[rows, : lengths[rows[0]]]
                embeddings[rows] = self.encode_text(batch.to(self.device)).to(embeddings)
        return embeddings

    def _pixels(self, image: Image.Image | str | bytes) -> Tensor:
        encoder = self.image_encoder
        size, mode = encoder.image_size, encoder.resize_mode
        return to_uint8(resize_for_eval(decode_image(image), size, mode, encoder.interpolation))

    def forward(self, batch: PairBatch) -> Embeddings:
        # The gradient comes to the images first, whose micro-batches take more memory: before that
        # of the token table is there.
        text = self._text_side(batch)
        return Embeddings(self._image_side(batch["images"]), text)

    def _image_side(self, images: Tensor) -> Tensor:
        modules = [self.image_encoder, self.image_head]
        pieces = images.tensor_split(number_of_pieces(len(images), self.micro_batch, modules))
        return embed_pieces(
            self.encode_image,
            [(piece,) for piece in pieces],
            modules=modules,
            recompute=self.micro_batch is not None,
            keep_last=True,
        )

    def caption_groups(self, batch: PairBatch) -> CaptionGroups:
        """Return how the text side takes a batch: without padding, or with as little as it may."""
        modules = [self.text_encoder, self.text_head]
        captions = len(batch["tokens"]) + len(batch.get("negatives", ()))
        pieces = number_of_pieces(captions, self.micro_batch, modules)
        knows_lengths = self.text_encoder.trim_is_exact and "lengths" in batch
        if knows_lengths and isinstance(self.text_encoder, PackingTextEncoder):
            spans = spans_of(batch["lengths"], pieces=pieces, overhead=0)
            return CaptionGroups(None, spans, packed=True)
        # Captions of like length together; batch norm would take its statistics from such alone.
        if knows_lengths and not counting_norms(modules):
            overhead = _GROUP_OVERHEAD.get(self.device.type, _GPU_GROUP_OVERHEAD)
            lengths = sorted(batch["lengths"], reverse=True)
            groups = None if self.micro_batch is None else pieces
            return CaptionGroups(
                batch["by_length"], spans_of(lengths, pieces=groups, overhead=overhead)
            )
        longest = [batch["tokens"].shape[1]] * captions
        return CaptionGroups(None, spans_of(longest, pieces=pieces, overhead=0))

    def _text_side(self, batch: PairBatch) -> Tensor:
        order, spans, packed = self.caption_groups(batch)
        tokens = _all_tokens(batch)
        tokens = tokens if order is None else tokens[order]
        embeddings = embed_pieces(
            self.encode_text,
            self._packed_pieces(tokens, batch["lengths"], spans)
            if packed
            else [(tokens[span.rows, : span.length],) for span in spans],
            modules=[self.text_encoder, self.text_head],
            recompute=self.micro_batch is not None,
        )
        return embeddings if order is None else embeddings[order.argsort()]

    def _packed_pieces(
        self, tokens: Tensor, known: list[int], spans: list[Span]
    ) -> list[tuple[Tensor, Packed]]:
        assert isinstance(self.text_encoder, PackingTextEncoder)
        lengths = self.tokenizer.contract.lengths(tokens)  # on the device; asking it would wait
        places = places_of(lengths, total=sum(known), width=tokens.shape[1])
        # Once for all pieces: the gradient of a look-up is as large as the whole token table.
        vectors = self.text_encoder.look_up(tokens.flatten()[places])
        totals = [sum(known[span.rows]) for span in spans]
        pieces = []
        for span, total, of_piece in zip(spans, totals, torch.split(vectors, totals), strict=True):
            within = places_of(lengths[span.rows], total=total, width=span.length)
            pieces.append((tokens[span.rows, : span.length], Packed(of_piece, within)))
        return pieces

    # --- Training ----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        data = getattr(self.trainer, "datamodule", None)
        batch_size = getattr(data, "batch_size", None)
        if batch_size is not None:
            self.temperature.fill_prior_(batch_size)
        if self.compiles:
            self._compiled["image"] = compiled_image_tower(self.image_encoder)
            self._compiled["text"] = compiled_text_tower(self.text_encoder)
        self._say_how_batch_norm_is_counted()
        self._warn_of_accumulation()
        if self.temperature.bias is not None and bool(self.temperature.bias.isnan()):
            raise UserError(
                "model.temperature.bias: prior needs data.batch_size, which this data module lacks"
            )

    def _say_how_batch_norm_is_counted(self) -> None:
        if not counting_norms([self]):
            return
        if self.micro_batch == 1:
            raise UserError(
                "model.micro_batch: 1 pair has no statistics for batch norm to take; "
                "2 or more are accepted"
            )
        if self.micro_batch is not None:
            log.info(
                "batch norm: its statistics are those of a micro-batch of %d; the running values "
                "move once a step",
                self.micro_batch,
            )
        elif self.trainer.world_size > 1:
            log.info(
                "batch norm: its statistics are those of a rank's share of the batch; "
                "trainer.sync_batchnorm=true takes them over all ranks"
            )

    def _warn_of_accumulation(self) -> None:
        batches = self.trainer.accumulate_grad_batches
        if batches > 1:
            log.warning(
                "warning: trainer.accumulate_grad_batches: %d adds up gradients and no negatives: "
                "the loss still sees data.batch_size pairs. A larger data.batch_size with "
                "model.micro_batch has the memory of the small one and all negatives",
                batches,
            )

    def on_train_start(self) -> None:
        # Short epochs: each is to have a loss of its own.
        steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        trainer: Any = self.trainer
        if 0 < steps < trainer.log_every_n_steps:
            trainer.log_every_n_steps = max(int(steps), 1)

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        seed_step(self._seed, Position(epochs_done(self.trainer), batch_idx), rank())

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        num_rows = len(batch["tokens"])
        image, texts = self(batch)
        text = texts[:num_rows]
        ids = Ids(batch["caption_ids"], batch["image_ids"])
        pairs, pair_ids = Embeddings(gather(image), gather(text)), Ids(*map(gather, ids))
        all_text, all_ids = pairs.text, pair_ids
        if "negatives" in batch:
            all_text = torch.cat([all_text, gather_ragged(texts[num_rows:])])
            captions = torch.cat([all_ids.caption, gather_ragged(batch["negative_ids"])])
            all_ids = all_ids._replace(caption=captions)
        terms = self.loss(
            image,
            text,
            pairs.image,
            all_text,
            offset=rank() * num_rows,
            scale=self.temperature.scale,
            bias=self.temperature.bias,
            ids=ids,
            all_ids=all_ids,
        )
        self._note_non_finite(terms.loss)
        if self._logs_this_step():
            self._refuse_non_finite()
            named = {f"train/{k}": v for k, v in terms.named().items()}
            accuracy = batch_accuracy(
                image,
                text,
                all_image=pairs.image,
                all_text=all_text,
                offset=rank() * num_rows,
                caption_ids=ids.caption,
                image_ids=ids.image,
                all_caption_ids=all_ids.caption,
                all_image_ids=all_ids.image,
            )
            named |= {f"train/accuracy_{k}": v for k, v in accuracy._asdict().items()}
            named["train/truncated"] = batch["truncated"].float().mean()
            self._report_truncation(named["train/truncated"])
            self.log_dict({k: v.detach() for k, v in named.items()}, sync_dist=True)
            # Not prog_bar=True: Lightning would fetch it from the device after every step.
            loss_of_all_ranks = self.trainer.callback_metrics["train/loss"]
            self.trainer.progress_bar_metrics["train/loss"] = float(loss_of_all_ranks)
            self.log_dict(self._state_of_training(pair_ids))
            self._warn_of_no_learning(terms.loss, len(pairs.image))
        loss: Tensor = terms.loss
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Runs before Lightning clips.
        if self._logs_this_step():
            norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
            self.log("train/grad_norm", torch.stack(norms).norm())

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        super().optimizer_step(*arguments, **keywords)
        # Here and not after the batch: checkpoint callbacks come before that hook.
        self.temperature.clamp_()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = parameter_groups(
            {
                "image": torch.nn.ModuleList([self.image_encoder, self.image_head]),
                "text": torch.nn.ModuleList([self.text_encoder, self.text_head]),
                "temperature": self.temperature,
                "loss": self.loss,
            },
            learning_rates=self.learning_rates,
            no_weight_decay={
                encoder.get_parameter(name)
                for encoder in (self.image_encoder, self.text_encoder)
                for name in encoder.no_weight_decay()
            },
        )
        try:
            optimizer = self.optimizer_factory(groups)
        except ValueError as error:  # each optimiser has ranges of its own
            raise UserError(f"model.optimizer: {error}") from error
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            fuse(optimizer)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise UserError(
                "trainer.max_epochs or trainer.max_steps: the schedule needs the length of the run"
            )
        total_steps = int(steps)
        schedule = self.schedule_factory(optimizer, total_steps)
        self._warmup_steps = getattr(schedule, "warmup_steps", 0)
        if self._warmup_steps >= total_steps:
            warnings.warn(
                f"model.schedule: the warm-up of {self._warmup_steps} steps outlasts the run of "
                f"{total_steps}, so the full rate is never reached; give warmup_ratio instead",
                stacklevel=2,
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _logs_this_step(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool((self.global_step + 1) % max(every, 1) == 0)

    def _state_of_training(self, all_ids: Ids) -> dict[str, float | Tensor]:
        # By batches: where gradients are added up, an epoch's last step may be made of fewer.
        batches = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        state: dict[str, float | Tensor] = {
            "train/samples_seen": float(batches * len(all_ids.image)),
            "train/duplicates": _share_repeated(all_ids),
            "train/scale": self.temperature.scale.detach(),
        }
        if self.temperature.bias is not None:
            state["train/bias"] = self.temperature.bias.detach()
        for group in self.trainer.optimizers[0].param_groups:
            tower = group["name"].split("/")[0]
            if tower in self.learning_rates:
                state[f"train/lr_{tower}"] = group["lr"]
        return state

    def _report_truncation(self, share: Tensor) -> None:
        if self._reported_truncation or float(share) == 0:
            return
        self._reported_truncation = True
        log.info(
            "captions longer than %d tokens are cut, their end token kept: %.0f %% of this batch; "
            "train/truncated counts on (model.tokenizer.context_length)",
            self.tokenizer.context_length,
            100 * float(share),
        )

    def _note_non_finite(self, loss: Tensor) -> None:
        # Kept on the device: reading it every step would wait for the device every step.
        first = self._first_bad_step.to(loss.device)
        bad = ~loss.detach().isfinite() & (first == _NEVER)
        self._first_bad_step = torch.where(bad, self.global_step, first)

    def _refuse_non_finite(self) -> None:
        # With SigLIP a bad picture makes the loss of its own rank bad, and everybody's gradient.
        step = int(least(self._first_bad_step.to(self.device)))
        if step < _NEVER:
            raise _non_finite("the loss", step)

    def _refuse_non_finite_weights(self) -> None:
        # A gradient can be bad where the loss was not; the loss then tells a step too late.
        finite = [parameter.isfinite().all() for parameter in self.parameters()]
        if not bool(torch.stack(finite).all()):
            raise _non_finite("a weight", self.global_step - 1)

    def _warn_of_no_learning(self, loss: Tensor, batch_size: int) -> None:
        late = self.global_step > max(self._warmup_steps, 100)
        softmax = isinstance(self.loss, InfoNCELoss) and batch_size > 1
        if self._warned_of_no_learning or not late or not softmax:
            return
        self._warned_of_no_learning = True
        chance = math.log(batch_size)
        value = float(loss.detach())
        if abs(value / chance - 1) < 0.01:
            warnings.warn(
                f"train/loss is {value:.3f} after {self.global_step} steps, still within 1 % "
                f"of chance (ln {batch_size} = {chance:.3f}): the pairs may be shuffled, the "
                "captions all alike, the rate too high or too low, or a tower locked by mistake",
                stacklevel=2,
            )

    # --- Validation --------------------------------------------------------------------------

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        image, text = self(batch)
        self._validation.append(
            {
                "image": image,
                "text": text,
                "caption_ids": batch["caption_ids"],
                "image_ids": batch["image_ids"],
                "rows": batch["rows"],
            }
        )

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def _finish_evaluation(self, stage: str) -> None:
        kept, self._validation = self._validation, []
        if self.trainer.sanity_checking or not kept:
            return
        columns = {k: gather_ragged(torch.cat([block[k] for block in kept])) for k in kept[0]}
        # Samplers repeat rows so that ranks stay in step; each row counts once, in data order.
        first = _first_of_each(columns["rows"])
        metrics = self._block_metrics({k: v[first] for k, v in columns.items() if k != "rows"})
        metrics["scale"] = self.temperature.scale
        if self.temperature.bias is not None:
            metrics["bias"] = self.temperature.bias
        self.log_dict({f"{stage}/{k}": v for k, v in metrics.items()})

    def _block_metrics(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average the loss and its like over full blocks (a short last one counts if alone)."""
        num_rows = len(columns["image"])
        stop = max(num_rows - num_rows % VALIDATION_BLOCK, min(num_rows, VALIDATION_BLOCK))
        sums: dict[str, Tensor] = {}
        starts = range(0, stop, VALIDATION_BLOCK)
        for start in starts:
            block = {k: v[start : start + VALIDATION_BLOCK] for k, v in columns.items()}
            pair = (block["image"], block["text"])
            ids = Ids(block["caption_ids"], block["image_ids"])
            terms = self.loss(
                *pair,
                *pair,
                offset=0,
                scale=self.temperature.scale,
                bias=self.temperature.bias,
                ids=ids,
                all_ids=ids,
            )
            accuracy = batch_accuracy(*pair, caption_ids=ids.caption, image_ids=ids.image)
            values = terms.named()
            values |= {f"accuracy_{k}": v for k, v in accuracy._asdict().items()}
            for name, value in values.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(starts)
        return sums

    def metric_names(self) -> set[str]:
        """Return the names that validation logs: what a checkpoint callback may monitor."""
        names = {"loss", "scale", "accuracy_image_to_text", "accuracy_text_to_image"}
        if self.temperature.bias is not None:
            names.add("bias")
        if isinstance(self.loss, InfoNCELoss):
            names |= {"loss_image_to_text", "loss_text_to_image"}
        return {f"val/{name}" for name in names}

    # --- Checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._refuse_non_finite()
        self._refuse_non_finite_weights()
        if self._trainer is not None:
            settle(checkpoint, self.trainer)
        if self.configuration is not None:
            checkpoint[checkpoints.KEY] = checkpoints.record(
                self.configuration,
                carried={
                    "image_encoder": self.image_encoder.carried(),
                    "text_encoder": self.text_encoder.carried(),
                    "tokenizer": self.tokenizer.carried(),
                },
                vocabulary=self.tokenizer.digest,
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.check_fits(checkpoint, self)


def _non_finite(what: str, step: int) -> UserError:
    return UserError(
        f"{what} became non-finite at step {step}; the last good checkpoint is kept. "
        "Lower model.optimizer.lr, set trainer.gradient_clip_val, or lengthen the warm-up"
    )


def _normalize(features: Tensor) -> Tensor:
    # In float32 or wider: half precision would leave norms off by a thousandth.
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(wide, dim=-1)


def _all_tokens(batch: PairBatch) -> Tensor:
    """Return the tokens (b + e, L) of a batch's pairs and of its captions that are negatives."""
    tokens = batch["tokens"]
    return torch.cat([tokens, batch["negatives"]]) if "negatives" in batch else tokens


def _share_repeated(ids: Ids) -> float:
    """Return the share of rows whose caption or picture stands in the batch more than once."""
    repeated = torch.zeros_like(ids.caption, dtype=torch.bool)
    for values in ids:
        _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
        repeated |= counts[inverse] > 1
    return float(repeated.float().mean())


def _first_of_each(rows: Tensor) -> Tensor:
    """Return where each distinct row first stands, in the order of the rows' numbers."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    keep = torch.ones_like(ordered, dtype=torch.bool)
    keep[1:] = ordered[1:] != ordered[:-1]
    return order[keep]
