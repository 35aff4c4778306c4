"""The gradient of one step on all ranks, in float64, beside that of one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from clipkit.check.everyone import of_every_rank
from clipkit.check.reference import gradients, joined
from clipkit.data.pairs import PairDataModule
from clipkit.data.samples import PairBatch
from clipkit.encoders.flops import image_operations, text_operations
from clipkit.module import CLIPModule
from clipkit.pieces import counting_norms

ALLOWED = 1e-8
"""How far apart gradients may be, as a share of the parameter's largest: float64 rounds at 1e-16,
and what is wrong is wrong by far more than this."""

ROUNDING = 1e-4
"""What a tower that computes in less than float64 may move the gradient by, at most."""

# Operations of both towers forward that a few seconds of float64 have room for.
_OPERATIONS = {"cpu": 1e11}
_GPU_OPERATIONS = 1e12
_FEWEST, _MOST = 8, 256


class Comparison(NamedTuple):
    """How far the ranks' gradient is from that of one process."""

    pairs: int
    parameters: int
    worst: str  # the parameter that differs most
    difference: float  # of its largest gradient
    allowed: float
    different: int  # how many parameters differ by more
    factor: float | None  # where all that is wrong is that it is so many times as large
    unreached: list[str]  # trained, but no gradient arrives
    unreached_stops: bool  # and DDP waits for it
    same_pairs: bool  # several ranks were given the same
    held_still: list[str]

    @property
    def agrees(self) -> bool:
        """Whether all ranks train as one process would."""
        stopped = self.unreached_stops and self.unreached
        return not (self.different or stopped or self.same_pairs)


class OneStep(Callback):
    """Makes one step on a few pairs and compares its gradient, before it is clipped, on rank zero.

    Towers and heads are in evaluation mode: with dropout or batch statistics the gradient depends
    on the ranks by design.
    """

    comparison: Comparison | None = None
    own_batch_size = 0
    """`data.batch_size` as fit would have it, once the data was seen."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, CLIPModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, PairDataModule)
        # Here the data module has refused what does not divide.
        self.own_batch_size = data.batch_size
        data.batch_size = few_pairs(pl_module, data.batch_size, trainer.world_size)
        share = data.batch_size // trainer.world_size
        if pl_module.micro_batch is not None:
            # At least two, of unequal size where that can be.
            pl_module.micro_batch = min(pl_module.micro_batch, max(share * 2 // 3, 1))
        self._held_still = _moving_parts(pl_module)
        _off_zero(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PairBatch, batch_idx: int
    ) -> None:
        pl_module.eval()
        pl_module.training = True  # the module itself: it trains through compiled towers
        on_host = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in batch.items()}
        self._shares: list[PairBatch] = of_every_rank(on_host)  # type: ignore[arg-type]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        trainer.should_stop = True
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, CLIPModule)
        with trainer.precision_plugin.forward_context():
            self.comparison = self._compare(trainer, pl_module)

    def _compare(self, trainer: L.Trainer, module: CLIPModule) -> Comparison:
        batch = joined(self._shares, module)
        expected = gradients(module, batch)
        parameters = dict(module.named_parameters())
        found = {name: parameters[name].grad for name in expected}
        differences = _differences(found, expected)
        allowed = ALLOWED
        if max(differences.values()) > ALLOWED:
            # A tower that rounds to float32 inside differs from itself, in another order, as much.
            backwards = gradients(module, _reversed(batch))
            rounding = 10 * max(_differences(backwards, expected).values())
            allowed = max(ALLOWED, rounding if rounding < ROUNDING else 0)
        worst = max(differences, key=differences.__getitem__)
        strategy = trainer.strategy
        return Comparison(
            pairs=len(batch["rows"]),
            parameters=len(expected),
            worst=worst,
            difference=differences[worst],
            allowed=allowed,
            different=sum(not value <= allowed for value in differences.values()),
            factor=_factor(found[worst], expected[worst]),
            unreached=[name for name, gradient in found.items() if gradient is None],
            unreached_stops=isinstance(strategy, DDPStrategy)
            and not strategy._ddp_kwargs.get("find_unused_parameters", False),
            same_pairs=_any_equal([one["rows"] for one in self._shares]),
            held_still=self._held_still,
        )


def few_pairs(module: CLIPModule, batch_size: int, ranks: int) -> int:
    """Return how many pairs one process computes at once in float64, in seconds."""
    contract = module.tokenizer.contract
    length = contract.context_length
    try:
        text = text_operations(module.text_encoder, contract)
        operations = image_operations(module.image_encoder)
        operations += text.total(captions=1, tokens=length, squares=length**2)
    except Exception:  # of a user's own tower
        operations = float("inf")
    room = _OPERATIONS.get(module.device.type, _GPU_OPERATIONS) / max(operations, 1.0)
    share = max(2, int(min(max(room, _FEWEST), _MOST)) // ranks)
    return min(batch_size, share * ranks)


def _differences(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return how far each gradient is from what is expected, as a share of its largest value.

    Where all of it is next to nothing, as for a key's bias, which cancels in the softmax, it is
    set against a millionth of the largest of all.
    """
    tops = {name: float(gradient.abs().max()) for name, gradient in expected.items()}
    least = max(1e-6 * max(tops.values()), torch.finfo(torch.float64).tiny)
    differences = {}
    for name, gradient in expected.items():
        own = found[name]
        gap = float((gradient if own is None else own - gradient).abs().max())
        differences[name] = gap / max(tops[name], least) if gap == gap else float("inf")
    return differences


def _factor(found: Tensor | None, expected: Tensor) -> float | None:
    """Return how many times as large the gradient is, where nothing else is wrong with it."""
    if found is None or not (expected * expected).sum() > 0:
        return None
    factor = (found * expected).sum() / (expected * expected).sum()
    rest = (found - factor * expected).abs().max()
    return float(factor) if rest <= 1e-6 * found.abs().max() else None


def _reversed(batch: PairBatch) -> PairBatch:
    return {k: v.flip(0) for k, v in batch.items()}  # type: ignore[return-value, attr-defined]


def _any_equal(rows: list[Tensor]) -> bool:
    shares = [tuple(sorted(one.tolist())) for one in rows]
    return len(set(shares)) < len(shares)


def _moving_parts(module: CLIPModule) -> list[str]:
    """Name what in the model depends on chance or on the rest of the batch while it trains."""
    kinds = {"DropPath": "stochastic depth", "PatchDropout": "patch dropout"}
    found = {"batch norm"} if counting_norms([module]) else set()
    for part in module.modules():
        kind = type(part).__name__
        ratio = next((getattr(part, k) for k in ("p", "drop_prob", "prob") if hasattr(part, k)), 0)
        if part.training and "Drop" in kind and ratio:
            found.add(kinds.get(kind, "dropout"))
    return sorted(found)


@torch.no_grad()
def _off_zero(module: CLIPModule) -> None:
    """Draw the parameters that start at zero: what lies below them would have no gradient."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
