"""Training on smaller pictures first: the size of an epoch (https://arxiv.org/abs/1906.06423)."""

from __future__ import annotations

from collections.abc import Mapping

from clipkit.encoders.base import ImageEncoder
from clipkit.errors import UserError

KEY = "data.image_sizes"
_MOST = 2  # times the encoder's own size: a digit too many fills a machine's memory


class SizeSchedule:
    """Pixels a side of training pictures, by the epoch: whoever asks, worker or resumed run.

    Args:
        sizes: an epoch, counted from 0, to the size from then on.

    Raises:
        UserError: an epoch or a size that is none.
    """

    def __init__(self, sizes: Mapping[int, int]) -> None:
        for epoch, size in sizes.items():
            if epoch < 0 or size < 1:
                raise UserError(
                    f"{KEY}: {dict(sizes)} is not accepted, it takes epochs from 0 and sizes "
                    "above 0, such as {0: 112, 24: 224}"
                )
        self.sizes = dict(sorted(sizes.items()))

    def at(self, epoch: int, *, full: int) -> int:
        """Return the size in an epoch; `full` is what pictures have before the first one given."""
        return next((s for start, s in reversed(self.sizes.items()) if start <= epoch), full)

    def largest(self, *, full: int, epochs: int | None = None) -> int:
        """Return the largest size of a run of so many epochs, or of any."""
        reached = [s for start, s in self.sizes.items() if epochs is None or start < epochs]
        return max([self.at(0, full=full), *reached])

    def checked(self, encoder: ImageEncoder) -> str:
        """Return the line that says what will be done.

        Raises:
            UserError: the tower does not take a size.
        """
        for size in self.sizes.values():
            if size > _MOST * encoder.image_size:
                raise UserError(
                    f"{KEY}: {size} is more than {_MOST} times the {encoder.image_size} pixels "
                    "that the image encoder is made for and evaluation sees"
                )
            try:
                encoder.try_size(size)
            except Exception as error:
                hint = ""
                if getattr(encoder, "any_size", None) is False:
                    hint = "; model.image_encoder.any_size=true lets a ViT resample its positions"
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"{KEY}: the image encoder does not take {size} ({reason}){hint}"
                ) from error
        full = encoder.image_size
        starts = self.sizes if 0 in self.sizes else {0: full, **self.sizes}
        told = ", ".join(f"{size} px from epoch {start}" for start, size in starts.items())
        return f"pictures: {told} (counted from 0); evaluated at {full} px"


FULL_SIZE = SizeSchedule({})
"""The image encoder's own size throughout."""
