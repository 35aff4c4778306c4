"""Conv nets of timm with channels last against channels first: a training step of the image tower.

    python -m benchmarks.channels_last --names resnet18 resnet50 --size 96 --batch 16 --rounds 12

The contenders are `TimmImageEncoder` as it is, and the same with its pictures and weights laid out
as PyTorch does by default; forward and backward, in turn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.interleaved import parser, race, ratio, record, shown, spread, table
from clipkit.encoders import TimmImageEncoder


def step(
    name: str, *, channels_last: bool, size: int, batch: int, device: str
) -> Callable[[], None]:
    torch.manual_seed(0)
    encoder = TimmImageEncoder(name, image_size=size).to(device).train()
    encoder.convolutional = channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format
    encoder.trunk.to(memory_format=layout)
    images = torch.rand(batch, 3, size, size, device=device)

    def run() -> None:
        encoder(images).square().mean().backward()
        encoder.zero_grad()

    return run


def main() -> None:
    options_of = parser(__doc__, rounds=12)
    options_of.add_argument("--names", nargs="+", default=["resnet18", "resnet50"])
    options_of.add_argument("--size", type=int, default=96)
    options_of.add_argument("--batch", type=int, default=16)
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for name in options.names:
        shape = {"size": options.size, "batch": options.batch, "device": options.device}
        contenders = {
            layout: step(name, channels_last=layout == "last", **shape)
            for layout in ("last", "first")
        }
        seconds = race(contenders, rounds=options.rounds, device=options.device)
        found[name] = {
            "seconds": {layout: spread(values) for layout, values in seconds.items()},
            "first_over_last": ratio(seconds["first"], seconds["last"]),
        }
    table(
        [("model", "last (s)", "first (s)", "first / last")]
        + [
            (
                name,
                *(shown(f["seconds"][k]) for k in ("last", "first")),
                shown(f["first_over_last"]),
            )
            for name, f in found.items()
        ]
    )
    print(record("channels-last", options, {"models": found}))


if __name__ == "__main__":
    main()
