"""What evaluation sees of a stream: the first pairs of a split, or some that are held out."""

import heapq
import shutil
from pathlib import Path

from clipkit.data.streaming import heads
from clipkit.data.streaming.heads import HELD_OUT

from .conftest import windows


def test_held_out_pictures_are_never_trained(pairs, write):
    path = write("tar", [60, 50, 40])
    found = []
    for maximum in (5, 1000):
        data = pairs(path, max_validation_pairs=maximum)
        held = data.load("validation")
        assert len(held) == min(maximum, 150 // HELD_OUT)
        trained = {row.picture for w in windows(data.stream()) for row in w.rows}
        assert not trained & {row.image for row in held}
        assert len(trained) == 150 - len(held)
        assert f"{len(held)} held out as validation" in data.describe()
        found.append([row.key for row in held])
    # Among the first of the first shard, where few are wanted.
    assert all(key.startswith("0-") for key in found[0])


def test_what_is_held_out_is_bounded(pairs, write, monkeypatch):
    """While it is looked for, no more is in memory than there may be in the end."""
    path = write("tar", [60, 50, 40])
    push, taken = heapq.heappush, []

    def pushed(heap, entry):
        push(heap, entry)
        taken.append(sum(row.size for _, _, row in heap))

    most = 400
    monkeypatch.setattr(heads, "_MOST_BYTES", most)
    monkeypatch.setattr(heads.heapq, "heappush", pushed)
    held = pairs(path, max_validation_pairs=30).load("validation")
    assert max(taken) <= most + max(len(row.image) for row in held)
    assert len(held) > 1


def test_a_picture_is_on_one_side_only(pairs, write):
    """Also where another shard holds it once more."""
    path = Path(write("tar", [40, 40]))
    shutil.copy(path / "train-000.tar", path / "train-002.tar")
    data = pairs(str(path), max_validation_pairs=3)
    trained = [row.picture for w in windows(data.stream()) for row in w.rows]
    assert not {row.image for row in data.load("validation")} & set(trained)
    assert len(trained) == 120 - 2 * 3


def test_a_validation_split(pairs, write):
    path = Path(write("parquet", [40, 30]))
    (path / "train-001.parquet").rename(path / "validation-000.parquet")
    data = pairs(str(path), max_validation_pairs=7)
    held = data.load("validation")
    assert [row.captions for row in held] == [[f"picture {n} of shard 1"] for n in range(7)]
    assert held.column("id") == [f"1-{n}" for n in range(7)]
    assert sum(len(w.rows) for w in windows(data.stream())) == 40
    assert len(data.evaluation_rows("train")) == 7


def test_the_same_whatever_the_layout(pairs, write):
    found = {
        layout: sorted(row.captions[0] for row in pairs(write(layout, [60, 50], layout)).load(
            "validation"))
        for layout in ("parquet", "arrow", "tar")
    }  # fmt: skip
    assert found["parquet"] == found["arrow"] == found["tar"]


def test_validate_from_the_checkpoint_alone(workdir, command, write):
    path = write("tar", [60, 50])
    words = ["--data.streaming.shuffle_window=16", "--data.streaming.steps_per_epoch=3"]
    recipe = ["fit", "-c", "base", "-c", "tiny.yaml", "--run_name=run"]
    assert command(*recipe, f"--data.dataset={path}", *words) == 0
    assert command("validate", "--ckpt_path", "runs/tiny/run/checkpoints/last.ckpt") == 0
