"""Files of eqx.tree_serialise_leaves: whose arrays they hold, told by a live model in the order of its leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox
import numpy as np
from numpy.lib import format as npy

from polyckpt.adapter import Contents
from polyckpt.adapters.jax import arrays, trees
from polyckpt.dtypes import lookup
from polyckpt.errors import CorruptError, MismatchError, Problem, UnsupportedError
from polyckpt.formats.described import Like
from polyckpt.formats.writing import Source
from polyckpt.leaves import Leaf


def read(path: Path, like: Like | None) -> Contents:
    """The arrays of a file as the leaves of `like`, in order.

    Raises UnsupportedError without one, MismatchError where they differ, CorruptError for a file that is not whole.
    """
    if like is None:
        raise UnsupportedError(f"{path}: its arrays have no names: pass like= a model of the class that was saved")
    streams = list(_streams(path))
    entries = [entry for entry in trees.entries(like.model, "like").values() if _is_written(entry.value)]
    if len(streams) != len(entries):
        raise MismatchError(f"{path}: holds {len(streams)} arrays, the live model has {len(entries)} leaves")
    found, problems = {}, []
    for (dtype, shape, start), entry in zip(streams, entries, strict=True):
        live = arrays.leaf(entry.value, entry.name) if arrays.is_array(entry.value) else None
        wanted = (live.dtype, live.shape) if live else (np.asarray(entry.value).dtype.name, ())
        # NumPy has no name for bfloat16 and its like, and writes their bytes alone.
        name = wanted[0] if dtype.kind == "V" and dtype.itemsize == lookup(wanted[0], entry.name).itemsize else dtype.name
        if (name, shape) != wanted and (live is not None or shape):
            problems.append(
                Problem("shape", "weights", entry.name, stored=f"{name}{list(shape)}", live=f"{wanted[0]}{list(wanted[1])}")
            )
        found[entry.name] = _leaf(path, name, shape, start)
    if problems:
        raise MismatchError(f"{path}: its arrays are not those of the live model:", problems)
    described = like.captured
    weights = {name: dataclasses.replace(found[name], kind=leaf.kind) for name, leaf in described.weights.items()}
    values = {
        name: type(value)(_number(found[name])) if name in found else value
        for name, value in described.native["values"].items()
    }
    model = dataclasses.replace(described, weights=weights, native={**described.native, "values": values}, rng=None)
    return Contents(adapter="jax", model=model)


def _is_written(value: Any) -> bool:
    """Whether Equinox writes such a leaf."""
    return arrays.is_array(value) or isinstance(value, bool | int | float | complex)


def _streams(path: Path) -> Iterator[tuple[np.dtype, tuple[int, ...], int]]:
    """Type and shape of each array, and where its bytes begin."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:
            try:
                version = npy.read_magic(file)
                header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, fortran, dtype = header(file)
            except (ValueError, EOFError) as error:
                raise CorruptError(f"{path}: at byte {file.tell()} no array that NumPy saved: {error}") from error
            if dtype.hasobject or (fortran and len(shape) > 1):
                raise UnsupportedError(
                    f"{path}: an array of {dtype}, pickled or column by column, which Equinox does not write"
                )
            start = file.tell()
            end = start + math.prod(shape) * dtype.itemsize
            if end > size:
                raise CorruptError(f"{path}: an array of {dtype}{list(shape)} ends at byte {end}, the file at {size}")
            yield dtype, shape, start
            file.seek(end)


def _leaf(path: Path, name: str, shape: tuple[int, ...], start: int) -> Leaf:
    dtype = lookup(name, str(path))

    def read_bytes() -> np.ndarray:
        return np.frombuffer(_part(path, start, math.prod(shape) * dtype.itemsize), np.uint8)

    return Leaf(dtype=name, shape=shape, read=read_bytes, frozen=True)


def _part(path: Path, start: int, size_bytes: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise CorruptError(f"{path}: ended at byte {start + len(data)}")
    return data


def _number(leaf: Leaf) -> Any:
    return leaf.read().view(lookup(leaf.dtype, "").numpy)[0].item()


def write(source: Source, target: Path) -> None:
    """Write the live model as Equinox does. Raises UnsupportedError without one."""
    if source.model is None:
        raise UnsupportedError("Equinox writes its files from a live model alone: pass one to load into (model=, --like)")
    equinox.tree_serialise_leaves(target, source.model)
