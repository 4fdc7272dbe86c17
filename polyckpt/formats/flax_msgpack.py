"""MessagePack as flax.serialization writes it: nested dicts with arrays as extensions, read without Flax."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from polyckpt import names
from polyckpt.adapter import Contents
from polyckpt.dtypes import lookup, size_problem
from polyckpt.errors import CheckpointError, CorruptError, UnsupportedError
from polyckpt.formats import safetensors
from polyckpt.formats.described import Like
from polyckpt.formats.detyped import Tree, contents_of, leaf_of
from polyckpt.formats.table import Format
from polyckpt.leaves import Leaf

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
"""Types of extensions, as flax.serialization numbers them."""

_CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH = 200


def recognises(path: Path) -> bool:
    """Whether it begins as a map with a text for its first key does, and as no other file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(8)
    if not start or not (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return False
    key = start[{0xDE: 3, 0xDF: 5}.get(start[0], 1) :][:1]
    return bool(key) and (0xA0 <= key[0] <= 0xBF or key[0] in (0xD9, 0xDA, 0xDB)) and not safetensors.recognises(path)


def read(path: Path, like: Like | None) -> Contents:
    """The tree in a file. Raises CorruptError for what Flax does not write."""
    try:
        tree = msgspec.msgpack.decode(path.read_bytes(), ext_hook=_extension)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise CorruptError(f"{path}: not a tree that Flax wrote: {error}") from error
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from error
    left_out: list[str] = []
    texts: dict[str, str] = {}
    leaves: dict[str, Leaf] = {}
    for name, leaf in _leaves(str(path), tree, (), texts, left_out):
        if name in leaves:
            raise CorruptError(f"{path}: {name}: two keys of one map are written alike")
        leaves[name] = leaf
    return contents_of(str(path), Tree(leaves, texts), like, left_out)


def _extension(code: int, data: memoryview) -> Any:
    if code in (_ARRAY, _SCALAR):
        shape, name, values = msgspec.msgpack.decode(data, type=tuple[tuple[int, ...], str, bytes])
        dtype = lookup("bool" if name == "bool_" else name, "an array")
        if problem := size_problem(shape, dtype.itemsize):
            raise CorruptError(f"an array of {problem}")
        if len(values) != math.prod(shape) * dtype.itemsize:
            raise CorruptError(f"an array of {name}{list(shape)} has {len(values)} bytes")
        return np.frombuffer(values, dtype.numpy).reshape(shape)
    if code == _COMPLEX:
        return complex(*msgspec.msgpack.decode(data, type=tuple[float, float]))
    raise CorruptError(f"an extension of type {code}, which Flax does not write")


def _leaves(
    where: str, tree: Any, path: tuple[str, ...], texts: dict[str, str], left_out: list[str]
) -> Iterator[tuple[str, Leaf]]:
    name = names.join(path)
    if len(path) > MAX_DEPTH:
        raise CorruptError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(tree, dict) and _CHUNKED in tree:
        yield name, _array_leaf(_joined(f"{where}: {name}", tree))
    elif isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, child in pairs:
            yield from _leaves(where, child, (*path, str(key)), texts, left_out)
    elif isinstance(tree, np.ndarray):
        yield name, _array_leaf(tree)
    elif isinstance(tree, bool | int | float | complex):
        yield name, leaf_of(tree)
    elif isinstance(tree, str):
        texts[name] = tree
    elif tree is not None:
        left_out.append(f"{name}: {tree!r:.80}, which is no array")


def _array_leaf(array: np.ndarray) -> Leaf:
    return Leaf(dtype=array.dtype.name, shape=array.shape, read=lambda: array, frozen=True)


def _joined(where: str, tree: dict[str, Any]) -> np.ndarray:
    """An array that was too large for one extension."""
    try:
        shape = tuple(int(tree["shape"][str(axis)]) for axis in range(len(tree["shape"])))
        chunks = [tree["chunks"][str(index)] for index in range(len(tree["chunks"]))]
        if len({chunk.dtype for chunk in chunks}) > 1:
            raise ValueError(f"chunks of several types: {', '.join(sorted({str(chunk.dtype) for chunk in chunks}))}")
        if size_problem(shape, 1) or sum(chunk.size for chunk in chunks) != math.prod(shape):
            raise ValueError(f"chunks of {[chunk.size for chunk in chunks]} elements for shape {list(shape)}")
        return np.concatenate(chunks).reshape(shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{where}: not the chunks of an array: {error}") from error


FILE = Format(
    name="msgpack",
    title="a MessagePack file of Flax",
    adapter="jax",
    recognises=recognises,
    reader="polyckpt.formats.flax_msgpack:read",
    writer="polyckpt.adapters.jax.flax_files:write_msgpack",
    suffixes=(".msgpack",),
    needs="polyckpt[jax]",
)
