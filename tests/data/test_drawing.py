"""The drawn data set: the same bytes everywhere, and combinations that training never shows."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from clipkit.data import drawing
from clipkit.data.drawing import (
    BACKGROUNDS,
    CLASS_NAMES,
    COLORS,
    COMBINATIONS,
    HELD_OUT,
    SHAPES,
    captions,
    draw,
    sample,
)
from clipkit.errors import UserError


def test_the_bytes_are_frozen():
    digest = hashlib.sha256()
    for size in (48, 64):
        for split in ("train", "unseen", "test"):
            for index in range(80):
                picture = sample(3, split, index)
                digest.update(draw(picture, size).tobytes())
                digest.update("\n".join(captions(picture)).encode())
    assert digest.hexdigest() == "73baa2b6347bcea2093c28ef46603a529891414723204be2dc38c8d8ffc55fa1"


def test_training_never_shows_a_held_out_combination():
    for split in ("train", "validation"):
        shown = {(d.color, d.shape) for d in (sample(0, split, index) for index in range(300))}
        assert shown == set(COMBINATIONS) - HELD_OUT
    unseen = {(d.color, d.shape) for d in (sample(0, "unseen", index) for index in range(300))}
    assert unseen == HELD_OUT
    assert {sample(0, "test", index).label for index in range(80)} == set(range(80))


def test_training_shows_every_color_and_every_shape_often():
    shown = set(COMBINATIONS) - HELD_OUT
    assert min(Counter(color for color, _ in shown).values()) >= 6
    assert min(Counter(shape for _, shape in shown).values()) >= 8
    assert {color for color, _ in shown} == set(COLORS)
    assert {shape for _, shape in shown} == set(SHAPES)


def test_seed_split_and_index_each_change_the_picture():
    assert sample(0, "train", 7) == sample(0, "train", 7)
    pictures = [
        sample(seed, split, index)
        for seed in (0, 1)
        for split in ("train", "validation", "unseen", "test")
        for index in range(500)
    ]
    assert len({draw(picture, 48).tobytes() for picture in pictures}) == len(pictures)


def test_captions_agree_with_the_picture():
    picture = sample(0, "test", 12)
    texts = captions(picture)
    assert len(set(texts)) == len(drawing.TEMPLATES)
    assert all(picture.color in text and picture.shape in text for text in texts)
    for word in (picture.size, picture.place, picture.background):
        assert word in texts[-1]
    assert CLASS_NAMES[picture.label] == f"{picture.color} {picture.shape}"


def test_the_place_in_words_is_where_the_paint_is():
    for index in range(200):
        picture = sample(5, "train", index)
        image = draw(picture, 96).astype(int)
        painted = np.argwhere((abs(image - np.array(picture.paint)) <= 1).all(axis=2))
        middle = (painted.min(axis=0) + painted.max(axis=0) + 1) / 2 / 96
        for position, place in zip(middle, (picture.row, picture.column), strict=True):
            assert {0: position < 0.5, 1: 0.35 < position < 0.65, 2: position > 0.5}[place]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 48, 224])
def test_shapes_are_whole_and_tell_apart(shape: str, size: int):
    radius = size // 4
    for degrees in (-20, 0, 13):
        mask = drawing._mask(shape, radius, degrees)
        assert mask.max() == 16
        # An empty border: nothing was cut off by the mask's edge.
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()
        others = [drawing._mask(other, radius, degrees) for other in SHAPES if other != shape]
        for other in others:
            differ = abs(mask.astype(int) - other.astype(int)).sum() / 16
            assert differ > 0.1 * (2 * radius) ** 2


@pytest.mark.parametrize("size", [1, 17, 64])
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_any_size_can_be_drawn(size: int, background: str):
    picture = next(
        d for d in (sample(0, "train", i) for i in range(100)) if d.background == background
    )
    image = draw(picture, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


def test_an_unknown_split_is_explained():
    with pytest.raises(UserError, match="'dev' is not one of train, validation, unseen, test"):
        sample(0, "dev", 0)  # type: ignore[arg-type]
