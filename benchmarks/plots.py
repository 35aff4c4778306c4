"""A picture of each result, beside its file and under its date.

python -m benchmarks.plots [--results DIR] [--format svg]

Only the newest result of a question is drawn. A point is a median, its bar the interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from benchmarks.findings import Measured, cases_of, spread_of
from benchmarks.questions import CPU, GPU, OTHERS, RESULTS, latest

OURS, OURS_TOO, THEIRS, INK = "#1f5fbf", "#6fa3e8", "#8a8f98", "#2b2f36"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c5c9d0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "clipkit",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.08,
}

Result = Mapping[str, Any]


class Row(NamedTuple):
    """A contender in a chart of points."""

    label: str
    measured: Measured
    colour: str
    note: str = ""


def colour_of(name: str) -> str:
    """Return whose a contender is."""
    if not name.startswith(("clipkit", "import clipkit", "grouped")):
        return THEIRS
    return OURS_TOO if name.endswith(("ids", "padded", "normalised", "full")) else OURS


def dots(axes: Axes, rows: Sequence[Row], unit: str, title: str = "") -> None:
    """Draw a point a row with its interval, its value written beside it."""
    for place, row in enumerate(reversed(rows)):
        value, low, high = row.measured.value, row.measured.low, row.measured.high
        axes.plot([0, value], [place, place], color=row.colour, alpha=0.25, lw=5,
                  solid_capstyle="butt")  # fmt: skip
        axes.plot([low, high], [place, place], color=row.colour, lw=1.5)
        axes.plot(value, place, "o", color=row.colour, ms=5)
        text = f"{_short(value)}{'  ' + row.note if row.note else ''}"
        axes.annotate(text, (max(value, high), place), (7, 0), textcoords="offset points",
                      va="center", fontsize=8.5)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 1.3 * max(row.measured.high for row in rows))
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"({found['median']:.2f} times as fast)"


def _panels(columns: int, rows: float, *, width: float = 7.2) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1, columns, figsize=(width, max(0.42 * rows + 1.0, 1.8)), squeeze=False
    )
    return figure, list(axes[0])


# --- A function a kind of result -----------------------------------------------------------------


def step(result: Result) -> Figure:
    """Pairs a second of each contender."""
    settings, fast = result["settings"], result.get("times_as_fast", {})
    rows = [
        Row(name, _measured(found), colour_of(name), _times(fast.get(name)))
        for name, found in result["pairs_per_second"].items()
    ]
    used = result.get("utilisation")
    figure, axes = _panels(2 if used else 1, len(rows), width=9.5 if used else 7.2)
    title = f"A training step of {settings['model']}, {settings['batch']} pairs"
    dots(axes[0], rows, "pairs a second", title)
    if used:
        parts = [Row(name, _measured(found), colour_of(name)) for name, found in used.items()]
        dots(axes[1], parts, "model FLOP utilisation", "Share of the card's peak")
        axes[1].set_yticks([])
    return figure


def loss(result: Result) -> Figure:
    """Seconds and memory over the batch, both logarithmic."""
    losses = cases_of(result["losses"])
    figure, axes = plt.subplots(
        len(losses), 2, figsize=(8.4, 3.1 * len(losses)), squeeze=False, sharex=True
    )
    for row, (kind, cases) in zip(axes, losses.items(), strict=True):
        for name in ("open_clip", "clipkit, ids", "clipkit"):
            known = [case for case in cases if name in case["seconds"]]
            pairs = [case["pairs"] for case in known]
            spreads = [_measured(case["seconds"][name]) for case in known]
            _line(row[0], name, pairs, [one.value for one in spreads])
            row[0].fill_between(
                pairs, [s.low for s in spreads], [s.high for s in spreads],
                color=colour_of(name), alpha=0.15, lw=0,
            )  # fmt: skip
            _line(row[1], name, pairs, [case["MiB_above_inputs"][name] for case in known])
        row[0].set_title(f"{_called(kind)}: forward and backward")
        row[1].set_title(f"{_called(kind)}: peak memory above the inputs")
        row[0].set_ylabel("seconds")
        row[1].set_ylabel("MiB")
        for one in row:
            _log_of_pairs(one, [case["pairs"] for case in cases])
    axes[0][0].legend(loc="upper left")
    return figure


def _line(axes: Axes, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(x, y, "o-", color=colour_of(name), ms=4, lw=1.6, label=name)


def _called(kind: str) -> str:
    return {"info_nce": "InfoNCE", "siglip": "SigLIP"}.get(kind, kind)


def _log_of_pairs(axes: Axes, pairs: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(pairs, [f"{n:,}" for n in pairs])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.grid(visible=True, which="major", color="#eceef1", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("pairs in the batch")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def micro_batches(result: Result) -> Figure:
    """Memory in its parts, and pairs a second."""
    settings = result["settings"]
    labels = {
        "micro-batch alone": f"a batch of {settings['micro_batch']}",
        "micro-batches": f"{settings['batch']:,} by {settings['micro_batch']}",
        "whole batch": f"{settings['batch']:,} at once",
    }
    figure, (memory, rate) = _panels(2, 3.5, width=9)
    names = [name for name in reversed(labels) if name in result["MiB"]]
    places = range(len(names))
    start = [0.0] * len(names)
    for part, colour in (("weights", "#d5d9df"), ("inputs", "#aab1bc"), ("step", OURS)):
        sizes = [result["MiB"][name][part] for name in names]
        memory.barh(places, sizes, left=start, color=colour, height=0.5, label=part)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    for place, total in zip(places, start, strict=True):
        memory.annotate(f"{total:,.0f}", (total, place), (5, 0), textcoords="offset points",
                        va="center", fontsize=8.5)  # fmt: skip
    memory.set_yticks(places, [labels[name] for name in names])
    memory.set_xlim(0, 1.2 * max(start))
    memory.set_xlabel("MiB at the most")
    memory.set_title(f"Memory of a step of {settings['model']}")
    memory.tick_params(axis="y", length=0)
    memory.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=3)
    rows = [
        Row(labels[name], _measured(found), OURS)
        for name, found in result["pairs_per_second"].items()
    ]
    dots(rate, rows, "pairs a second", "Speed, same gradient")
    return figure


def largest_batch(result: Result) -> Figure:
    """Seconds and memory of a step over its size."""
    figure, (seconds, memory) = _panels(2, 4.5, width=8.4)
    pairs = [one["pairs"] for one in result["sizes"]]
    settings = result["settings"]
    _line(seconds, "clipkit", pairs, [one["seconds"] for one in result["sizes"]])
    parts = {
        "above weights and inputs": "GiB_above_weights_and_inputs",
        "pictures as bytes": "GiB_of_inputs",
        "in all": "GiB_in_all",
    }
    for (label, key), colour in zip(parts.items(), (OURS_TOO, THEIRS, OURS), strict=True):
        values = [one[key] for one in result["sizes"]]
        if None not in values:
            memory.plot(pairs, values, "o-", color=colour, ms=4, lw=1.6, label=label)
    by = f"{settings['model']} by micro-batches of {settings['micro_batch']:,}"
    seconds.set_title(f"One exact step, {by}")
    seconds.set_ylabel("seconds")
    memory.set_title("Memory at the most")
    memory.set_ylabel("GiB")
    memory.legend(loc="upper left")
    for one in (seconds, memory):
        _log_of_pairs(one, pairs)
    return figure


def text_lengths(result: Result) -> Figure:
    """How much faster the text tower is than on 77 tokens."""
    cuts = {
        "padded to the longest": THEIRS, "grouped, 64": OURS_TOO, "without padding": OURS,
    }  # fmt: skip
    rows = [
        Row(
            f"{case['tower']}, {_mix(case)}, {case['batch']}: "
            + ("grouped by length" if cut.startswith("grouped") else cut),
            _measured(case["cuts"][cut]["times_as_fast_as_padded_to_77"]), colour,
        )
        for case in result["cases"]
        for cut, colour in cuts.items()
        if cut in case["cuts"]
    ]  # fmt: skip
    figure, (axes,) = _panels(1, len(rows), width=8)
    dots(axes, rows, "times as fast as padded to 77 tokens",
         "The text tower, forward and backward")  # fmt: skip
    axes.axvline(1, color=INK, lw=0.8, ls=":")
    return figure


def _mix(case: Mapping[str, Any]) -> str:
    mixes = {"coco": "COCO's captions", "long_tail": "a tenth of them 77 long"}
    return mixes.get(case["mix"], case["mix"])


def decode(result: Result) -> Figure:
    """Milliseconds a picture of each contender, a panel a case."""
    cases = result["cases"]
    figure, grid = plt.subplots(2, -(-len(cases) // 2), figsize=(10, 4.4), squeeze=False)
    for axes, case in zip(grid.flat, cases, strict=False):
        fast = case["times_as_fast_as_open_clip"]
        rows = [
            Row(name.replace("_", " ").replace("open clip", "open_clip"), _measured(found),
                colour_of(name), _times(fast.get(name)))
            for name, found in case["milliseconds_a_picture"].items()
        ]  # fmt: skip
        kilobytes = f"{case['kilobytes_a_picture']:.0f} kB"
        dots(axes, rows, "ms a picture, one core",
             f"JPEG of 640 x 480, {kilobytes}, to {case['output']} pixels")  # fmt: skip
    return figure


def tokens(result: Result) -> Figure:
    """Captions a second, new and known words."""
    states = {"cold": "Words seen for the first time", "warm": "Words seen before"}
    figure, panels = _panels(2, 3.2, width=9.5)
    for axes, (state, title) in zip(panels, states.items(), strict=True):
        fast = result[state]["times_as_fast"]
        rows = [
            Row(name, _measured(found), colour_of(name),
                _times(fast[name] if name != "open_clip" else None))
            for name, found in result[state]["captions_per_second"].items()
        ]  # fmt: skip
        dots(axes, rows, "captions a second, one thread", title)
    panels[1].set_yticks([])
    return figure


def start_up(result: Result) -> Figure:
    """Seconds of each command."""
    rows = [
        Row(name, _measured(found), colour_of(name)) for name, found in result["seconds"].items()
    ]
    figure, (axes,) = _panels(1, len(rows))
    dots(axes, rows, "seconds, whole process, page cache warm", "How long commands take")
    return figure


def ranks(result: Result) -> Figure:
    """Pairs a second on one rank and on several, and how they scale."""
    settings = result["settings"]
    several = settings["ranks"]
    figure, (rates, scaling) = _panels(2, 2 * len(result["scaling"]), width=9.5)
    rows = [
        Row(name, _measured(found), colour_of(name.rpartition(",")[0]))
        for name, found in result["pairs_per_second"].items()
    ]
    dots(rates, rows, "pairs a second of all ranks",
         f"{settings['model']}, {settings['batch']} pairs a rank")  # fmt: skip
    parts = [Row(n, _measured(found), colour_of(n)) for n, found in result["scaling"].items()]
    dots(scaling, parts, "times the pairs a second of one", f"{several} ranks over one")
    scaling.axvline(several, color=INK, lw=0.8, ls=":")
    scaling.set_xlim(0, 1.3 * several)
    return figure


def end_to_end(result: Result) -> Figure:
    """Pairs a second, and the share of the time spent waiting for data."""
    figure, (rate, waiting) = _panels(2, len(result["pairs_per_second"]) + 0.4, width=9.5)
    fast = result["times_as_fast"]
    rows = [
        Row(side, _measured(found), colour_of(side), _times(fast.get(side)))
        for side, found in result["pairs_per_second"].items()
    ]
    dots(rate, rows, "pairs a second", f"From files to steps, {result['settings']['model']}")
    parts = [
        Row(side, _measured(found), colour_of(side))
        for side, found in result["share_waiting_for_data"].items()
    ]
    dots(waiting, parts, "share of the time", "Waiting for data")
    waiting.set_xlim(0, 1)
    waiting.set_yticks([])
    return figure


def classifier(result: Result) -> Figure:
    """Seconds of both builders."""
    fast = result["times_as_fast"]
    rows = [
        Row(name, _measured(found), colour_of(name), _times(fast if name == "clipkit" else None))
        for name, found in result["seconds"].items()
    ]
    figure, (axes,) = _panels(1, len(rows))
    dots(axes, rows, "seconds", "Building a zero-shot classifier, ViT-B/32's text tower")
    return figure


def trains_as_well(result: Result) -> Figure:
    """The score after some epochs: every seed thin, the mean of the seeds thick."""
    figure, (axes,) = _panels(1, 5.5)
    for side in ("open_clip", "clipkit"):
        curves = [run["curve"] for run in result["runs"] if run["side"] == side]
        for curve in curves:
            axes.plot([p["epoch"] for p in curve], [p["r10"] for p in curve],
                      color=colour_of(side), lw=0.8, alpha=0.5)  # fmt: skip
        epochs = [point["epoch"] for point in curves[0]]
        means = [fmean(curve[k]["r10"] for curve in curves) for k in range(len(epochs))]
        axes.plot(epochs, means, "o-", color=colour_of(side), lw=2.2, ms=4,
                  label=f"{side}, mean of {len(curves)}")  # fmt: skip
    found = result["difference"]
    said = f"ours minus theirs: {found['value']:+.1f} points"
    if found["welch"] is not None:
        said += f" ({found['welch'][0]:+.1f} to {found['welch'][1]:+.1f})"
    axes.set_title(f"Emoji of a vendor never seen; {said}")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("mean R@10, per cent")
    axes.set_ylim(0)
    axes.grid(visible=True, axis="y", color="#eceef1")
    axes.legend(loc="lower right")
    return figure


def _measured(found: Mapping[str, Any]) -> Measured:
    measured = spread_of(found)
    assert measured is not None
    return measured


DRAWN: dict[str, Callable[[Result], Figure]] = {
    "step": step, "step-vit-b-32-gpu": step, "step-vit-b-16-gpu": step, "step-vit-l-14-gpu": step,
    "loss": loss, "loss-gpu": loss, "micro-batches": micro_batches,
    "micro-batches-gpu": micro_batches, "largest-batch-gpu": largest_batch,
    "text-lengths": text_lengths, "decode": decode, "tokens": tokens, "classifier": classifier,
    "ranks": ranks, "end-to-end": end_to_end, "start-up": start_up,
    "trains-as-well": trains_as_well,
}  # fmt: skip


def draw_all(results: Path, suffix: str = "svg") -> Iterator[Path]:
    """Draw the newest result of each question, and yield the files."""
    for question in (*CPU, *GPU, *OTHERS):
        path, function = latest(question, results), DRAWN.get(question.name)
        if path is not None and function is not None:
            yield draw(function, path, suffix)


def draw(function: Callable[[Result], Figure], path: Path, suffix: str = "svg") -> Path:
    """Draw one result file beside itself."""
    result = json.loads(path.read_text(encoding="utf-8"))
    picture = path.with_suffix(f".{suffix}")
    with plt.rc_context(STYLE):
        figure = function(result)
        machine = result["machine"]
        versions = f"torch {machine['version.torch']}, {path.stem[:10]}"
        figure.supxlabel(f"{machine['device']}, {versions}", fontsize=7, color=THEIRS, x=0.99,
                         ha="right")  # fmt: skip
        # Without a date the same figures give the same bytes.
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(picture, metadata=metadata, dpi=110)
        plt.close(figure)
    return picture


def main() -> None:
    """Draw all that there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    options = parser.parse_args()
    for path in draw_all(options.results, options.format):
        print(path)


if __name__ == "__main__":
    main()
