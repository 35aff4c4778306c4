"""The kinds of evaluation, which callbacks, the benchmark and the commands share.

Each is thin: it opens classes or captions, asks for embeddings and calls the pure functions of
`clipkit.evaluation`.
"""

from clipkit.suite.tasks.base import Task
from clipkit.suite.tasks.compositionality import SugarCrepe, Winoground
from clipkit.suite.tasks.probes import FewShotProbe, LinearProbe, NearestNeighbours
from clipkit.suite.tasks.retrieval import Retrieval
from clipkit.suite.tasks.zero_shot import Multilabel, ZeroShot, classifier_of

__all__ = [
    "TASKS",
    "FewShotProbe",
    "LinearProbe",
    "Multilabel",
    "NearestNeighbours",
    "Retrieval",
    "SugarCrepe",
    "Task",
    "Winoground",
    "ZeroShot",
    "classifier_of",
]

TASKS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        ZeroShot,
        Multilabel,
        Retrieval,
        LinearProbe,
        FewShotProbe,
        NearestNeighbours,
        SugarCrepe,
        Winoground,
    )
}
"""The tasks by the name that suite files and metrics use."""
