"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from clipkit.tracking.config import commit, versions


def describe() -> dict[str, object]:
    """Return hardware, versions and commit, as every result file carries them."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "commit": commit(),
        **versions(),
        "command": " ".join(["python -m", *sys.orig_argv[2:]]),
    }
