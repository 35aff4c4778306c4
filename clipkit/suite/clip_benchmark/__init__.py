"""CLIP_benchmark's formats: its webdataset folders, its JSON of names and prompts, its results.

A folder is a directory here or a data set of the hub (`clip-benchmark/wds_flickr8k`):

    classnames.txt                          one a line; an empty line is an empty name
    zeroshot_classification_templates.txt   one a line, {c} for the name
    dataset_type.txt                        retrieval or multilabel; absent: classification
    test/nshards.txt, test/0.tar ...        pictures with .cls, .npy or .txt beside them

https://github.com/LAION-AI/CLIP_benchmark, whose `clip_benchmark build` reads what
`to_clip_benchmark` returns.
"""

from clipkit.suite.clip_benchmark.export import save_clip_benchmark, to_clip_benchmark
from clipkit.suite.clip_benchmark.folder import (
    OWN,
    Folder,
    is_folder,
    open_folder,
    targets_of,
)
from clipkit.suite.clip_benchmark.names import is_reference, read_lines, read_reference
from clipkit.suite.clip_benchmark.sugar_crepe import open_sugar_crepe

__all__ = [
    "OWN",
    "Folder",
    "is_folder",
    "is_reference",
    "open_folder",
    "open_sugar_crepe",
    "read_lines",
    "read_reference",
    "save_clip_benchmark",
    "targets_of",
    "to_clip_benchmark",
]
