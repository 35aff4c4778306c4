"""Where a user's own classes are found."""

from __future__ import annotations

import os
import sys


def look_in_current_folder() -> None:
    """Let imports find what lies in the current folder, after all else: it shadows nothing."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
