"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import sys

from clipkit.tracking.config import commit, device_name, versions


def describe() -> dict[str, object]:
    """Return hardware, versions and commit, as every result file carries them."""
    return {
        "device": device_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "commit": commit(),
        **versions(),
        "command": " ".join(["python -m", *sys.orig_argv[2:]]),
    }
