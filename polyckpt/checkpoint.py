"""An opened checkpoint: its manifest, and its tensors as lazily mapped, verified arrays."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyckpt import collecting
from polyckpt import manifest as manifest_file
from polyckpt.checksums import checksum_in_blocks
from polyckpt.dtypes import lookup
from polyckpt.errors import CheckpointError, CorruptError, StorageError
from polyckpt.heads import FILE_NAME
from polyckpt.parallel import in_threads
from polyckpt.schema import ArrayDirectory, Chunk, Manifest, Tensor, TensorFile
from polyckpt.storage import local
from polyckpt.storage.tensor_file import TensorFileReader

if TYPE_CHECKING:
    from polyckpt.storage.array_directory import ArrayDirectoryReader

_ATTEMPTS = 20


class StoredTensor:
    """One tensor of an opened checkpoint. `dtype` is a name of polyckpt.dtypes, `shape` is in elements."""

    __slots__ = ("_files", "_located", "_tensor", "_verified", "dtype", "name", "shape")

    def __init__(self, files: _Files, name: str, tensor: Tensor) -> None:
        self.name = name
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self._files = files
        self._tensor = tensor
        self._located = self._verified = False

    @property
    def itemsize(self) -> int:
        """The bytes of one element."""
        return lookup(self.dtype, self.name).itemsize

    @property
    def size_bytes(self) -> int:
        """The bytes of all elements."""
        return math.prod(self.shape) * self.itemsize

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Where it lies."""
        return self._tensor.chunks

    @property
    def checksums(self) -> tuple[str, ...]:
        """Equal for tensors of equal bytes."""
        return tuple(chunk.checksum for chunk in self._tensor.chunks)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    def __repr__(self) -> str:
        return f"<StoredTensor {self.name!r} {self}>"

    def locate(self) -> None:
        """Compare what the manifest says with the headers of the files, once. Raises CorruptError with what both say."""
        if self._located:
            return
        dtype = lookup(self.dtype, self.name)
        for chunk in self._tensor.chunks:
            file, stated = self._files.reader(chunk.file), dtype.stored_shape(chunk.shape)
            entry = file.entries.get(chunk.key)
            if entry is None or entry.shape != stated or entry.dtype != dtype.stored_code:
                there = f"{entry.dtype}{list(entry.shape)}" if entry else "nothing"
                raise CorruptError(
                    f"{file.path}: {chunk.key}: the manifest says {dtype.stored_code}{list(stated)}, the file has {there}"
                )
        self._located = True

    def verify(self) -> None:
        """Compare every byte with its checksum, once. Raises CorruptError naming file, tensor, place and both checksums."""
        if self._verified:
            return
        for chunk in self._tensor.chunks:
            found = checksum_in_blocks(self._chunk_bytes(chunk).data)
            if found != chunk.checksum:
                raise CorruptError(
                    f"{self._files.path / chunk.file}: {self.name}: the manifest says {chunk.checksum}, "
                    f"{self._files.reader(chunk.file).place(chunk.key)} have {found}: they changed after they were written"
                )
        self._verified = True

    def raw(self) -> np.ndarray:
        """The tensor's bytes, uint8, row-major: a private, writable map of the file where the tensor is one chunk.

        They are verified by now unless the checkpoint was opened with verify=False.
        """
        if self._files.verifies:
            self.verify()
        if len(self._tensor.chunks) == 1:
            return self._chunk_bytes(self._tensor.chunks[0])
        return self._assembled().reshape(-1).view(np.uint8)

    def numpy(self) -> np.ndarray:
        """The tensor as a NumPy array of its own element type; writing to it changes no file."""
        return self.raw().view(lookup(self.dtype, self.name).numpy).reshape(self.shape)

    def strided(self) -> np.ndarray:
        """As `numpy`, but in any order of memory, for who can copy from it faster than it could be put in order."""
        return self.numpy()

    def _assembled(self) -> np.ndarray:
        dtype = lookup(self.dtype, self.name).numpy
        # All chunks first: a manifest may claim more than the files hold, and memory is not taken on its word.
        parts = [self._chunk_bytes(chunk) for chunk in self._tensor.chunks]
        whole = np.empty(self.shape, dtype)
        for chunk, part in zip(self._tensor.chunks, parts, strict=True):
            box = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offset, chunk.shape, strict=True))
            whole[box] = part.view(dtype).reshape(chunk.shape)
        return whole

    def _chunk_bytes(self, chunk: Chunk) -> np.ndarray:
        self.locate()
        return self._files.reader(chunk.file).raw(chunk.key)


class _Files:
    """The open tensor files of a checkpoint, which no manager deletes as long as they, or tensors of them, are in use."""

    def __init__(self, path: Path, verifies: bool) -> None:
        self.path = path
        self.verifies = verifies
        self._readers: dict[str, TensorFileReader | ArrayDirectoryReader] = {}
        if (lock := local.lock_to_read(path)) is not None:
            weakref.finalize(self, _release, lock, os.getpid()).atexit = False

    def open(self, files: Mapping[str, TensorFile], arrays: Mapping[str, ArrayDirectory]) -> None:
        """Open every file and array directory, each of which must be as the manifest states."""
        self._readers = {name: TensorFileReader(self.path, name, entry) for name, entry in files.items()}
        for name, directory in arrays.items():
            # Imported here, since it needs a package that most have no use for.
            from polyckpt.storage.array_directory import ArrayDirectoryReader

            self._readers[name] = ArrayDirectoryReader(self.path, name, directory)

    def reader(self, name: str) -> TensorFileReader | ArrayDirectoryReader:
        """The file or array directory `name`."""
        return self._readers[name]

    def verify_directories(self) -> None:
        """Compare the files of array directories with their checksums. Raises CorruptError for the first that changed."""
        for reader in self._readers.values():
            if not isinstance(reader, TensorFileReader):
                reader.verify()


class Section(Mapping[str, np.ndarray]):
    """Tensors by name as NumPy arrays, read when they are asked for; `stored` gives them without reading."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> np.ndarray:
        return self.stored[name].numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors: {', '.join(f'{name} {tensor}' for name, tensor in self.stored.items())}>"


class Checkpoint:
    """A checkpoint on disk, opened; needs no framework.

    manifest: the decoded manifest. unknown: members that a later minor version added. weights: the model's tensors, tied
    names included. optimizer, state: the other sections. As long as it is in use no manager deletes it.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        """Open the checkpoint in the directory `path`.

        verify: compare each tensor's bytes with its checksum when it is first read.
        Raises NotACheckpointError, CorruptError, VersionError or StorageError; each says what was found instead.
        """
        self.verifies = verify
        with collecting.paused():
            self._settle(path)

    def _settle(self, path: str | os.PathLike[str]) -> None:
        """Open what is there once it stays what it is."""
        wanted = local.absolute(path)
        for _ in range(_ATTEMPTS):
            self.path = local.locate(wanted)
            before = _identity(self.path)
            try:
                self._open()
            except (CheckpointError, StorageError):
                # It may have been replaced meanwhile, or deleted where a link leads to another one now.
                if before is not None and _identity(self.path) == before:
                    raise
            else:
                if _identity(self.path) == before:
                    return
        raise CorruptError(f"{self.path}: replaced {_ATTEMPTS} times while it was being opened")

    def _open(self) -> None:
        self._files = _Files(self.path, self.verifies)
        manifest_path = self.path / FILE_NAME
        decoded = manifest_file.decode(_read(manifest_path), str(manifest_path))
        self.manifest: Manifest = decoded.manifest
        self.unknown: dict[str, Any] = decoded.unknown
        self._files.open(self.manifest.files, self.manifest.arrays)

    @cached_property
    def weights(self) -> Section:
        """The model's tensors under the producer's names."""
        stored = self._section("weights")
        return Section({**stored, **{alias: stored[name] for alias, name in self.manifest.model.aliases.items()}})

    @cached_property
    def optimizer(self) -> Section:
        """The optimizer's slots, named "<slot>/<parameter>"."""
        return Section(self._section("optimizer"))

    @cached_property
    def state(self) -> Section:
        """All other tensors of the run: RNG states, extras."""
        return Section(self._section("state"))

    def verify(self) -> None:
        """Verify every tensor, and every file of another library. Raises CorruptError for the first whose bytes changed."""
        verify_all([*self.weights.stored.values(), *self.optimizer.stored.values(), *self.state.stored.values()])
        self._files.verify_directories()

    def _section(self, section: str) -> dict[str, StoredTensor]:
        tensors = self.manifest.tensors.get(section, {})
        return {name: StoredTensor(self._files, name, tensor) for name, tensor in tensors.items()}

    def __repr__(self) -> str:
        producer, progress = self.manifest.producer, self.manifest.progress
        return (
            f"<Checkpoint {str(self.path)!r} by {producer.adapter}, epoch {progress.epoch}, step {progress.step}, "
            f"{len(self.weights)} weights>"
        )


def check_all(tensors: Iterable[StoredTensor], *, verify: bool) -> None:
    """Find all that could keep tensors from being read, before anything is written. verify: changed bytes too."""
    if verify:
        verify_all(tensors)
    else:
        for tensor in tensors:
            tensor.locate()


def verify_all(tensors: Iterable[StoredTensor], done: Callable[[StoredTensor], None] | None = None) -> None:
    """Verify tensors in a few threads: hashing and reading release the GIL. done: called with each that is whole."""

    def verify(tensor: StoredTensor) -> None:
        tensor.verify()
        if done is not None:
            done(tensor)

    in_threads(tensors, verify, size=lambda tensor: math.prod(tensor.shape))


def _release(lock: int, pid: int) -> None:
    if os.getpid() == pid:
        local.unlock(lock)
    else:
        os.close(lock)  # a forked child shares the lock with the process that reads


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What differs between a directory and another one that takes its place."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _read(path: Path) -> bytes:
    try:
        return local.read_manifest(path)
    except OSError as error:
        raise StorageError(error.errno, f"cannot read {path}: {error.strerror}") from error
