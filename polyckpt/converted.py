"""Tensors that stand where stored ones do: made of those by a plan when they are read, or held for the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from polyckpt.checkpoint import StoredTensor
from polyckpt.checksums import checksum
from polyckpt.dtypes import lookup
from polyckpt.errors import PlanError
from polyckpt.layouts import aligned, contiguous
from polyckpt.leaves import Leaf
from polyckpt.moves import Exactness, Move


class Converted(StoredTensor):
    """A tensor that is made of stored ones by a plan, when it is read."""

    def __init__(
        self, name: str, dtype: str, shape: tuple[int, ...], moves: Sequence[Move], stored: Mapping[str, StoredTensor]
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._moves, self._stored = moves, stored
        covered = sum(math.prod(move.target.shape) for move in moves)
        if covered != math.prod(shape):
            raise PlanError(f"{name}: the plan gives {covered} of its {math.prod(shape)} elements")

    @property
    def checksums(self) -> tuple[str, ...]:
        return (checksum(self.raw().data),)

    def locate(self) -> None:
        for source in self._sources():
            source.locate()

    def verify(self) -> None:
        for source in self._sources():
            source.verify()

    def _sources(self) -> list[StoredTensor]:
        return [self._stored[name] for name in {piece.tensor for move in self._moves for piece in move.sources}]

    def raw(self) -> np.ndarray:
        return self.numpy().reshape(-1).view(np.uint8)

    def numpy(self) -> np.ndarray:
        return contiguous(self.strided())

    def strided(self) -> np.ndarray:
        """The tensor in the layout of the live model: a view of the stored one where only axes were moved."""
        dtype = lookup(self.dtype, self.name).numpy
        if self._is_one_view:
            (move,) = self._moves
            (source,) = move.sources
            value = aligned(source, self._stored[source.tensor].numpy(), move.target)
            return move.target.whole(value).astype(dtype, copy=False)
        whole = np.empty(self.shape, dtype)
        for move in self._moves:
            move.target.view(whole)[...] = self._value(move)
        return whole

    @property
    def _is_one_view(self) -> bool:
        pieces = [piece for move in self._moves for piece in (move.target, *move.sources)]
        return len(pieces) == 2 and self._moves[0].exactness == Exactness.EXACT and all(piece.sign > 0 for piece in pieces)

    def _value(self, move: Move) -> Any:
        if not move.sources:
            return move.constant
        if move.formula:
            wide = [piece.view(self._stored[piece.tensor].numpy()).astype(np.float64) for piece in move.sources]
            made = move.formula([array.reshape(piece.shape) for array, piece in zip(wide, move.sources, strict=True)])
            return made.reshape([size for group in move.target.factors for size in group])
        terms = [aligned(piece, self._stored[piece.tensor].numpy(), move.target) for piece in move.sources]
        terms = [-term if piece.sign != move.target.sign else term for piece, term in zip(move.sources, terms, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total + np.asarray(move.constant * move.target.sign, total.dtype) if move.constant else total


class Held(StoredTensor):
    """The values of a live tensor, whatever becomes of it: a copy where it can change."""

    def __init__(self, name: str, leaf: Leaf) -> None:
        self.name, self.dtype, self.shape = name, leaf.dtype, leaf.shape
        values = leaf.read()
        self._bytes = (values if leaf.frozen else values.copy()).reshape(-1).view(np.uint8)

    @property
    def checksums(self) -> tuple[str, ...]:
        return (checksum(self._bytes.data),)

    def locate(self) -> None:
        return

    def verify(self) -> None:
        return

    def raw(self) -> np.ndarray:
        return self._bytes


class Made(StoredTensor):
    """A tensor that is computed when it is read. `sources` are verified in its stead."""

    def __init__(
        self, name: str, dtype: str, shape: tuple[int, ...], compute: Callable[[], np.ndarray], *sources: StoredTensor
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._compute, self._sources = compute, sources

    @property
    def checksums(self) -> tuple[str, ...]:
        return (checksum(self.raw().data),)

    def locate(self) -> None:
        for source in self._sources:
            source.locate()

    def verify(self) -> None:
        for source in self._sources:
            source.verify()

    def raw(self) -> np.ndarray:
        return self.numpy().reshape(-1).view(np.uint8)

    def numpy(self) -> np.ndarray:
        made = np.asarray(self._compute(), lookup(self.dtype, self.name).numpy)
        return contiguous(made.reshape(self.shape)) if made.ndim else np.full(self.shape, made)
