"""A model of the time of a training step: fitted to what was measured, then asked about clusters.

python -m benchmarks.scaling            (prints the tables of scaling.md)
python -m benchmarks.scaling --write    (writes them into the page)

    step = towers + loss + gathering + gradients + optimiser

Every input says whether it was measured (and in which file), fitted, or assumed (and whose figure
it is). Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.questions import CPU, RESULTS, latest

PAGE = Path(__file__).parent / "scaling.md"
TOKENS = 14  # of a caption of COCO, start and end included
FULL = 77


# --- What is computed ----------------------------------------------------------------------------


class Model(NamedTuple):
    """A CLIP of two transformers."""

    name: str
    patch: int
    side: int
    image: tuple[int, int]  # width, depth
    text: tuple[int, int]
    embed_dim: int
    parameters: float

    def operations(self, tokens: int = TOKENS) -> float:
        """Return the operations of a pair, forward and backward."""
        patches = (self.side // self.patch) ** 2
        stem = 2 * patches * 3 * self.patch**2 * self.image[0]
        return 3 * (stem + _tower(patches + 1, *self.image) + _tower(tokens, *self.text))


def _tower(length: int, width: int, depth: int) -> float:
    return depth * (24 * length * width**2 + 4 * length**2 * width)


MODELS = {
    "ViT-B/32": Model("ViT-B/32", 32, 224, (768, 12), (512, 12), 512, 151e6),
    "ViT-B/16": Model("ViT-B/16", 16, 224, (768, 12), (512, 12), 512, 150e6),
    "ViT-L/14": Model("ViT-L/14", 14, 224, (1024, 24), (768, 12), 768, 428e6),
}


NAMES = {name.replace("/", "-"): name for name in MODELS}
"""As the benchmarks call them."""


class Card(NamedTuple):
    """A device and what joins it to others; operations and bytes a second."""

    name: str
    half: float  # operations in bf16
    single: float  # in float32
    tf32: float
    memory: float
    gigabytes: float
    nvlink: float  # in one direction
    fabric: float  # of a card to other nodes, in one direction


CARDS = {
    "H200": Card("H200", 989.4e12, 66.9e12, 494.7e12, 4.8e12, 141, 450e9, 50e9),
    "A100": Card("A100", 312e12, 19.5e12, 156e12, 2.0e12, 80, 300e9, 25e9),
}
NODE = 8
UTILISATION = (0.30, 0.45)
MIDDLE = 0.35
EFFICIENCY = 0.7  # of a stated speed of memory, network or float32, in practice
HIDDEN = 0.7  # share of the gradients' all-reduce that the backward pass hides
PASSES = 16  # over a tile of logits, forward and backward
BYTES = 4


class Step(NamedTuple):
    """The seconds of a step on one card, in parts."""

    towers: float
    loss: float
    gathering: float
    gradients: float
    optimiser: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self)

    def share(self, part: str) -> float:
        """Return a part's share."""
        return float(getattr(self, part)) / self.seconds


def step_of(
    model: Model, card: Card, cards: int, batch: int, *, utilisation: float = MIDDLE,
    tf32: bool = False, micro_batches: bool = False,
) -> Step:  # fmt: skip
    """Return the time of a step of so many pairs over all cards."""
    own = batch / cards
    again = 4 / 3 if micro_batches else 1
    towers = again * own * model.operations() / (card.half * utilisation)
    return Step(
        towers, _loss(model, card, cards, batch, tf32=tf32), _gathering(model, card, cards, batch),
        (1 - HIDDEN) * 2 * _sent(BYTES * model.parameters, card, cards),
        28 * model.parameters / (EFFICIENCY * card.memory),
    )  # fmt: skip


def _loss(model: Model, card: Card, cards: int, batch: int, *, tf32: bool) -> float:
    """Logits once forward, again backward, and two products of their gradient."""
    # One process takes both directions from one product; ranks have other columns for each.
    directions = 1 if cards == 1 else 2
    elements = directions * (batch / cards) * batch
    speed = EFFICIENCY * (card.tf32 if tf32 else card.single)
    return 4 * 2 * elements * model.embed_dim / speed + (
        PASSES * BYTES * elements / (EFFICIENCY * card.memory)
    )


def _gathering(model: Model, card: Card, cards: int, batch: int) -> float:
    """Embeddings to all, their gradient summed over all (twice as much) and the own rows kept."""
    both_sides = 2 * BYTES * batch * model.embed_dim
    return 3 * _sent(both_sides, card, cards)


def _sent(size: float, card: Card, cards: int) -> float:
    if cards == 1:
        return 0.0
    speed = card.nvlink if cards <= NODE else card.fabric
    return size * (cards - 1) / cards / (EFFICIENCY * speed)


def gibibytes_of_gathered(model: Model, batch: int) -> float:
    """Return what a card holds of all pairs: both sides, their gradients, and two ids each."""
    return batch * (4 * BYTES * model.embed_dim + 2 * 8) / 2**30


# --- What was measured ---------------------------------------------------------------------------


class Check(NamedTuple):
    """One figure by the model beside the measured one."""

    what: str
    measured: float
    model: float | None  # None where it went into the fit
    unit: str


class Fit(NamedTuple):
    """What measurements on the processor say, where there are any."""

    towers: float | None = None  # operations a second
    products: float | None = None  # of the loss, operations a second, its passes counted in
    network: float | None = None  # bytes a second between two processes
    checks: tuple[Check, ...] = ()
    files: tuple[str, ...] = ()


def measured(name: str, folder: Path) -> dict[str, Any] | None:
    """Return the newest result file of a question."""
    path = latest(next(q for q in CPU if q.name == name), folder)
    if path is None:
        return None
    found: dict[str, Any] = {"file": path.name, **json.loads(path.read_text(encoding="utf-8"))}
    return found


def fit(folder: Path = RESULTS) -> Fit:
    """Fit what can be fitted to the files that are there."""
    files, checks = [], list[Check]()
    step, loss, ranks = (measured(name, folder) for name in ("step", "loss", "ranks"))
    towers = products = network = None
    if step is not None and step["settings"]["model"] in NAMES:
        files.append(step["file"])
        towers, found = _fit_towers(step)
        checks += found
    if loss is not None and isinstance(next(iter(loss["losses"].values())), list):
        files.append(loss["file"])
        products, found = _fit_loss(loss)
        checks += found
    if ranks is not None and ranks["settings"]["ranks"] == 2:
        files.append(ranks["file"])
        network, found = _fit_network(ranks)
        checks += found
    return Fit(towers, products, network, tuple(checks), tuple(files))


def _fit_towers(step: dict[str, Any]) -> tuple[float, list[Check]]:
    """Operations a second by the padded step; the trimmed one is then foretold."""
    model = MODELS[NAMES[step["settings"]["model"]]]
    rates = {name: found["median"] for name, found in step["pairs_per_second"].items()}
    speed = rates["clipkit, padded"] * model.operations(FULL)
    foretold = speed / model.operations()
    return speed, [
        Check("step, 77 tokens", rates["clipkit, padded"], None, "pairs/s"),
        Check("step, captions trimmed", rates["clipkit"], foretold, "pairs/s"),
    ]


def _fit_loss(loss: dict[str, Any]) -> tuple[float, list[Check]]:
    """Operations a second by the mean cost of an element; each size is then foretold."""
    cases = loss["losses"].get("info_nce") or next(iter(loss["losses"].values()))
    seconds = np.array([case["seconds"]["clipkit"]["median"] for case in cases])
    elements = np.array([float(case["pairs"]) ** 2 for case in cases])
    # Products and passes both grow with the elements: what they cost together is all there is.
    cost = float(np.exp(np.mean(np.log(seconds / elements))))
    checks = [
        Check(f"InfoNCE, {case['pairs']:,} pairs", float(taken), cost * float(element), "s")
        for case, taken, element in zip(cases, seconds, elements, strict=True)
    ]
    return 8 * loss["settings"]["width"] / cost, checks


def _fit_network(ranks: dict[str, Any]) -> tuple[float | None, list[Check]]:
    """Bytes a second by what two padded ranks lose; the trimmed ones are then foretold."""
    rates = {name: found["median"] for name, found in ranks["pairs_per_second"].items()}
    own = ranks["settings"]["batch"]
    size = BYTES * ranks["parameters"]

    def lost(name: str) -> float:
        return 2 * own / rates[f"{name}, 2 ranks"] - own / rates[f"{name}, 1 rank"]

    seconds = lost("clipkit, padded")
    if seconds <= 0:
        return None, []
    alone = own / rates["clipkit, 1 rank"]
    return size / seconds, [
        Check("two ranks, 77 tokens", rates["clipkit, padded, 2 ranks"], None, "pairs/s"),
        Check("two ranks, captions trimmed", rates["clipkit, 2 ranks"], 2 * own / (alone + seconds),
              "pairs/s"),
    ]  # fmt: skip


# --- Tables --------------------------------------------------------------------------------------

CLUSTERS = {8: 8_192, 64: 65_536, 1024: 262_144}
"""How many cards, and the pairs of a batch over all of them."""
PAIRS = (10e6, 100e6, 1e9, 10e9)


def inputs_table(found: Fit) -> Iterator[Sequence[str]]:
    """Every input, with its mark."""
    yield "input", "value", "mark", "source"
    sources = {"step": "", "loss": "", "ranks": ""}
    sources |= {file[11:].removesuffix(".json"): file for file in found.files}
    for name, value, unit, what in (
        ("towers on the CPU", found.towers, "operations/s", "step"),
        ("loss on the CPU, products and passes", found.products, "operations/s", "loss"),
        ("between two processes on the CPU", found.network, "bytes/s", "ranks"),
    ):
        mark = "fitted" if value else "not measured yet"
        yield name, _missing(value, unit), mark, sources[what]
    decode = measured("decode", RESULTS)
    if decode is not None:
        yield "a photo of 640 x 480 to 224 pixels", f"{_decode_ms(decode):.2f} ms of a core", \
            "measured", decode["file"]  # fmt: skip
        yield "its file", f"{_file_kb(decode):.0f} kB", "measured", decode["file"]
    for card in CARDS.values():
        sheet = f"NVIDIA's data sheet of the {card.name}"
        yield (
            f"{card.name}, bf16 without sparsity",
            _si(card.half, "operations/s"),
            "assumed",
            sheet,
        )
        yield f"{card.name}, float32", _si(card.single, "operations/s"), "assumed", sheet
        yield f"{card.name}, memory", _si(card.memory, "bytes/s"), "assumed", sheet
        yield f"{card.name}, NVLink, one direction", _si(card.nvlink, "bytes/s"), "assumed", sheet
        kind = "NDR, 400 Gbit/s a card" if card.name == "H200" else "HDR, 200 Gbit/s a card"
        yield f"{card.name}, between nodes", _si(card.fabric, "bytes/s"), "assumed", kind
    low, high = UTILISATION
    yield "utilisation of the towers", f"{low:.2f} to {high:.2f}, {MIDDLE:.2f} where one figure " \
        "is given", "assumed", "the range aimed at; open_clip's runs: 0.09 to 0.17"  # fmt: skip
    yield "of memory, network and float32 at work", f"{EFFICIENCY:.0%}", "assumed", "custom"
    yield "gradients' all-reduce hidden by the backward pass", f"{HIDDEN:.0%}", "assumed", "custom"
    yield "passes over a tile of logits", str(PASSES), "assumed", "counted in the source"
    yield "tokens a caption", str(TOKENS), "measured", "255 captions of COCO"


def _missing(value: float | None, unit: str) -> str:
    return "" if value is None else _si(value, unit)


def _decode_ms(decode: dict[str, Any]) -> float:
    case = next(c for c in decode["cases"] if c["output"] == 224)
    return float(case["milliseconds_a_picture"]["clipkit"]["median"])


def _file_kb(decode: dict[str, Any]) -> float:
    return float(next(c for c in decode["cases"] if c["output"] == 224)["kilobytes_a_picture"])


def _si(value: float, unit: str) -> str:
    for size, word in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.4g} {word}{unit}"
    return f"{value:.4g} {unit}"


def checks_table(found: Fit) -> Iterator[Sequence[str]]:
    """The model against the measurements it was fitted to, and those it was not."""
    yield "on the CPU", "measured", "by the model", "error"
    if not found.checks:
        yield "nothing that the model reads was measured yet", "", "", ""
    for check in found.checks:
        value = f"{check.measured:.4g} {check.unit}"
        if check.model is None:
            yield check.what, value, "fitted to it", ""
        else:
            error = check.model / check.measured - 1
            yield check.what, value, f"{check.model:.4g} {check.unit}", f"{error:+.0%}"


def cost_table() -> Iterator[Sequence[str]]:
    """GPU-hours and days by model, card, cluster and number of pairs seen."""
    yield ("model", "cards", "batch", "pairs/s", *(f"{_count(n)} pairs" for n in PAIRS))
    for model in MODELS.values():
        for card in CARDS.values():
            for cards, batch in CLUSTERS.items():
                ends = [step_of(model, card, cards, batch, utilisation=u) for u in UTILISATION]
                slow, fast = (batch / step.seconds for step in ends)
                yield (model.name, f"{cards:,} {card.name}", f"{batch:,}",
                       f"{_round(slow)} to {_round(fast)}",
                       *(_cost(n, slow, fast, cards) for n in PAIRS))  # fmt: skip


def _cost(pairs: float, slow: float, fast: float, cards: int) -> str:
    hours = [pairs / rate / 3600 for rate in (fast, slow)]
    of_cards = " to ".join(_round(hour * cards) for hour in hours)
    return f"{of_cards} GPU-h, {' to '.join(_time(hour) for hour in hours)}"


def _time(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.2g} min"
    return f"{hours:.2g} h" if hours < 48 else f"{_round(hours / 24)} d"


def _round(value: float) -> str:
    if value >= 100:
        digits = len(str(int(value))) - 2
        return f"{round(value / 10**digits) * 10**digits:,.0f}"
    return f"{value:.2g}"


def _count(pairs: float) -> str:
    return f"{pairs / 1e9:.0f} billion" if pairs >= 1e9 else f"{pairs / 1e6:.0f} million"


def shares_table() -> Iterator[Sequence[str]]:
    """Where a step's time goes as the batch grows."""
    yield ("cards", "batch", "a card", "step", "towers", "loss", "gathering", "gradients",
           "optimiser", "loss in TF32", "gathered")  # fmt: skip
    model, card = MODELS["ViT-B/32"], CARDS["H200"]
    for cards, batches in (
        (8, (8_192, 65_536)), (64, (16_384, 65_536, 262_144)),
        (1024, (65_536, 131_072, 262_144, 1_048_576)),
    ):  # fmt: skip
        for batch in batches:
            step = step_of(model, card, cards, batch)
            other = step_of(model, card, cards, batch, tf32=True)
            parts = (f"{step.share(part):.0%}" for part in Step._fields)
            milliseconds = f"{1000 * step.seconds:.0f} ms"
            yield (f"{cards:,}", f"{batch:,}", f"{batch // cards:,}", milliseconds, *parts,
                   f"{other.share('loss'):.0%}",
                   f"{gibibytes_of_gathered(model, batch):.2f} GiB")  # fmt: skip


def data_table() -> Iterator[Sequence[str]]:
    """What a node must read and decode."""
    yield "node of 8", "model", "pairs/s", "read, GB/s", "cores to decode"
    decode = measured("decode", RESULTS)
    if decode is None:
        return
    for card in CARDS.values():
        for model in MODELS.values():
            rate = NODE * 1024 / step_of(model, card, NODE, NODE * 1024).seconds
            yield (card.name, model.name, _round(rate), f"{rate * _file_kb(decode) / 1e6:.2g}",
                   f"{rate * _decode_ms(decode) / 1000:.0f}")  # fmt: skip


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return every table of the page as Markdown, by name."""
    found = fit(folder)
    made = {
        "inputs": inputs_table(found), "checks": checks_table(found), "cost": cost_table(),
        "shares": shares_table(), "data": data_table(),
    }  # fmt: skip
    return {name: markdown(rows) for name, rows in made.items()}


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as a Markdown table, the first one its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str, made: dict[str, str]) -> str:
    """Return the page with every table put between its marks."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{made[match[1]]}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", table, page, flags=re.DOTALL)


def write() -> None:
    """Bring the page up to date."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into scaling.md")
    if parser.parse_args().write:
        write()
        print(PAGE)
        return
    for name, text in tables().items():
        print(f"{name}\n{text}\n")


if __name__ == "__main__":
    main()
