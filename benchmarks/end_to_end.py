"""From JPEG files and captions on disk to training steps: clipkit against open_clip's own training.

python -m benchmarks.end_to_end [--data ../shared/data] [--model ViT-S-32] [--steps 8] [--rounds 7]
python -m benchmarks.end_to_end --model tiny --steps 2 --rounds 1 --workers 0   # to see it work

Its extra requirements, open_clip_torch[training], come with the extra `peers`.

The same files and the same list of them, the same towers with the same first weights, the same
number of pairs a step, float32. open_clip: `get_csv_dataset` and `train_one_epoch` of
open_clip_train with its tokenizer, transform, loss, optimiser and schedule. clipkit: its data
module and Lightning's trainer as `fit` has them, without a logger or checkpoints; once plain, once
with `shrink_pictures` and both caches. A round is an epoch of each. Each side takes the number of
loader processes that was best for it in an epoch of each number; every number's time is kept.
open_clip's loader starts its processes anew every epoch, ours keeps them; epochs are short here, so
`share_waiting_for_data` says what that is worth.
Pictures are photos brought to 640 x 480 at quality 90, with grain until the files are as large as
a camera's; each is there several times under other names, with another of its captions.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.decode import photos
from benchmarks.interleaved import add_data, parser, ratio, record, shown, spread, table
from benchmarks.tokens import captions_of, clip_tokenizer
from clipkit.callbacks import Throughput
from clipkit.data import HuggingFacePairs
from clipkit.encoders import TextTransformer, TimmImageEncoder
from clipkit.heads import LinearHead
from clipkit.losses import InfoNCELoss
from clipkit.module import CLIPModule
from clipkit.optim import WarmupCosine
from clipkit.temperature import Temperature

GOALS = {"at_least": 1.8}
SIDES = ("open_clip", "clipkit", "clipkit, cached")
EPOCHS = 1_000_000  # never reached: schedules are far from their end
WARM_UP_STEPS = 2000
SETTINGS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.98), "eps": 1e-6}


class Shape(NamedTuple):
    """An image tower of timm, and a text tower."""

    timm: str
    embed_dim: int
    width: int
    depth: int
    heads: int
    image_size: int = 224


SHAPES = {
    "ViT-S-32": Shape("vit_small_patch32_224", 384, 384, 12, 6),
    "tiny": Shape("test_convnext", 64, 64, 2, 2, image_size=64),
}
"""With `tiny` the towers cost little, so that the data decides."""


@dataclass(frozen=True)
class Contender:
    """A side with a number of loader processes, on some files."""

    side: str
    workers: int
    model: str
    threads: int
    batch: int
    pairs: Path
    cache: Path


class Epoch(NamedTuple):
    """What an epoch took."""

    seconds: float
    waited: float  # share of them, for the next batch
    loss: float  # of the last step


# --- Files ---------------------------------------------------------------------------------------


def write_pairs(folder: Path, data: Path, count: int, grain: float) -> None:
    """Write so many pictures and the list of them, with tabs as open_clip wants it."""
    pictures, captions = photos(data / "coco_mini", grain), captions_of(data)
    rows = []
    for number in range(count + 2):
        path = folder / f"{number:05d}.jpg"
        path.write_bytes(pictures[number % len(pictures)])
        rows.append((str(path), captions[number % len(captions)]))
    # A validation split of its own, so that nothing of the other is held out.
    for split, some in (("train", rows[:count]), ("validation", rows[count:])):
        with (folder / f"{split}.tsv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter="\t").writerows([("filepath", "title"), *some])


# --- open_clip -----------------------------------------------------------------------------------


def peer_of(shape: Shape) -> Any:
    """Return open_clip's model, its weights drawn at random."""
    import open_clip

    torch.manual_seed(0)
    return open_clip.CLIP(
        shape.embed_dim,
        {"timm_model_name": shape.timm, "timm_pool": "", "image_size": shape.image_size},
        {"width": shape.width, "layers": shape.depth, "heads": shape.heads},
        output_dict=True,
    )


def train_open_clip(
    contender: Contender, epochs: Iterator[None], done: Callable[..., None]
) -> None:
    """Train as its `main` does, an epoch each time one is asked for."""
    from open_clip import get_tokenizer, image_transform
    from open_clip.loss import ClipLoss
    from open_clip_train.data import get_csv_dataset
    from open_clip_train.params import parse_args
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    shape = SHAPES[contender.model]
    args = parse_args(
        [
            *("--train-data", str(contender.pairs / "train.tsv"), "--dataset-type", "csv"),
            *("--batch-size", str(contender.batch), "--workers", str(contender.workers)),
            *("--precision", "fp32", "--device", "cpu", "--model", "ViT-S-32"),
        ]
    )
    for name, value in {"distributed": False, "rank": 0, "world_size": 1, "distill": False}.items():
        setattr(args, name, value)
    args.wandb = False
    model = peer_of(shape)
    transform = image_transform(shape.image_size, is_train=True)
    data = get_csv_dataset(args, transform, is_train=True, tokenizer=get_tokenizer("ViT-S-32"))
    data.dataloader = loader = _TimedLoader(data.dataloader)
    named = list(model.named_parameters())
    decayed = [p for n, p in named if not _is_gain_or_bias(n, p)]
    others = [p for n, p in named if _is_gain_or_bias(n, p)]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, **SETTINGS)
    schedule = cosine_lr(optimizer, SETTINGS["lr"], WARM_UP_STEPS, loader.num_batches * EPOCHS)
    loss = _Remembered(ClipLoss())
    for number, _ in enumerate(epochs):
        loader.waited, began = 0.0, time.perf_counter()
        train_one_epoch(model, {"train": data}, loss, number, optimizer, None, schedule, None, args)
        seconds = time.perf_counter() - began
        done(Epoch(seconds, loader.waited / seconds, loss.last))


def _is_gain_or_bias(name: str, parameter: nn.Parameter) -> bool:
    words = ("bn", "ln", "bias", "logit_scale")
    return parameter.ndim < 2 or any(word in name for word in words)


class _TimedLoader:
    """A loader, and how long it was waited for."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.num_samples, self.num_batches = loader.num_samples, loader.num_batches
        self.waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        began = time.perf_counter()
        iterator = iter(self.loader)
        while True:
            batch = next(iterator, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch
            began = time.perf_counter()


class _Remembered(nn.Module):
    """A loss, and its last value."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.last = math.nan

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        losses = self.loss(*arguments, **keywords)
        self.last = float(losses["contrastive_loss"].detach())
        return losses


# --- clipkit -------------------------------------------------------------------------------------


def module_of(shape: Shape) -> CLIPModule:
    """Return our module with open_clip's first weights."""
    module = CLIPModule(
        image_encoder=TimmImageEncoder(shape.timm, image_size=shape.image_size),
        text_encoder=partial(
            TextTransformer, width=shape.width, depth=shape.depth, heads=shape.heads
        ),
        tokenizer=clip_tokenizer(),
        image_head=LinearHead,
        text_head=LinearHead,
        temperature=Temperature(),
        loss=InfoNCELoss(),
        optimizer=partial(torch.optim.AdamW, weight_decay=0.2, **SETTINGS),
        schedule=partial(WarmupCosine, warmup_steps=WARM_UP_STEPS),
        embed_dim=shape.embed_dim,
    )
    own = {"image_encoder.mean", "image_encoder.std"}  # constants, which open_clip's data has
    found = module.load_state_dict(ours_from(peer_of(shape)), strict=False)
    assert set(found.missing_keys) <= own
    assert not found.unexpected_keys
    return module.train()


def ours_from(peer: nn.Module) -> dict[str, Tensor]:
    """Return open_clip's weights under our names."""
    from tests.test_parity import ours_from_theirs

    theirs = peer.state_dict()
    text = {name: value for name, value in theirs.items() if not name.startswith("visual.")}
    found = {}
    for name, value in ours_from_theirs(text).items():
        first, dot, rest = name.partition(".")
        first = {"text": "text_encoder", "log_scale": "temperature.log_scale"}.get(first, first)
        found[first + dot + rest] = value
    for name, value in theirs.items():
        if name.startswith("visual.trunk."):
            found[name.replace("visual.trunk", "image_encoder.trunk")] = value
    found["image_head.projection.weight"] = theirs["visual.head.proj.weight"]
    return found


@torch.no_grad()
def check(shape: Shape) -> None:
    """Refuse to compare models that give different embeddings of the same pairs."""
    peer, module = peer_of(shape).eval(), module_of(shape).eval()
    images = torch.rand(2, 3, shape.image_size, shape.image_size)
    tokens = clip_tokenizer(pad_to_context=True)(["a photo", "two dogs on a green lawn"])
    theirs = peer(module.image_encoder.normalise(images), tokens)
    torch.testing.assert_close(module.encode_image(images), theirs["image_features"])
    torch.testing.assert_close(module.encode_text(tokens), theirs["text_features"])


def data_of(contender: Contender, **arguments: Any) -> HuggingFacePairs:
    """Return clipkit's data module, with what the side has of caches."""
    if contender.side == "clipkit, cached":
        arguments |= {
            "shrink_pictures": True,
            "cache_tokens": True,
            "cache_pictures_gb": 10,
            "cache_folder": str(contender.cache),
        }
    return HuggingFacePairs(
        str(contender.pairs),
        image_column="filepath",
        caption_column="title",
        batch_size=contender.batch,
        num_workers=contender.workers,
        **arguments,
    )


def train_clipkit(contender: Contender, epochs: Iterator[None], done: Callable[..., None]) -> None:
    """Fit, an epoch each time one is asked for."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        limit_val_batches=0,
        log_every_n_steps=100,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Throughput(), _Paced(epochs, done)],
    )
    try:
        trainer.fit(module_of(SHAPES[contender.model]), data_of(contender))
    except StopIteration:
        return


class _Paced(L.Callback):
    """Begins an epoch when it is asked for, and says what it took."""

    def __init__(self, epochs: Iterator[None], done: Callable[..., None]) -> None:
        self._epochs = epochs
        self._done = done
        self._began = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        next(self._epochs)
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = time.perf_counter() - self._began
        values = trainer.callback_metrics
        waited = float(values["throughput/data_wait"])
        self._done(Epoch(seconds, waited, float(values["train/loss"])))


def seconds_to_build(contender: Contender) -> float:
    """Return how long the caches take to be built where there are none."""
    arguments = {"tokenizer": clip_tokenizer(), "image_size": SHAPES[contender.model].image_size}
    plain, cached = (
        data_of(replace(contender, side="clipkit"), **arguments),
        data_of(contender, **arguments),
    )
    seconds = []
    for data in (plain, cached):
        began = time.perf_counter()
        data.setup("fit")
        seconds.append(time.perf_counter() - began)
    return seconds[1] - seconds[0]


# --- In turn -------------------------------------------------------------------------------------


class Running:
    """A contender in a process of its own, which works only while it is asked to."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contender))
        self._process.start()
        theirs.close()
        self.epoch()  # warm up

    def epoch(self) -> Epoch:
        """Have an epoch made."""
        self._connection.send("epoch")
        return Epoch(*self._connection.recv())

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, contender: Contender) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(contender.threads)
    train = train_open_clip if contender.side == "open_clip" else train_clipkit
    train(contender, _asked_for(connection), lambda epoch: connection.send(tuple(epoch)))


def _asked_for(connection: Connection) -> Iterator[None]:
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        yield


def best_of(contenders: list[Contender], stack: ExitStack) -> tuple[Running, dict[str, Any]]:
    """Return the quickest of a side's, and what each number of loader processes took."""
    tried: dict[str, Any] = {}
    best: list[tuple[float, Running]] = []
    for contender in contenders:
        running = Running(contender)
        stack.callback(running.stop)
        epoch = running.epoch()
        tried[str(contender.workers)] = _said(epoch)
        print(f"{contender.side}, {contender.workers} loader processes: {epoch.seconds:.3g} s")
        best = sorted([*best, (epoch.seconds, running)], key=lambda one: one[0])
        for _, slower in best[1:]:
            slower.stop()
        best = best[:1]
    return best[0][1], tried


def _said(epoch: Epoch) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in epoch._asdict().items()}


def in_turn(running: dict[str, Running], rounds: int) -> dict[str, list[Epoch]]:
    """Return the epochs of each, round by round, the order turned around every other round."""
    epochs: dict[str, list[Epoch]] = {side: [] for side in running}
    for number in range(rounds):
        for side in list(running) if number % 2 == 0 else reversed(running):
            epochs[side].append(running[side].epoch())
    return epochs


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what was measured on files that are written now."""
    count = options.steps * options.batch
    (folder / "pairs").mkdir()
    write_pairs(folder / "pairs", options.data, count, options.grain)
    size = sum(file.stat().st_size for file in (folder / "pairs").glob("*.jpg")) / (count + 2)
    first = Contender(
        side="", workers=0, model=options.model, threads=options.threads, batch=options.batch,
        pairs=folder / "pairs", cache=folder / "cache",
    )  # fmt: skip
    building = seconds_to_build(replace(first, side=SIDES[-1]))
    running, tried = {}, {}
    with ExitStack() as stack:
        for side in SIDES:
            choices = [replace(first, side=side, workers=number) for number in options.workers]
            running[side], tried[side] = best_of(choices, stack)
        epochs = in_turn(running, options.rounds)
    seconds = {side: [epoch.seconds for epoch in each] for side, each in epochs.items()}
    return {
        "pairs": count,
        "kilobytes_a_picture": round(size / 1e3, 1),
        "workers": {side: one.contender.workers for side, one in running.items()},
        "pairs_per_second": {s: spread([count / v for v in each]) for s, each in seconds.items()},
        "share_waiting_for_data": {s: spread([e.waited for e in v]) for s, v in epochs.items()},
        "times_as_fast": {side: ratio(seconds["open_clip"], seconds[side]) for side in SIDES[1:]},
        "last_loss": {side: [e.loss for e in each] for side, each in epochs.items()},
        "one_epoch_of_each_number_of_workers": tried,
        "seconds_to_build_the_caches": round(building, 3),
        "must_show": GOALS,
    }


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    options_of = parser(__doc__, rounds=7)
    add_data(options_of)
    options_of.add_argument("--model", choices=SHAPES, default="ViT-S-32")
    options_of.add_argument("--batch", type=int, default=32)
    options_of.add_argument("--steps", type=int, default=8, help="of an epoch")
    options_of.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options_of.add_argument("--grain", type=float, default=8.0, help="in grey levels")
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    check(SHAPES[options.model])
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    path = record("end-to-end", options, result)
    rows = [("contender", "workers", "pairs/s", "waiting for data", "times as fast")]
    for side in SIDES:
        fast = shown(result["times_as_fast"][side]) if side != "open_clip" else ""
        waiting = shown(result["share_waiting_for_data"][side])
        rate = shown(result["pairs_per_second"][side])
        rows.append((side, str(result["workers"][side]), rate, waiting, fast))
    table(rows)
    print(path)


if __name__ == "__main__":
    main()
