"""Files of eqx.tree_serialise_leaves: whose arrays they hold, told by a live model in the order of its leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import equinox
import numpy as np
from msgspec import structs

from polyckpt.adapter import Contents
from polyckpt.adapters.jax import arrays, trees
from polyckpt.dtypes import lookup, size_problem
from polyckpt.errors import CorruptError, MismatchError, Problem, UnsupportedError
from polyckpt.formats import npz
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
    for stream, entry in zip(streams, entries, strict=True):
        live = arrays.leaf(entry.value, entry.name) if arrays.is_array(entry.value) else None
        dtype, shape = (live.dtype, live.shape) if live else (np.asarray(entry.value).dtype.name, ())
        leaf = found[entry.name] = _leaf(path, stream, dtype)
        if (leaf.dtype, leaf.shape) != (dtype, shape):
            kind: Literal["shape", "dtype"] = "shape" if leaf.shape != shape else "dtype"
            stored = f"{leaf.dtype}{list(leaf.shape)}"
            problems.append(Problem(kind, "weights", entry.name, stored=stored, live=f"{dtype}{list(shape)}"))
    if problems:
        raise MismatchError(f"{path}: its arrays are not those of the live model:", problems)
    described = like.captured
    weights = {name: structs.replace(found[name], kind=leaf.kind) for name, leaf in described.weights.items()}
    values = {
        name: type(value)(_number(found[name])) if name in found else value
        for name, value in described.native["values"].items()
    }
    model = dataclasses.replace(described, weights=weights, native={**described.native, "values": values}, rng=None)
    return Contents(adapter="jax", model=model)


def _is_written(value: Any) -> bool:
    """Whether Equinox writes such a leaf."""
    return arrays.is_array(value) or isinstance(value, bool | int | float | complex)


@dataclass(frozen=True)
class _Stream:
    """An array in a file. start: where its bytes begin. fortran: whether they go column by column."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _streams(path: Path) -> Iterator[_Stream]:
    """The arrays of a file, one after the other."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:
            begin = file.tell()
            try:
                shape, fortran, dtype = npz.header(file)
            except ValueError as error:
                raise CorruptError(f"{path}: at byte {begin}: {error}") from error
            if dtype.hasobject:
                raise UnsupportedError(f"{path}: an array of Python objects, which are pickled; Equinox writes none")
            if problem := size_problem(shape, dtype.itemsize):
                raise CorruptError(f"{path}: at byte {begin}: an array: {problem}")
            stream = _Stream(dtype, shape, fortran, file.tell())
            if stream.start + stream.size_bytes > size:
                end = stream.start + stream.size_bytes
                raise CorruptError(f"{path}: an array of {dtype}{list(shape)} ends at byte {end}, the file at {size}")
            yield stream
            file.seek(stream.start + stream.size_bytes)


def _leaf(path: Path, stream: _Stream, wanted: str) -> Leaf:
    """An array as a leaf. wanted: the type of the live one."""
    name, little = stream.dtype.name, stream.dtype.newbyteorder("<")
    # NumPy has no name for bfloat16 and its like, and writes their bytes alone.
    if stream.dtype.kind == "V" and stream.dtype.itemsize == lookup(wanted, str(path)).itemsize:
        name = wanted

    def read_array() -> np.ndarray:
        data = np.frombuffer(_part(path, stream.start, stream.size_bytes), stream.dtype)
        array = data.reshape(stream.shape, order="F" if stream.fortran else "C").astype(little, copy=False)
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    return Leaf(dtype=lookup(name, str(path)).name, shape=stream.shape, read=read_array, frozen=True)


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
