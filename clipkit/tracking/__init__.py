"""Where a run is recorded: its folder, its journal, MLflow; and read again, to be compared.

The names are imported when they are asked for: reading runs needs no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.tracking.journal import Journal
    from clipkit.tracking.logger import MLflowLogger
    from clipkit.tracking.run_folder import RunFolder, callbacks_of, folder_of_run

__all__ = ["Journal", "MLflowLogger", "RunFolder", "callbacks_of", "folder_of_run"]

_FILES = {
    "Journal": "journal",
    "MLflowLogger": "logger",
    "RunFolder": "run_folder",
    "callbacks_of": "run_folder",
    "folder_of_run": "run_folder",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"clipkit.tracking.{_FILES[name]}"), name)
