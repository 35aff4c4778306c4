"""Parameter groups (decay, rates per tower) and schedules counted in optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from clipkit.errors import UserError
from clipkit.ranges import check_number

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class ScheduleFactory(Protocol):
    """What makes a schedule: it needs the optimiser and the number of steps of the run."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return a schedule that is stepped once an optimiser step."""


def parameter_groups(
    towers: dict[str, nn.Module],
    *,
    learning_rates: dict[str, float | None],
    no_weight_decay: set[nn.Parameter],
) -> list[dict[str, Any]]:
    """Split the trainable parameters by tower and by whether they decay.

    Vectors and scalars (norms, biases, the temperature) and what an encoder names (position
    tables, class tokens) never decay. A group is named ``<tower>/decay`` or ``<tower>/no_decay``;
    without a rate of its own it takes the optimiser's.
    """
    groups = []
    seen: set[nn.Parameter] = set()
    for tower, module in towers.items():
        kinds: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
        for parameter in module.parameters():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)  # a tied parameter belongs to the first tower that has it
                spared = parameter.ndim <= 1 or parameter in no_weight_decay
                kinds["no_decay" if spared else "decay"].append(parameter)
        for kind, parameters in kinds.items():
            if not parameters:
                continue
            group: dict[str, Any] = {"params": parameters, "name": f"{tower}/{kind}"}
            if kind == "no_decay":
                group["weight_decay"] = 0.0
            rate = learning_rates.get(tower)
            if rate is not None:
                group["lr"] = rate
            groups.append(group)
    return groups


def fuse(optimizer: Optimizer) -> None:
    """Let an optimiser update all parameters in one kernel, where it can and says nothing of it.

    Set here and not in the constructor: Lightning takes an optimiser built as fused for one that
    undoes loss scaling itself, and then refuses to clip gradients, in bf16 too.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.device.type not in _FUSED_ON or not p.is_floating_point() for p in parameters):
        return
    for group in optimizer.param_groups:
        if group.get("fused", False) is None and not group.get("foreach"):
            group["fused"] = True


_FUSED_ON = ("cpu", "cuda")
_POSITION = ("last_epoch", "_step_count", "_last_lr", "base_lrs")


class _Warmup(LambdaLR):
    """Linear warm-up, then what the subclass says; both are factors of each group's rate."""

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_steps: int | None, warmup_ratio: float
    ) -> None:
        if not 0 <= warmup_ratio <= 1:
            raise UserError(f"model.schedule.warmup_ratio: {warmup_ratio} does not lie in [0, 1]")
        if warmup_steps is not None and warmup_steps < 0:
            raise UserError(f"model.schedule.warmup_steps: {warmup_steps} is negative")
        self.total_steps = total_steps
        self.warmup_steps = (
            round(warmup_ratio * total_steps) if warmup_steps is None else warmup_steps
        )
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        # The first step already moves: (step + 1) / warm-up, as in open_clip.
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self._after_warmup(step - self.warmup_steps, self.total_steps - self.warmup_steps)

    def _after_warmup(self, step: int, steps: int) -> float:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        # Where it stands, not how long it is: a run resumed with more epochs has another length.
        return {name: getattr(self, name) for name in _POSITION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update({name: state_dict[name] for name in _POSITION})


class WarmupCosine(_Warmup):
    """Warm up, then follow half a cosine to zero (https://arxiv.org/abs/1608.03983).

    Args:
        optimizer: given by the module.
        total_steps: given by the module.
        warmup_steps: length of the warm-up in steps; left out,
        warmup_ratio: its length as a share of the run.
        floor_ratio: where the cosine ends, as a share of the full rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        warmup_steps: int | None = None,
        warmup_ratio: float = 0.0,
        floor_ratio: float = 0.0,
    ) -> None:
        check_number("model.schedule.floor_ratio", floor_ratio, least=0, most=1)
        self.floor_ratio = floor_ratio
        super().__init__(optimizer, total_steps, warmup_steps, warmup_ratio)

    def _after_warmup(self, step: int, steps: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        return self.floor_ratio + (1 - self.floor_ratio) * (1 + math.cos(math.pi * done)) / 2


class WarmupConstant(_Warmup):
    """Warm up, then hold the rate.

    Args:
        optimizer: given by the module.
        total_steps: given by the module.
        warmup_steps: length of the warm-up in steps; left out,
        warmup_ratio: its length as a share of the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        warmup_steps: int | None = None,
        warmup_ratio: float = 0.0,
    ) -> None:
        super().__init__(optimizer, total_steps, warmup_steps, warmup_ratio)

    def _after_warmup(self, step: int, steps: int) -> float:
        return 1.0


class WarmupConstantCooldown(_Warmup):
    """Warm up, hold the rate, and fall to zero over the last steps of the run.

    Args:
        optimizer: given by the module.
        total_steps: given by the module.
        warmup_steps: length of the warm-up in steps; left out,
        warmup_ratio: its length as a share of the run.
        cooldown_ratio: share of the run over which the rate falls.
        power: shape of the fall; 1 is a straight line.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        warmup_steps: int | None = None,
        warmup_ratio: float = 0.0,
        cooldown_ratio: float = 0.2,
        power: float = 1.0,
    ) -> None:
        check_number("model.schedule.cooldown_ratio", cooldown_ratio, least=0, most=1)
        check_number("model.schedule.power", power, least=0, most=100)
        self.cooldown_steps = round(cooldown_ratio * total_steps)
        self.power = power
        super().__init__(optimizer, total_steps, warmup_steps, warmup_ratio)

    def _after_warmup(self, step: int, steps: int) -> float:
        start = steps - self.cooldown_steps
        if step < start:
            return 1.0
        return float(max(1 - (step - start) / max(self.cooldown_steps, 1), 0.0) ** self.power)
