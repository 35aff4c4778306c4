"""A result file as rows of one table: what was asked, what must be shown, what was measured.

A goal is met where the whole interval lies on its side, open where the interval reaches across.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.interleaved import ratio

Result = Mapping[str, Any]


class Measured(NamedTuple):
    """A value with its interval, which may be the value itself."""

    value: float
    low: float
    high: float
    coverage: float = 1.0  # how surely the interval holds it


class Finding(NamedTuple):
    """One row."""

    what: str
    measured: Measured | None
    goal: float | None = None
    unit: str = ""
    at_most: bool = False

    @property
    def must_show(self) -> str:
        """The goal in words, nothing where there is none."""
        if self.goal is None:
            return ""
        return f"{'at most' if self.at_most else 'at least'} {_number(self.goal)}{self.unit}"

    @property
    def shown(self) -> str:
        """The value in words."""
        if self.measured is None:
            return "not measured"
        found = self.measured
        value, low, high = map(_number, (found.value, found.low, found.high))
        interval = f" ({low} to {high})" if "-" in low + high else f" ({low}-{high})"
        shown = f"{value}{self.unit}" + (interval if low != high else "")
        unsure = low != high and found.coverage < 0.9
        return f"{shown}, {100 * found.coverage:.0f} % sure" if unsure else shown

    @property
    def verdict(self) -> str:
        """Whether the goal is met: `met`, `open`, `not met`, or nothing."""
        if self.goal is None or self.measured is None:
            return ""
        sign = -1 if self.at_most else 1
        ends = (self.measured.low, self.measured.high)
        margins = sorted(sign * (end - self.goal) for end in ends)
        if margins[0] >= 0:
            return "met"
        return "open" if margins[1] >= 0 else "not met"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread_of(found: Mapping[str, Any] | None) -> Measured | None:
    """Return a spread of a result file."""
    if found is None:
        return None
    # Files of the first days have the extremes.
    low, high = (found.get(new, found.get(old)) for new, old in (("low", "min"), ("high", "max")))
    return Measured(found["median"], low, high, found.get("coverage", 1.0))


def exactly(value: float | None) -> Measured | None:
    """Return a value that has no interval."""
    return None if value is None else Measured(value, value, value)


# --- A function a kind of file -------------------------------------------------------------------


def of_step(result: Result) -> Iterator[Finding]:
    """Pairs a second against open_clip's best, and utilisation."""
    rates, goals = result["pairs_per_second"], result["must_show"]["times_as_fast"]
    for name, goal in goals.items():
        # The switch is judged where it is.
        compiled = name.replace("clipkit", "clipkit, compiled")
        name = compiled if compiled in rates else name
        what = "77 tokens" if name.endswith("padded") else "captions trimmed"
        fast = spread_of(result.get("times_as_fast", {}).get(name))
        yield Finding(f"pairs/s over open_clip's, {what}", fast, goal, " times")
        yield Finding(f"pairs/s, {what}", spread_of(rates[name]))
        if "utilisation" in result and name.endswith("padded"):
            used = spread_of(result["utilisation"][name])
            goal_of = result["must_show"]["utilisation"]
            yield Finding("model FLOP utilisation, 77 tokens", used, goal_of)


def of_text_lengths(result: Result) -> Iterator[Finding]:
    """What leaving out the padding gains."""
    for case in result["cases"]:
        cut = case["cuts"]["without padding"]
        what = f"{case['tower']}'s text tower, {case['mix']}, batch {case['batch']}"
        yield Finding(
            f"{what}: without padding, over 77 tokens",
            spread_of(cut["times_as_fast_as_padded_to_77"]),
            unit=" times",
        )


def of_loss(result: Result) -> Iterator[Finding]:
    """Memory and time at the size that the goal speaks of, or the largest there is."""
    goals = result["must_show"]
    for kind, cases in cases_of(result["losses"]).items():
        compared = [case for case in cases if case["times_as_fast"]]
        at_goal = [case for case in compared if case["pairs"] == goals.get("pairs", 16_384)]
        for case in at_goal or compared[-1:]:
            what = f"{kind}, {case['pairs']:,} pairs"
            less = exactly(case["times_less_memory"]["clipkit"])
            yield Finding(f"{what}: memory under open_clip's", less, goals["times_less_memory"],
                          " times")  # fmt: skip
            fast = spread_of(case["times_as_fast"]["clipkit"])
            yield Finding(f"{what}: speed over open_clip's", fast, goals["times_as_fast"],
                          " times")  # fmt: skip


def cases_of(losses: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the sizes that a result of the losses holds, by loss."""
    # Files of the first days have one size, and no list.
    return {
        kind: found if isinstance(found, list) else [{"pairs": 16_384, **found}]
        for kind, found in losses.items()
    }


def of_micro_batches(result: Result) -> Iterator[Finding]:
    """Memory against a small batch, time against a whole one."""
    goals, memory = result["must_show"], result["times_the_memory"]["in_all"]
    yield Finding("memory over a batch of one micro-batch", exactly(memory),
                  goals["times_the_memory"], " times", at_most=True)  # fmt: skip
    yield Finding("time over the whole batch at once", spread_of(result["times_the_time"]),
                  goals["times_the_time"], " times", at_most=True)  # fmt: skip


def of_largest_batch(result: Result) -> Iterator[Finding]:
    """The largest size that was made."""
    largest = result["sizes"][-1] if result["sizes"] else None
    yield Finding("largest exact batch", exactly(largest and largest["pairs"]),
                  result["must_show"]["pairs"], " pairs")  # fmt: skip
    if largest is not None:
        yield Finding("its step", exactly(largest["seconds"]), unit=" s")
        yield Finding("its memory", exactly(largest["GiB_in_all"]), unit=" GiB")


def of_decode(result: Result) -> Iterator[Finding]:
    """JPEG to tensor, at the size that the goal speaks of."""
    goal = result["must_show"]["times_as_fast"]
    for case in result["cases"]:
        fast = spread_of(case["times_as_fast_as_open_clip"]["clipkit"])
        stated = goal["at_least"] if case["output"] == goal["output"] else None
        what = f"files of {case['kilobytes_a_picture']:.0f} kB to {case['output']} pixels"
        yield Finding(f"{what}: speed over open_clip's", fast, stated, " times")


def of_tokens(result: Result) -> Iterator[Finding]:
    """Captions a second, new and known words."""
    for state, goals in result["must_show"].items():
        for name in ("clipkit", "clipkit, cached"):
            fast = spread_of(result[state]["times_as_fast"][name])
            what = f"{name}, {state}: speed over open_clip's tokenizer"
            yield Finding(what, fast, goals.get(name), " times")


def of_classifier(result: Result) -> Iterator[Finding]:
    """Building a zero-shot classifier."""
    goals = result["must_show"]
    yield Finding("speed over open_clip's builder", spread_of(result["times_as_fast"]),
                  goals["times_as_fast"], " times")  # fmt: skip
    yield Finding("largest difference", exactly(result["largest_difference"]),
                  goals["largest_difference"], at_most=True)  # fmt: skip


def of_ranks(result: Result) -> Iterator[Finding]:
    """How pairs a second scale, and against open_clip's."""
    goals = result["must_show"]
    ranks = result["settings"]["ranks"]
    for name, scaling in result["scaling"].items():
        goal = goals["scaling_of_two"] if ranks == 2 and name == "clipkit, padded" else None
        yield Finding(f"{name}: {ranks} ranks over one", spread_of(scaling), goal, " times")
    for name, fast in result.get("times_as_fast", {}).items():
        goal = goals["times_as_fast"]
        yield Finding(f"{name}: speed over open_clip's on {ranks}", spread_of(fast), goal, " times")


def of_end_to_end(result: Result) -> Iterator[Finding]:
    """From files to steps, and how much of that is waiting for data."""
    for side, fast in result["times_as_fast"].items():
        yield Finding(f"{side}: speed over open_clip's training", spread_of(fast),
                      result["must_show"]["at_least"], " times")  # fmt: skip
        yield Finding(f"{side}: the same, waiting for data left out",
                      spread_of(_without_waiting(result, side)),
                      result["must_show"]["at_least"], " times")  # fmt: skip
    for side, waited in result["share_waiting_for_data"].items():
        yield Finding(f"{side}: share of the time waiting for data", spread_of(waited))


def _without_waiting(result: Result, side: str) -> dict[str, object]:
    """Return the ratios if nobody waited: in short epochs it weighs that loaders start anew."""
    rates, waits = result["pairs_per_second"], result["share_waiting_for_data"]

    def busy(name: str) -> list[float]:
        pairs = zip(rates[name]["all"], waits[name]["all"], strict=True)
        return [(1 - waited) / rate for rate, waited in pairs]

    return ratio(busy("open_clip"), busy(side))


def of_start_up(result: Result) -> Iterator[Finding]:
    """Seconds of each command, and against open_clip's where it has one like it."""
    for name, fast in result["times_as_fast"].items():
        against = result["compared_with"][name]
        yield Finding(f"{name}, speed over {against}", spread_of(fast),
                      result["must_show"]["times_as_fast"], " times")  # fmt: skip
    for name, seconds in result["seconds"].items():
        if name.startswith(("clipkit", "import clipkit")):
            yield Finding(name, spread_of(seconds), unit=" s")


def of_trains_as_well(result: Result) -> Iterator[Finding]:
    """Points of R@10 that ours is ahead, by the wider of both intervals."""
    found = result["difference"]
    ends = [end for kind in ("welch", "paired") for end in found[kind] or []]
    # A single seed a side has no interval, and its value says nothing of the goal.
    value = found["value"]
    ahead = Measured(value, min(ends), max(ends)) if ends else exactly(value)
    goal = result["must_show"]["difference_low"] if ends else None
    yield Finding("mean R@10, ours minus theirs", ahead, goal, " points")


def of_whatever(result: Result) -> Iterator[Finding]:
    """Every goal whose measured value stands in the file under the same name."""
    for name, goal in result.get("must_show", {}).items():
        found = result.get(name)
        if isinstance(goal, int | float):
            measured = spread_of(found) if isinstance(found, Mapping) else exactly(found)
            yield Finding(name.replace("_", " "), measured, float(goal), at_most=name in AT_MOST)


AT_MOST = {
    *("share", "mib_above_the_embeddings", "largest_difference", "data_wait"),
    *("seconds_to_first_step", "pss_above_mb", "rss_above_mb", "share_written"),
}


def of_tracking(result: Result) -> Iterator[Finding]:
    """Each store against none, and each dead one against one that lives."""
    for kind, against in (("cost", "nothing kept"), ("dead", "a live server")):
        for side, found in result[kind].items():
            goal = result["must_show"][kind]["at_most"]
            what = f"a step with {side}, over {against}"
            yield Finding(what, spread_of(found), goal, " times", at_most=True)


Reader = Callable[[Result], Iterator[Finding]]
