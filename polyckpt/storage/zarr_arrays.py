"""Arrays that Orbax wrote, read with tensorstore alone: zarr of version 2 or 3, in an OCDBT database or as plain files.

An item is a directory with a file `_METADATA`, which lists the path of every leaf and says which of the four it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from polyckpt.dtypes import lookup, size_problem
from polyckpt.errors import AdapterError, CorruptError, StorageError

METADATA = "_METADATA"
MAX_METADATA_BYTES = 1 << 30


class _Key(msgspec.Struct):
    key: str | int
    key_type: int


class _Value(msgspec.Struct):
    value_type: str
    skip_deserialize: bool = False


class _Leaf(msgspec.Struct):
    key_metadata: list[_Key]
    value_metadata: _Value


class _Metadata(msgspec.Struct):
    tree_metadata: dict[str, _Leaf]
    use_ocdbt: bool = True
    use_zarr3: bool = False


@dataclass(frozen=True)
class Found:
    """An array that is there. dtype: a name of polyckpt.dtypes."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Listed:
    """A leaf that `_METADATA` lists: its segments, which of them are indices of a sequence, and what Orbax calls its type."""

    path: tuple[str, ...]
    indices: tuple[bool, ...]
    value_type: str
    is_array: bool


class ZarrArrays:
    """The arrays of one Orbax item. leaves: all that its metadata lists. entries: path -> type and shape of each array."""

    def __init__(self, path: Path) -> None:
        """Read the metadata of the item in the directory `path`, and of each of its arrays; no array yet.

        Raises CorruptError for what is missing or contradicts itself, AdapterError where tensorstore is not installed.
        """
        self.path = path
        metadata = self._metadata()
        self._driver = "zarr3" if metadata.use_zarr3 else "zarr"
        self._in_database = metadata.use_ocdbt
        self.leaves = [_listed(leaf) for leaf in metadata.tree_metadata.values()]
        self._check_names()
        opening = {leaf.path: self._open(leaf.path) for leaf in self.leaves if leaf.is_array}
        self._stores = {leaf: self._opened(leaf, future) for leaf, future in opening.items()}
        self.entries: Mapping[tuple[str, ...], Found] = {leaf: self._found(leaf) for leaf in self._stores}

    def read(self, path: tuple[str, ...]) -> np.ndarray:
        """One array, in memory of its own. Raises CorruptError for what cannot be decoded, or of which a part is missing."""
        try:
            array: np.ndarray = np.asarray(self._stores[path].read().result())
        except Exception as error:
            raise CorruptError(f"{self.path}: {'.'.join(path)}: {_short(error)}") from error
        return array

    def _metadata(self) -> _Metadata:
        source = self.path / METADATA
        try:
            if source.stat().st_size > MAX_METADATA_BYTES:
                raise CorruptError(f"{source}: {source.stat().st_size} bytes; at most {MAX_METADATA_BYTES} are read")
            return msgspec.json.decode(source.read_bytes(), type=_Metadata)
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {source}: {error.strerror}") from error
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise CorruptError(f"{source}: not the metadata of an Orbax item: {error}") from error

    def _check_names(self) -> None:
        """Orbax joins segments with dots, so that two leaves may lie in one place; then one of them is lost."""
        taken: dict[str, tuple[str, ...]] = {}
        for leaf in self.leaves:
            other = taken.setdefault(".".join(leaf.path), leaf.path)
            if other != leaf.path:
                raise CorruptError(
                    f"{self.path}: {list(leaf.path)} and {list(other)} were both written to {'.'.join(leaf.path)!r}, so one of "
                    "them is lost, and which cannot be told"
                )

    def _open(self, path: tuple[str, ...]) -> Any:
        name = ".".join(path)
        base = f"file://{os.path.abspath(self.path)}/"
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if self._in_database else f"{base}{name}/"
        # Without the last, what is missing reads as zeros.
        spec = {"driver": self._driver, "kvstore": store, "fill_missing_data_reads": False}
        return _tensorstore().open(spec, open=True, read=True)

    def _opened(self, path: tuple[str, ...], future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:
            raise CorruptError(f"{self.path}: {'.'.join(path)}: {_short(error)}") from error

    def _found(self, path: tuple[str, ...]) -> Found:
        store = self._stores[path]
        dtype = lookup(store.dtype.numpy_dtype.name, f"{self.path}: {'.'.join(path)}")
        shape = tuple(map(int, store.shape))
        if problem := size_problem(shape, dtype.itemsize):
            raise CorruptError(f"{self.path}: {'.'.join(path)}: {problem}")
        return Found(dtype.name, shape)


_ARRAYS = frozenset({"jax.Array", "np.ndarray", "scalar"})
_SEQUENCE = 1
"""How Orbax marks a key that is an index."""


def _listed(leaf: _Leaf) -> Listed:
    # None, strings and empty containers are kept elsewhere, or are their type alone.
    is_array = leaf.value_metadata.value_type in _ARRAYS and not leaf.value_metadata.skip_deserialize
    return Listed(
        path=tuple(str(key.key) for key in leaf.key_metadata),
        indices=tuple(key.key_type == _SEQUENCE for key in leaf.key_metadata),
        value_type=leaf.value_metadata.value_type,
        is_array=is_array,
    )


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise AdapterError(f"arrays of Orbax need tensorstore: {error}. Install it with: pip install tensorstore") from error
    return tensorstore


def _short(error: Exception) -> str:
    """What tensorstore says, without where in its source it does."""
    return str(error).split(" [source locations", 1)[0][:500]
