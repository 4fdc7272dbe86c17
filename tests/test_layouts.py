"""Pieces of tensors: any layout to any other one, against the plain meaning of named axes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyckpt.layouts import Piece, aligned, contiguous

NAMES = "abcde"


@st.composite
def layouts(draw: Any) -> tuple[dict[str, int], list[list[str]], list[list[str]]]:
    """Sizes of named axes, and two tensors' axes that merge and order them each in its own way."""
    names = list(NAMES[: draw(st.integers(1, 5))])
    sizes = {name: draw(st.integers(1, 4)) for name in names}
    both = []
    for _ in range(2):
        order = draw(st.permutations(names))
        cuts = sorted(draw(st.sets(st.integers(1, len(names) - 1)))) if len(names) > 1 else []
        both.append([order[a:b] for a, b in itertools.pairwise([0, *cuts, len(names)])])
    return sizes, both[0], both[1]


def named(sizes: dict[str, int]) -> np.ndarray:
    """The value at each place of the named axes, in their alphabetical order."""
    return np.arange(math.prod(sizes.values())).reshape([sizes[name] for name in sorted(sizes)])


def stored(values: np.ndarray, sizes: dict[str, int], axes: list[list[str]]) -> np.ndarray:
    """The tensor of the layout `axes`, made by transposing alone."""
    names = sorted(sizes)
    order = [names.index(name) for group in axes for name in group]
    return values.transpose(order).reshape([math.prod(sizes[name] for name in group) for group in axes])


def piece(sizes: dict[str, int], axes: list[list[str]], **options: Any) -> Piece:
    order = tuple((name,) for name in sorted(sizes) if name not in options.get("pick", {}))
    return Piece("w", tuple(map(tuple, axes)), sizes, order, **options)


@given(layouts())
def test_any_layout_becomes_any_other_one(case: tuple[dict[str, int], list[list[str]], list[list[str]]]) -> None:
    sizes, one, other = case
    values = named(sizes)
    source, target = piece(sizes, one), piece(sizes, other)
    moved = aligned(source, stored(values, sizes, one), target)
    assert np.array_equal(moved, values)
    assert np.array_equal(target.whole(moved), stored(values, sizes, other))
    filled = np.empty_like(stored(values, sizes, other))
    target.view(filled)[...] = moved
    assert np.array_equal(filled, stored(values, sizes, other))


@given(layouts(), st.data())
def test_a_part_of_a_packed_tensor(case: tuple[dict[str, int], list[list[str]], list[list[str]]], data: Any) -> None:
    sizes, one, other = case
    values = named(sizes)
    packed = data.draw(st.sampled_from(sorted(sizes)))
    place = data.draw(st.integers(0, sizes[packed] - 1))
    source = piece(sizes, one, pick={packed: place})
    alone = {name: size for name, size in sizes.items() if name != packed}
    target = piece(alone, [[name for name in group if name != packed] for group in other if group != [packed]])
    expected = values.take(place, axis=sorted(sizes).index(packed))
    assert np.array_equal(aligned(source, stored(values, sizes, one), target), expected)
    assert source.shape == expected.shape


@given(layouts(), st.data())
def test_what_runs_backwards_is_turned(case: tuple[dict[str, int], list[list[str]], list[list[str]]], data: Any) -> None:
    sizes, one, other = case
    flipped = frozenset(data.draw(st.sets(st.sampled_from(sorted(sizes)))))
    values = named(sizes)
    backwards = np.flip(values, [sorted(sizes).index(name) for name in flipped])
    source, target = piece(sizes, one, flip=flipped), piece(sizes, other, flip=flipped)
    assert np.array_equal(aligned(source, stored(backwards, sizes, one), piece(sizes, other)), values)
    assert np.array_equal(target.whole(values), stored(backwards, sizes, other))


def test_an_axis_that_one_side_holds_merged() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.random((3, 4, 5))  # in head hd
    source = Piece("w", (("in",), ("head",), ("hd",)), {"in": 3, "head": 4, "hd": 5}, (("in",), ("head", "hd")))
    target = Piece("k", (("out",), ("in",)), {"out": 20, "in": 3}, (("in",), ("out",)))
    there = target.whole(aligned(source, kernel, target))
    assert np.array_equal(there, kernel.reshape(3, 20).T)
    assert np.array_equal(source.whole(aligned(target, np.ascontiguousarray(there), source)), kernel)


def test_moving_axes_copies_nothing() -> None:
    kernel = np.zeros((6, 4, 3, 3))
    source = Piece("w", tuple((a,) for a in "oikl"), dict(zip("oikl", kernel.shape, strict=True)), tuple((a,) for a in "oikl"))
    target = Piece("k", tuple((a,) for a in "klio"), dict(zip("oikl", kernel.shape, strict=True)), tuple((a,) for a in "oikl"))
    assert np.shares_memory(target.whole(aligned(source, kernel, target)), kernel)


@pytest.mark.parametrize("shape", [(300, 517), (129, 5, 260), (3, 3, 130, 257), (1, 700, 1, 130), (70_001,)])
def test_a_copy_in_blocks_is_a_copy(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).random(shape)
    for order in itertools.islice(itertools.permutations(range(len(shape))), 12):
        view = values.transpose(order)
        copy = contiguous(view)
        assert copy.flags.c_contiguous and np.array_equal(copy, view)
    assert np.array_equal(contiguous(values[::-1]), values[::-1])
    assert contiguous(np.array(7)).shape == ()


def test_scalars_and_axes_of_size_one() -> None:
    scalar = Piece("count", (), {}, ())
    assert aligned(scalar, np.array(7), scalar) == 7 and scalar.whole(np.array(7)).shape == ()
    bias = Piece("b", (("out",), ("1",), ("1",)), {"out": 3}, (("out",),))
    plain = Piece("b", (("out",),), {"out": 3}, (("out",),))
    assert aligned(bias, np.arange(3).reshape(3, 1, 1), plain).tolist() == [0, 1, 2]
    assert bias.whole(np.arange(3)).shape == (3, 1, 1)
