"""What a card can do at most, as its maker states it: without the doubling for sparse weights."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """Stated peaks in 1e12 operations a second; None where the card has no such units."""

    half: float  # bfloat16 or float16 in, float32 sums
    tf32: float | None
    float32: float


# Words of the name that the driver gives, all of which have to be in it; the first match counts.
# Datasheets of NVIDIA state the doubled value beside (or in place of) the dense one.
CARDS: dict[tuple[str, ...], Peak | None] = {
    # https://www.nvidia.com/en-us/data-center/h200/
    ("h200", "nvl"): Peak(835.5, 417.7, 60.0),
    ("h200",): Peak(989.4, 494.7, 66.9),
    # https://www.nvidia.com/en-us/data-center/h100/
    ("h100", "nvl"): Peak(835.5, 417.7, 60.0),
    ("h100", "pcie"): Peak(756.0, 378.0, 51.2),
    ("h100",): Peak(989.4, 494.7, 66.9),
    # https://www.nvidia.com/en-us/data-center/grace-hopper-superchip/
    ("gh200",): Peak(989.4, 494.7, 66.9),
    # https://www.nvidia.com/en-us/data-center/a100/
    ("a100",): Peak(312.0, 156.0, 19.5),
    # https://www.nvidia.com/en-us/data-center/products/a30-gpu/, .../a40/, .../a10-gpu/
    ("a30",): Peak(165.0, 82.0, 10.3),
    ("a40",): Peak(149.7, 74.8, 37.4),
    ("a10",): Peak(125.0, 62.5, 31.2),
    # https://www.nvidia.com/en-us/data-center/l40s/, .../l40/, .../l4/
    ("l40s",): Peak(362.05, 183.0, 91.6),
    ("l40",): Peak(181.05, 90.5, 90.5),
    ("l4",): Peak(121.0, 60.0, 30.3),
    # NVIDIA Ada GPU architecture, whitepaper 2.1, appendix A
    ("6000", "ada"): Peak(364.2, 182.1, 91.1),
    ("4090", "laptop"): None,  # another chip, at any of many clocks
    ("4090", "d"): None,
    ("4090",): Peak(165.2, 82.6, 82.6),
    # NVIDIA Ampere GA102 GPU architecture, whitepaper 2, appendix A
    ("a6000",): Peak(154.8, 77.4, 38.7),
    ("3090", "ti"): Peak(80.0, 40.0, 40.0),
    ("3090",): Peak(71.0, 35.6, 35.6),
    # https://www.nvidia.com/en-us/data-center/tesla-t4/
    ("t4",): Peak(65.0, None, 8.1),
    # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    ("mi300x",): Peak(1307.4, 653.7, 163.4),
}


def peak_flops(card: str, precision: str) -> float | None:
    """Return the dense peak of one card in operations a second, None where it is not known.

    Args:
        card: its name, as ``torch.cuda.get_device_name`` gives it.
        precision: the trainer's, such as ``bf16-mixed``; in ``32-true`` PyTorch's own setting says
            whether products of matrices are taken in TF32.
    """
    words = set(re.findall(r"[a-z0-9]+", card.lower()))
    peak = next((peak for key, peak in CARDS.items() if words.issuperset(key)), None)
    if peak is None:
        return None
    found: float | None = None
    if precision.startswith(("bf16", "16")):
        found = peak.half
    elif precision.startswith("32"):
        exact = torch.get_float32_matmul_precision() == "highest" or peak.tf32 is None
        found = peak.float32 if exact else peak.tf32
    return None if found is None else found * 1e12
