"""Where a run is recorded: its folder, its journal, MLflow."""

from clipkit.tracking.journal import Journal
from clipkit.tracking.logger import MLflowLogger
from clipkit.tracking.run_folder import RunFolder, run_folder

__all__ = ["Journal", "MLflowLogger", "RunFolder", "run_folder"]
