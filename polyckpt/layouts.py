"""From a stored layout to a wanted one: pieces of tensors as views with named axes, moved without intermediate copies.

A piece is a part of a tensor with a meaning of its own: all of it, the rows of one gate, the queries of a packed projection.
Both sides of a conversion describe their pieces in one canonical order of axes; moving one is then an assignment between two
views. An axis that one side holds merged, "(head hd)", and the other whole, "out", is split where both can be split.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Axes = tuple[tuple[str, ...], ...]
"""Each axis as the elementary ones that are merged in it, as `layers.axes` gives them."""


@dataclass(frozen=True)
class Piece:
    """A part of `tensor`.

    axes: those of the tensor. sizes: of each elementary axis. pick: the index or the range (start, stop) that the piece has of
    an axis. order: the canonical axes of the piece, each made of elementary ones; () is an axis of size one. flip: axes that
    run backwards in the tensor. sign: -1 where the tensor holds the negative.
    """

    tensor: str
    axes: Axes
    sizes: Mapping[str, int]
    order: Axes
    pick: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    flip: frozenset[str] = frozenset()
    sign: int = 1

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of the elementary axes of each canonical axis."""
        return tuple(tuple(self._size(axis) for axis in group) for group in self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape."""
        return tuple(math.prod(group) for group in self.factors)

    def view(self, array: np.ndarray) -> np.ndarray:
        """The piece of `array` with its elementary axes in canonical order. Shares memory where `array` is contiguous."""
        names = [axis for group in self.axes for axis in group]
        split = array.reshape([self.sizes[axis] if axis != "1" else 1 for axis in names])
        index: list[int | slice] = []
        for axis in names:
            picked = 0 if axis == "1" else self.pick.get(axis, slice(None))
            index.append(slice(*picked) if isinstance(picked, tuple) else picked)
        left = [axis for axis, place in zip(names, index, strict=True) if isinstance(place, slice)]
        wanted = [axis for group in self.order for axis in group]
        view = split[(*index, ...)].transpose([left.index(axis) for axis in wanted])
        turned: np.ndarray = view[self._flips(wanted)]
        return turned

    def whole(self, value: np.ndarray) -> np.ndarray:
        """The tensor whose view is `value`, for a piece that is all of it. Copies only where axes must be merged."""
        names = [axis for group in self.axes for axis in group if axis not in self.pick and axis != "1"]
        wanted = [axis for group in self.order for axis in group]
        value = value[self._flips(wanted)]
        sizes = [math.prod(1 if axis == "1" else self.sizes[axis] for axis in group) for group in self.axes]
        return value.transpose([wanted.index(axis) for axis in names]).reshape(sizes)

    def _flips(self, axes: Sequence[str]) -> Any:
        """An index that turns what runs backwards; with "..." it gives an array even where there are no axes."""
        return (*(slice(None, None, -1) if axis in self.flip else slice(None) for axis in axes), ...)

    def _size(self, axis: str) -> int:
        picked = self.pick.get(axis)
        return picked[1] - picked[0] if isinstance(picked, tuple) else self.sizes[axis]


_BLOCK = 128
_LARGE_BYTES = 1 << 18


def contiguous(view: np.ndarray) -> np.ndarray:
    """`view` in row-major order: itself, or a copy made block by block, since NumPy's own walks memory against the cache.

    >>> contiguous(np.arange(6).reshape(2, 3).T).strides
    (16, 8)
    """
    wide = [axis for axis in range(view.ndim) if view.shape[axis] > 1]
    nearest = min(wide, key=lambda axis: abs(view.strides[axis]), default=None)
    if nearest is None or nearest == wide[-1] or view.nbytes < _LARGE_BYTES:
        return np.ascontiguousarray(view).reshape(view.shape)  # which makes one axis of none
    copy = np.empty(view.shape, view.dtype)

    def fill(start: int) -> None:
        index = [slice(None)] * view.ndim
        index[nearest] = slice(start, start + _BLOCK)
        for other in range(0, view.shape[wide[-1]], _BLOCK):
            index[wide[-1]] = slice(other, other + _BLOCK)
            copy[tuple(index)] = view[tuple(index)]

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(0, view.shape[nearest], _BLOCK)):
            pass
    return copy


def aligned(source: Piece, array: np.ndarray, target: Piece) -> np.ndarray:
    """The piece `source` of `array`, split as `target` is: of the shape of a view by `target`. Copies only where it must.

    >>> kernel = np.arange(6).reshape(2, 3)
    >>> stored = Piece("w", (("out",), ("in",)), {"out": 2, "in": 3}, order=(("in",), ("out",)))
    >>> wanted = Piece("k", (("in",), ("a", "b")), {"in": 3, "a": 2, "b": 1}, order=(("in",), ("a", "b")))
    >>> aligned(stored, kernel, wanted).shape
    (3, 2, 1)
    """
    if source.shape != target.shape:
        raise ValueError(f"{source.tensor} {source.shape} against {target.tensor} {target.shape}")
    # NumPy splits and merges the axes of a view without a copy wherever strides allow it.
    return source.view(array).reshape([size for group in target.factors for size in group])
