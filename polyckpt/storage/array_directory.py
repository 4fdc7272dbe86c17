"""Directories of a checkpoint in which another library keeps tensors: written by it, read with tensorstore, sealed by us.

Who writes them are entry points of the group "polyckpt.stores": a function of a new directory and the tensors by path.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np

from polyckpt import names
from polyckpt.checksums import BLOCK_BYTES, Hasher, checksum
from polyckpt.dtypes import lookup
from polyckpt.errors import AdapterError, CorruptError, StorageError, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.schema import ArrayDirectory, StoredFile
from polyckpt.storage.tensor_file import Entry

GROUP = "polyckpt.stores"
NAME = "arrays"
"""The directory within a checkpoint."""


def write(directory: Path, store: str, sections: Mapping[str, Mapping[str, Leaf]]) -> ArrayDirectory:
    """Have `store` write the tensors into `directory`, and seal each file that it made.

    Raises UnsupportedError for an unknown store or tensors that it cannot hold, AdapterError where it is not installed,
    StorageError.
    """
    tensors = {(section, *names.split(name)): leaf for section, leaves in sections.items() for name, leaf in leaves.items()}
    _check_paths(tensors)
    target = directory / NAME
    _store(store)(target, tensors)
    files = {}
    try:
        for where, _, found in os.walk(target):
            for name in found:
                path = Path(where, name)
                files[path.relative_to(target).as_posix()] = _sealed(path)
    except OSError as error:
        raise StorageError(error.errno, f"cannot read {target}: {error.strerror}") from error
    return ArrayDirectory(kind="orbax", files=dict(sorted(files.items())))


def checksum_of(leaf: Leaf) -> str:
    """The checksum of a tensor's bytes."""
    return checksum(leaf.read().reshape(-1).view(np.uint8).data)


def _check_paths(tensors: Mapping[tuple[str, ...], Leaf]) -> None:
    """Raise UnsupportedError where two tensors would lie in one place, which Orbax lets happen without a word."""
    taken: dict[str, tuple[str, ...]] = {}
    for path in tensors:
        other = taken.setdefault(".".join(path), path)
        if other != path:
            raise UnsupportedError(
                f"{names.join(path)} and {names.join(other)}: Orbax writes both to {'.'.join(path)!r}. Rename one, or save "
                "without store="
            )
        if any(path[:length] in tensors for length in range(1, len(path))):
            raise UnsupportedError(f"{names.join(path)}: lies inside of another tensor, which a tree cannot hold")


@functools.cache
def _store(name: str) -> Callable[[Path, Mapping[tuple[str, ...], Leaf]], None]:
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        raise UnsupportedError(f"store={name!r}: there are {', '.join(sorted(found)) or 'none'}, and None for files of our own")
    try:
        loaded: Callable[[Path, Mapping[tuple[str, ...], Leaf]], None] = found[name].load()
    except ImportError as error:
        extras = ",".join(found[name].extras)
        raise AdapterError(f"store={name!r}: {error}. Install it with: pip install 'polyckpt[{extras}]'") from error
    return loaded


def _sealed(path: Path) -> StoredFile:
    hasher = Hasher()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            hasher.update(memoryview(block))
        os.fsync(file.fileno())
        return StoredFile(size_bytes=file.tell(), checksum=hasher.result())


class ArrayDirectoryReader:
    """An open array directory whose files are there in the sizes that the manifest states. entries: the tensors by key."""

    def __init__(self, directory: Path, name: str, stated: ArrayDirectory) -> None:
        """Raises CorruptError for what contradicts the manifest, AdapterError where tensorstore is not installed."""
        self.path = directory / name
        self._stated = stated
        for file, entry in stated.files.items():
            try:
                size_bytes = (self.path / file).lstat().st_size
            except OSError as error:
                raise CorruptError(f"{self.path / file}: {error.strerror}, but the manifest names it") from error
            if size_bytes != entry.size_bytes:
                raise CorruptError(f"{self.path / file}: {size_bytes} bytes, but the manifest says {entry.size_bytes}")
        from polyckpt.storage.zarr_arrays import ZarrArrays

        self._arrays = ZarrArrays(self.path)
        self._paths = {names.join(path): path for path in self._arrays.entries}
        self.entries = {
            key: Entry((dtype := lookup(found.dtype, key)).stored_code, dtype.stored_shape(found.shape), (0, 0))
            for key, path in self._paths.items()
            if (found := self._arrays.entries[path])
        }

    def raw(self, key: str) -> np.ndarray:
        """The bytes of one tensor, uint8, in memory of their own. Raises CorruptError for what cannot be read."""
        array = self._arrays.read(self._paths[key])
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def place(self, key: str) -> str:
        """Where one tensor lies, for people: in files of chunks, of which no one place can be told."""
        return "the values"

    def verify(self) -> None:
        """Compare every file with its checksum. Raises CorruptError naming the first that changed."""
        for file, entry in self._stated.files.items():
            found = _sealed(self.path / file)
            if found != entry:
                raise CorruptError(
                    f"{self.path / file}: the manifest says {entry.checksum}, the bytes have {found.checksum}: "
                    "they changed after they were written"
                )
