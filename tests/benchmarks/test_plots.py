"""Every kind of result can be drawn, with one case and with many, and twice to the same bytes."""

import json

import pytest

from benchmarks.plots import DRAWN, draw


def spread(value):
    return {"median": value, "low": 0.9 * value, "high": 1.1 * value}


RATES = {"open_clip": spread(10.0), "clipkit": spread(16.0), "clipkit, padded": spread(11.0)}
FAST = {"clipkit": spread(1.6), "clipkit, padded": spread(1.1)}


def size_of(pairs):
    names = ("open_clip", "clipkit", "clipkit, ids")
    return {
        "pairs": pairs,
        "seconds": {name: spread(pairs / 1e3) for name in names},
        "MiB_above_inputs": dict.fromkeys(names, pairs / 10),
    }


def curve_of(side, seed):
    points = [{"epoch": epoch, "r10": 5.0 * epoch + seed} for epoch in (1, 2, 3)]
    return {"side": side, "curve": points, "r10": points[-1]["r10"]}


PARTS = {"step": 50.0, "weights": 20.0, "inputs": 5.0}
STEP = {
    "settings": {"model": "ViT-B-32", "batch": 32},
    "pairs_per_second": RATES,
    "times_as_fast": FAST,
}
RESULTS = {
    "step": STEP,
    "step-vit-b-32-gpu": {**STEP, "utilisation": {name: spread(0.3) for name in RATES}},
    "loss": {"losses": {kind: [size_of(2**n) for n in (8, 9)] for kind in ("info_nce", "siglip")}},
    "micro-batches": {
        "settings": {"model": "ViT-S-32", "batch": 256, "micro_batch": 16},
        "MiB": dict.fromkeys(("micro-batch alone", "micro-batches", "whole batch"), PARTS),
        "pairs_per_second": {"micro-batches": spread(8.0), "whole batch": spread(10.0)},
    },
    "largest-batch-gpu": {
        "settings": {"model": "ViT-B-32", "micro_batch": 1024},
        "sizes": [
            {"pairs": n, "seconds": n / 1e4, "GiB_of_inputs": n / 1e5,
             "GiB_above_weights_and_inputs": 3.0, "GiB_in_all": 5.0 + n / 1e5}
            for n in (65_536, 131_072)
        ],
    },
    "text-lengths": {
        "cases": [
            {"tower": "tiny", "mix": "coco", "batch": 64, "cuts": {
                "without padding": {"times_as_fast_as_padded_to_77": spread(4.0)},
                "padded to the longest": {"times_as_fast_as_padded_to_77": spread(2.0)},
            }},
        ]
    },
    "decode": {
        "cases": [
            {"kilobytes_a_picture": 64.0, "output": size,
             "milliseconds_a_picture": {"open_clip": spread(9.0), "clipkit": spread(4.0)},
             "times_as_fast_as_open_clip": {"clipkit": spread(2.2)}}
            for size in (224, 64)
        ]
    },
    "tokens": {
        state: {"captions_per_second": RATES, "times_as_fast": FAST | {"open_clip": spread(1.0)}}
        for state in ("cold", "warm")
    },
    "classifier": {
        "seconds": {"open_clip": spread(20.0), "clipkit": spread(3.0)}, "times_as_fast": spread(7.0)
    },
    "ranks": {
        "settings": {"model": "ViT-S-32", "batch": 16, "ranks": 2},
        "pairs_per_second": {
            f"{n}, {ranks}": rate for n, rate in RATES.items() for ranks in ("1 rank", "2 ranks")
        },
        "scaling": {name: spread(1.7) for name in RATES},
    },
    "end-to-end": {
        "settings": {"model": "ViT-S-32"}, "pairs_per_second": RATES, "times_as_fast": FAST,
        "share_waiting_for_data": {name: spread(0.2) for name in RATES},
    },
    "start-up": {"seconds": {"clipkit --help": spread(0.1), "import open_clip": spread(4.0)}},
    "trains-as-well": {
        "runs": [curve_of(side, seed) for side in ("open_clip", "clipkit") for seed in (0, 1)],
        "difference": {"value": 0.5, "welch": [-1.0, 2.0], "paired": [-2.0, 3.0]},
    },
}  # fmt: skip


def test_every_kind_is_here():
    kinds = {name: function for name, function in DRAWN.items() if name in RESULTS}
    assert set(kinds.values()) == set(DRAWN.values())


@pytest.mark.parametrize("name", RESULTS)
def test_it_is_drawn_and_the_same_again(name, tmp_path):
    path = tmp_path / f"2026-01-01-{name}.json"
    path.write_text(json.dumps({"machine": {"device": "a CPU", "version.torch": "2"}}
                               | RESULTS[name]))  # fmt: skip
    first = draw(DRAWN[name], path)
    assert first.name == f"2026-01-01-{name}.svg"
    drawn = first.read_bytes()
    assert drawn.count(b"<path") > 20
    assert draw(DRAWN[name], path).read_bytes() == drawn
