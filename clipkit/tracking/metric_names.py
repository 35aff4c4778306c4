"""How a metric is read from its name: which way is better, its unit, what it is called in print."""

from __future__ import annotations

from collections.abc import Iterable

# The metrics of a task that a table shows unless it is asked for others, in order.
MAIN = {
    "zeroshot": ("top1",),
    "multilabel": ("map",),
    "retrieval": ("text_to_image_r1", "image_to_text_r1"),
    "probe": ("top1",),
    "fewshot": ("top1",),
    "knn": ("top1",),
    "winoground": ("text", "image", "group"),
    "sugarcrepe": ("accuracy",),
}
SHORT = {
    "text_to_image": "T→I",
    "image_to_text": "I→T",
    "mean_class_top1": "mean per class",
    "map_11point": "mAP 11-point",
    "map": "mAP",
    "tie_rate": "ties",
    "mean_rank": "mean rank",
    "median_rank": "median rank",
    "ece": "calibration error",
    "ece_plugin": "calibration error (plug-in)",
}
_WORDS = {"top": "top-", "recall": "recall@", "r": "R@"}


def evaluation_of(metric: str) -> str:
    """Return ``zeroshot/digits`` of ``zeroshot/digits/top1``, and ``val`` of ``val/loss``."""
    return metric.rpartition("/")[0]


def is_evaluation(metric: str) -> bool:
    """Return whether a metric is a task's on a data set, and not an end of its interval."""
    return metric.count("/") >= 2 and not is_bound(metric)


def is_bound(metric: str) -> bool:
    """Return whether the name is that of an end of an interval."""
    return metric.endswith(("_low", "_high"))


def main_metrics(names: Iterable[str]) -> list[str]:
    """Return what a table shows of these metrics: the main ones of each task, then val/loss."""
    known = [name for name in names if not is_bound(name)]
    tasks = list(MAIN)

    def place(name: str) -> tuple[int, str, int]:
        task, _, rest = name.partition("/")
        measure = rest.rpartition("/")[2]
        return tasks.index(task), evaluation_of(name), MAIN[task].index(measure)

    def is_main(name: str) -> bool:
        task, measure = name.partition("/")[0], name.rpartition("/")[2]
        return is_evaluation(name) and measure in MAIN.get(task, ())

    mains = sorted({name for name in known if is_main(name)}, key=place)
    # A data set of several labels has mAP in place of top-1; a task unknown here, all it has.
    done = {evaluation_of(name) for name in mains}
    others = sorted({n for n in known if is_evaluation(n) and evaluation_of(n) not in done})
    maps = [name for name in others if name.endswith("/map")]
    with_map = {evaluation_of(name) for name in maps}
    rest = [n for n in others if evaluation_of(n) not in with_map and not _is_beside(n)]
    chosen = [*mains, *maps, *rest]
    if "val/loss" in known:
        chosen.append("val/loss")
    return chosen or [name for name in ("train/loss",) if name in known]


def higher_is_better(metric: str) -> bool | None:
    """Return which way a metric is better, None where neither is."""
    measure = metric.rpartition("/")[2]
    if "loss" in measure or measure.endswith("_rank") or measure.startswith("ece"):
        return False
    if is_evaluation(metric) and not measure.endswith("tie_rate"):
        return True
    return True if measure.startswith("accuracy") else None


def is_share(metric: str) -> bool:
    """Return whether a metric is a share, which is printed in percent."""
    measure = metric.rpartition("/")[2]
    if measure.endswith("_rank"):
        return False
    return is_evaluation(metric) or measure.startswith("accuracy")


def short(metric: str) -> str:
    """Return the measure as it stands above a column: ``T→I R@1``."""
    measure = metric.rpartition("/")[2]
    words = []
    for direction in ("text_to_image", "image_to_text"):
        if measure.startswith(f"{direction}_"):
            words.append(SHORT[direction])
            measure = measure.removeprefix(f"{direction}_")
    if measure.startswith("strict_"):
        words.append("strict")
        measure = measure.removeprefix("strict_")
    return " ".join([*words, _plain(measure)])


def arrow(metric: str) -> str:
    """Return ``↑``, ``↓`` or nothing: which way the metric is better."""
    better = higher_is_better(metric)
    return "" if better is None else "↑" if better else "↓"


def _plain(measure: str) -> str:
    if measure in SHORT:
        return SHORT[measure]
    for word, plain in _WORDS.items():
        number = measure.removeprefix(word)
        if measure.startswith(word) and number.isdigit():
            return f"{plain}{number}"
    return measure.replace("_", " ")


def _is_beside(metric: str) -> bool:
    measure = metric.rpartition("/")[2]
    return measure.startswith("strict_") or measure.endswith("tie_rate")


def number(metric: str, value: float, *, signed: bool = False) -> str:
    """Return a value as it is printed: shares in percent, the rest with its digits."""
    sign = "+" if signed else ""
    if value != value:
        return "nan"
    if is_share(metric):
        return f"{100 * value:{sign}.1f}"
    if metric.endswith("_rank"):
        return f"{value:{sign}.1f}"
    return f"{value:{sign}.3f}" if abs(value) < 1000 else f"{value:{sign}.4g}"
