"""Pieces that are computed of others, where two models hold the same in different terms.

A kernel under weight norm is held as a direction and a norm (Salimans and Kingma 2016), under spectral norm raw, with the
singular vectors that its largest singular value is computed of (Miyato et al. 2018); averages that began at zero are put right
by the number of their updates (Kingma and Ba 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyckpt.layouts import Piece
from polyckpt.units import Unit

Compute = Callable[[Sequence[np.ndarray]], np.ndarray]
"""From canonical float64 arrays to one."""


@dataclass(frozen=True)
class Formula:
    """How `role` of a unit is made of its `inputs`. bind: takes the pieces of these, the wanted one, and the config."""

    role: str
    inputs: tuple[str, ...]
    bind: Callable[[Sequence[Piece], Piece, Mapping[str, Any]], Compute]


def _names(piece: Piece) -> list[str]:
    return [" ".join(group) for group in piece.order]


def _norm(kernel: np.ndarray, names: Sequence[str], kept: Sequence[str], epsilon: float = 0.0) -> np.ndarray:
    """The norm over all axes but those `kept`, which stay as axes of size one."""
    over = tuple(place for place, name in enumerate(names) if name not in kept)
    found: np.ndarray = np.sqrt(np.sum(np.square(kernel), axis=over, keepdims=True) + epsilon)
    return found


def _of_direction(pieces: Sequence[Piece], wanted: Piece, config: Mapping[str, Any]) -> Compute:
    names, kept = _names(pieces[0]), _names(pieces[1])
    epsilon = float(config.get("norm_epsilon", 0.0))

    def compute(arrays: Sequence[np.ndarray]) -> np.ndarray:
        direction, norm = arrays
        shape = [size if name in kept else 1 for name, size in zip(names, direction.shape, strict=True)]
        kernel: np.ndarray = direction / _norm(direction, names, kept, epsilon) * norm.reshape(shape)
        return kernel

    return compute


def _of_raw(pieces: Sequence[Piece], wanted: Piece, config: Mapping[str, Any]) -> Compute:
    names, (kept,) = _names(pieces[0]), _names(pieces[1])

    def compute(arrays: Sequence[np.ndarray]) -> np.ndarray:
        raw, left, right = arrays
        matrix = np.moveaxis(raw, names.index(kept), 0).reshape(len(left), -1)
        kernel: np.ndarray = raw / (left @ matrix @ right)
        return kernel

    return compute


def _norm_of(pieces: Sequence[Piece], wanted: Piece, config: Mapping[str, Any]) -> Compute:
    names, kept = _names(pieces[0]), _names(wanted)
    return lambda arrays: _norm(arrays[0], names, kept).reshape(wanted.shape)


def _same(pieces: Sequence[Piece], wanted: Piece, config: Mapping[str, Any]) -> Compute:
    return lambda arrays: arrays[0]


def _put_right(pieces: Sequence[Piece], wanted: Piece, config: Mapping[str, Any]) -> Compute:
    momentum = float(config["momentum"])

    def compute(arrays: Sequence[np.ndarray]) -> np.ndarray:
        average, updates = arrays
        return average / (1 - momentum ** float(updates)) if updates > 0 else average

    return compute


FORMULAS = (
    Formula("kernel", ("kernel_direction", "kernel_norm"), _of_direction),
    Formula("kernel", ("kernel_raw", "kernel_u", "kernel_v"), _of_raw),
    Formula("kernel_direction", ("kernel",), _same),
    Formula("kernel_norm", ("kernel",), _norm_of),
    Formula("mean", ("mean_biased", "mean_updates"), _put_right),
    Formula("variance", ("variance_biased", "mean_updates"), _put_right),
)

HELPERS = frozenset({"kernel_norm", "kernel_u", "kernel_v"})
"""Roles that say what becomes of a kernel."""


def making(source: Unit, target: Unit, role: str) -> Formula | None:
    """The formula that makes `role` of the target of what the source holds, where it lacks that."""
    if role in source.pieces:
        return None
    for formula in FORMULAS:
        if formula.role == role and all(name in source.pieces for name in formula.inputs):
            first, wanted = source.pieces[formula.inputs[0]], target.pieces[role]
            if role == "kernel_norm" or first.shape == wanted.shape:
                return formula
    return None
