"""Pictures and texts embedded once per weights, for every task that asks for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from clipkit.data.images import decode_image, naming_broken
from clipkit.errors import UserError
from clipkit.module import CLIPModule
from clipkit.suite.encoding import embed_data, pictures_of
from clipkit.suite.eval_data import EvalData

if TYPE_CHECKING:
    from clipkit.data.rows import Rows
    from clipkit.interop import EmbeddingModel

READERS = 4
"""Threads that read and decode pictures ahead of the model."""


class Embedder(ABC):
    """Gives embeddings (N, D) on the CPU; ``scale`` is the model's own, where it has one."""

    scale: float | None = None

    @abstractmethod
    def images(self, data: EvalData, rows: Rows) -> Tensor:
        """Embed the pictures of all rows, in their order."""

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, in their order."""


class ModuleEmbedder(Embedder):
    """A module in training: every rank embeds its share of the pictures and receives them all."""

    def __init__(self, module: CLIPModule) -> None:
        self.module = module
        self.scale = float(module.scale.detach())

    def images(self, data: EvalData, rows: Rows) -> Tensor:
        return embed_data(self.module, data, rows)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.module.embed_texts(texts)


class ModelEmbedder(Embedder):
    """Anybody's model: each data set and each different text is embedded once.

    Args:
        model: an object with ``embed_images`` and ``embed_texts``.
        scale: what it multiplies cosines by.
        batch_size: pictures at a time.
        watch: called with the number of pictures of each batch, for a progress bar.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        *,
        scale: float | None = None,
        batch_size: int = 64,
        watch: Callable[[int], object] = lambda number: None,
    ) -> None:
        self.model = model
        self.scale = scale
        self.batch_size = batch_size
        self.watch = watch
        self.num_embedded = 0
        self._images: dict[tuple[object, ...], Tensor] = {}
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def images(self, data: EvalData, rows: Rows) -> Tensor:
        pictures = pictures_of(data, rows)
        if pictures not in self._images:
            batches = [
                _checked(self.model.embed_images(batch), len(batch), "embed_images")
                for batch in self._batches(rows)
            ]
            self._images[pictures] = torch.cat(batches)
        return self._images[pictures]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            found = _checked(self.model.embed_texts(new), len(new), "embed_texts")
            self._texts |= dict(zip(new, found, strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def _batches(self, rows: Rows) -> Iterator[list[Image.Image]]:
        """Yield decoded pictures, read ahead by two batches."""

        def read(index: int) -> Image.Image:
            with naming_broken(f"{rows.key(index)!r} (row {index})"):
                return decode_image(rows.image(index))

        waiting: deque[Future[Image.Image]] = deque()
        rest = iter(range(len(rows)))
        with ThreadPoolExecutor(READERS) as pool:
            try:
                while True:
                    while len(waiting) < 2 * self.batch_size:
                        if (index := next(rest, None)) is None:
                            break
                        waiting.append(pool.submit(read, index))
                    if not waiting:
                        return
                    batch = [
                        waiting.popleft().result()
                        for _ in range(min(self.batch_size, len(waiting)))
                    ]
                    yield batch
                    self.num_embedded += len(batch)
                    self.watch(len(batch))
            finally:
                for future in waiting:
                    future.cancel()


def _checked(embeddings: object, length: int, verb: str) -> Tensor:
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != length:
        shape = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings)
        raise UserError(f"the model's {verb} gave {shape} for {length} inputs, not ({length}, D)")
    return embeddings.detach().float().cpu()
