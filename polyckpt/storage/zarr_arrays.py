"""Arrays that Orbax wrote, read with tensorstore alone: zarr of version 2 or 3, in an OCDBT database or as plain files.

An item is a directory with a file `_METADATA`, which lists the path of every leaf and says which of the four it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from polyckpt.dtypes import lookup, size_problem
from polyckpt.errors import AdapterError, CheckpointError, CorruptError, StorageError, UnsupportedError

METADATA = "_METADATA"
MAX_METADATA_BYTES = 1 << 30
MAX_DEPTH = 200
_STRINGS = "_strings.json"
_BLOBS = "blobs"
"""Where the cache of the Hugging Face hub keeps files, to which those of a snapshot are links."""


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
    """The arrays of one Orbax item.

    leaves: all that its metadata lists. entries: path -> type and shape of each array. texts: path -> each string.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata of the item in the directory `path`, and of each of its arrays; no array yet.

        Raises CorruptError for what is missing or contradicts itself, UnsupportedError for what leads out of the directory,
        AdapterError where tensorstore is not installed.
        """
        self.path = path
        _check_links(path)
        metadata = self._metadata()
        self._driver = "zarr3" if metadata.use_zarr3 else "zarr"
        self._in_database = metadata.use_ocdbt
        self.leaves = [_listed(leaf) for leaf in metadata.tree_metadata.values()]
        self._check_names()
        opening = {leaf.path: self._open(leaf.path) for leaf in self.leaves if leaf.is_array}
        self._stores = {leaf: self._opened(leaf, future) for leaf, future in opening.items()}
        self.entries: Mapping[tuple[str, ...], Found] = {leaf: self._found(leaf) for leaf in self._stores}
        self.texts: Mapping[tuple[str, ...], str] = self._read_texts()

    def read(self, path: tuple[str, ...]) -> np.ndarray:
        """One array, in memory of its own. Raises CorruptError for what cannot be decoded, or of which a part is missing."""
        self._check_memory(path)
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

    def _read_texts(self) -> dict[tuple[str, ...], str]:
        """The strings, which Orbax keeps in one file of JSON by their joined names."""
        wanted = [leaf.path for leaf in self.leaves if leaf.value_type == _TEXT]
        if not wanted:
            return {}
        source = self.path / _STRINGS
        try:
            told = msgspec.json.decode(source.read_bytes(), type=dict[str, str])
            return {path: told[".".join(path)] for path in wanted}
        except OSError as error:
            raise CorruptError(f"{source}: {error.strerror}, but {METADATA} lists strings") from error
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, KeyError) as error:
            raise CorruptError(f"{source}: not the strings of an Orbax item: {error!r}") from error

    def _check_names(self) -> None:
        """Orbax joins segments with dots, so that two leaves may lie in one place; then one of them is lost."""
        taken: dict[str, Listed] = {}
        for leaf in self.leaves:
            name = ".".join(leaf.path)
            if len(leaf.path) > MAX_DEPTH:
                raise CorruptError(f"{self.path}: {name[:80]}...: nested deeper than {MAX_DEPTH} levels")
            if ".." in name.split("/") or name.startswith("/") or "\0" in name:
                raise UnsupportedError(f"{self.path}: {METADATA} names {name!r}, which leads out of the directory")
            if (other := taken.setdefault(name, leaf)) is not leaf:
                raise CorruptError(
                    f"{self.path}: {list(leaf.path)} and {list(other.path)} were both written to {name!r}, so one of them is "
                    "lost, and which cannot be told"
                )

    def _open(self, path: tuple[str, ...]) -> Any:
        name = ".".join(path)
        # Not as a URL, in which "#", "?" and "%" mean something.
        base, files = f"{os.path.abspath(self.path)}/", {"driver": "file"}
        store: dict[str, Any] = {**files, "path": f"{base}{name}/"}
        if self._in_database:
            store = {"driver": "ocdbt", "base": {**files, "path": base}, "path": f"{name}/"}
        # Without the last, what is missing reads as zeros.
        spec = {"driver": self._driver, "kvstore": store, "fill_missing_data_reads": False}
        return _tensorstore().open(spec, open=True, read=True)

    def _check_memory(self, path: tuple[str, ...]) -> None:
        """Raise CheckpointError for an array that memory cannot hold: tensorstore would end the process."""
        store, found = self._stores[path], self.entries[path]
        sizes = [math.prod(found.shape), math.prod(store.chunk_layout.read_chunk.shape or ())]
        try:
            # Together, as they are needed; the system gives memory only to what is written.
            [np.empty(size, lookup(found.dtype, "").numpy) for size in sizes]
        except (MemoryError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: {'.'.join(path)}: {found.dtype}{list(found.shape)} in chunks of {sizes[1]} elements: {error}"
            ) from error

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


def _check_links(item: Path) -> None:
    """Raise UnsupportedError for a link by which a file outside of the directory would be read."""
    inside = Path(os.path.realpath(item))
    for directory, below, files in os.walk(item):
        for link in (Path(directory, name) for name in (*below, *files)):
            if not link.is_symlink():
                continue
            target = Path(os.path.realpath(link))
            is_blob = target.parent.name == _BLOBS and target.parent.parent in inside.parents
            if not (target.is_relative_to(inside) or is_blob):
                raise UnsupportedError(
                    f"{link}: a link out of the directory, to {target}, which is not followed. Where it is meant to be, "
                    "copy the directory with what its links lead to: cp -rL"
                )


_TEXT = "string"
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
