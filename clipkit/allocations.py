"""A bound on what constructors make, where numbers of unknown origin decide on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.errors import UserError


class AllocationBound(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses, before any memory is taken, to make more bytes or more tensors than so many.

    Tensors are counted since a million tiny layers take minutes and gigabytes of Python's objects.

    Args:
        most: bytes of all tensors that are made within together.
        most_tensors: how many of them there may be.
        sentence: what is said instead; its `{size}` is how much was asked for.
    """

    def __init__(self, most: int, most_tensors: int, sentence: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most
        self.most_tensors = most_tensors
        self.sentence = sentence
        self.asked = 0
        self.tensors = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if args and isinstance(args[0], list | tuple) and all(type(n) is int for n in args[0]):
            elements = 1  # a tensor from its shape: empty, zeros, randn, ...
            for size in args[0]:
                elements *= size
            self.asked += elements * (options.get("dtype") or torch.get_default_dtype()).itemsize
            self.tensors += 1
            if self.asked > self.most:
                raise UserError(self.sentence.format(size=f"{self.asked / 1e9:,.1f} GB"))
            if self.tensors > self.most_tensors:
                raise UserError(self.sentence.format(size=f"over {self.most_tensors:,} tensors"))
        return func(*args, **options)
