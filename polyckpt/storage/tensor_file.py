"""Tensor files: safetensors, written in one pass with checksums, read through a memory map after bounded checks.

The layout is that of the safetensors README: a little-endian uint64 with the header's length, the header (JSON, padded with
spaces), then the tensors without gaps. Here the tensors begin at a multiple of 64 bytes and stand in descending order of
element size, so that each is aligned to its own.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from polyckpt import collecting
from polyckpt.checksums import BLOCK_BYTES, checksum, checksum_in_blocks
from polyckpt.dtypes import lookup, size_problem
from polyckpt.errors import CorruptError, StorageError, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.schema import TensorFile
from polyckpt.storage import local

_METADATA = "__metadata__"
ALIGNMENT_BYTES = 64
WRITEBACK_BYTES = 1 << 24
_SMALL_BYTES, _GATHERED_BYTES = 1 << 15, 1 << 18
"""A tensor smaller than the first is kept until there is the second of such, or another one comes."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package: a file beyond it could not be opened by other tools."""

# Linux counts a private writable map against memory unless told not to: a file larger than memory must still be readable.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0

_STORED_ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class Written:
    """A finished tensor file: its entry for the manifest and the checksum of each tensor by key."""

    entry: TensorFile
    checksums: dict[str, str]


def write(path: Path, leaves: Mapping[str, Leaf], metadata: Mapping[str, str]) -> Written:
    """Write `leaves` by key into the new file `path`, each byte once, and sync it to disk.

    Raises UnsupportedError before anything is written where a type or a name has no place in the format, StorageError
    where the system refuses.
    """
    ordered = sorted(leaves.items(), key=lambda item: -lookup(item[1].dtype, item[0]).itemsize)
    header = _header(ordered, metadata)
    checksums: dict[str, str] = {}
    size_bytes = len(header)
    try:
        with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1, "polyckpt-checksums") as beside:
            output = _Output(file)
            output.add(memoryview(header))
            for key, leaf in ordered:
                data = _bytes_of(key, leaf)
                # To hand over a task costs more than to hash a few kilobytes.
                hashed = beside.submit(checksum_in_blocks, data) if len(data) >= BLOCK_BYTES else None
                output.add(data)
                checksums[key] = hashed.result() if hashed else checksum(data)
                size_bytes += len(data)
            output.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(error.errno, f"cannot write {path}: {error.strerror}") from error
    return Written(TensorFile(size_bytes=size_bytes, header_checksum=checksum(header)), checksums)


@collecting.paused()
def _header(ordered: list[tuple[str, Leaf]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    if any(key == _METADATA for key, _ in ordered):
        raise UnsupportedError(f"safetensors reserves the tensor name {_METADATA!r}")
    offset = 0
    for key, leaf in ordered:
        dtype = lookup(leaf.dtype, key)
        end = offset + math.prod(leaf.shape) * dtype.itemsize
        entries[key] = {
            "dtype": dtype.stored_code,
            "shape": dtype.stored_shape(leaf.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    try:
        text = msgspec.json.encode(entries)
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"the tensor name {error.object!r} is not valid Unicode") from error
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise UnsupportedError(
            f"{len(ordered)} tensors need a header of {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}"
        )
    return struct.pack("<Q", len(text)) + text


def _bytes_of(key: str, leaf: Leaf) -> memoryview:
    array = leaf.read()
    expected = math.prod(leaf.shape) * lookup(leaf.dtype, key).itemsize
    if array.nbytes != expected or not array.flags.c_contiguous:
        raise UnsupportedError(
            f"{key}: {leaf.dtype}{list(leaf.shape)} is {expected} bytes, but reading it gave {array.nbytes}, "
            f"{'contiguous' if array.flags.c_contiguous else 'not contiguous'}"
        )
    return array.reshape(-1).view(np.uint8).data


class _Output:
    """A file that is written from front to back: what is small is gathered, what is large is on its way to the disk early."""

    def __init__(self, file: Any) -> None:
        self._file, self._gathered, self._written = file, bytearray(), 0

    def add(self, data: memoryview) -> None:
        """Write `data` after all that was added before, or keep it until there is more."""
        if len(data) < _SMALL_BYTES:
            self._gathered += data
            if len(self._gathered) >= _GATHERED_BYTES:
                self.flush()
            return
        self.flush()
        for start in range(0, len(data), WRITEBACK_BYTES):
            self._write(data[start : start + WRITEBACK_BYTES])

    def flush(self) -> None:
        """Write what was kept."""
        self._write(memoryview(self._gathered))
        self._gathered = bytearray()

    def _write(self, data: memoryview) -> None:
        rest = data
        while rest:
            # The system may take less than it was given: near a limit, and at 2 GiB always.
            rest = rest[self._file.write(rest) :]
        # The disk works while more is copied to the system, and the sync at the end has less to wait for.
        local.begin_writeback(self._file.fileno(), self._written, len(data))
        self._written += len(data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names must differ: two readers might choose different ones of two equal names."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return members


class Entry(NamedTuple):
    """One tensor of a file as its header states it: bytes `start` to `end` of the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFileReader:
    """An open tensor file whose size, header and offsets have been checked; no tensor byte has been read yet.

    entries: the tensors by key. metadata: the texts that whoever wrote it put beside them.
    """

    def __init__(self, directory: Path, name: str, stated: TensorFile | None = None) -> None:
        """Open `name` in `directory`; where given, size and header must be as `stated` in the manifest.

        Raises CorruptError for anything that contradicts itself or the manifest, StorageError where the system refuses.
        """
        self.path = directory / name
        try:
            descriptor = local.open_file(self.path)
        except FileNotFoundError as error:
            raise CorruptError(f"{self.path}: missing, but the manifest names it") from error
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {self.path}: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if stated and status.st_size != stated.size_bytes:
                raise CorruptError(f"{self.path}: {status.st_size} bytes, but the manifest says {stated.size_bytes}")
            header = self._read_header(descriptor, status.st_size)
            if stated and checksum(header) != stated.header_checksum:
                raise CorruptError(
                    f"{self.path}: its header has checksum {checksum(header)}, but the manifest says {stated.header_checksum}"
                )
            self.entries = self._parse(header, status.st_size)
            # Private and writable, so that frameworks may wrap it without a copy; nothing written reaches the file.
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            self._map = mmap.mmap(descriptor, status.st_size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)

    def raw(self, key: str) -> np.ndarray:
        """The bytes of one tensor, uint8, without a copy."""
        entry = self.entries[key]
        return self._bytes[entry.start : entry.end]

    def _read_header(self, descriptor: int, size_bytes: int) -> bytes:
        prefix = local.read_at(descriptor, 8)
        if len(prefix) < 8:
            raise CorruptError(f"{self.path}: {size_bytes} bytes are too few for a tensor file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise CorruptError(
                f"{self.path}: its header claims {length} bytes; the file has {size_bytes} and the limit is {MAX_HEADER_BYTES}"
            )
        header = local.read_at(descriptor, 8 + length)
        if len(header) != 8 + length:
            raise CorruptError(f"{self.path}: ended within its header")
        return header

    def _parse(self, header: bytes, size_bytes: int) -> dict[str, Entry]:
        try:
            text = header[8:].rstrip(b" ")
            raw = msgspec.json.decode(text)
            # Whoever spells JSON as msgspec does has no name twice where the same bytes come out again; that costs little.
            if msgspec.json.encode(raw) != text:
                raw = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{self.path}: its header is not that of a tensor file: {error}") from error
        if not isinstance(raw, dict) or not all(isinstance(fields, dict) for fields in raw.values()):
            raise CorruptError(f"{self.path}: its header is not that of a tensor file: not an object of objects")
        stated = raw.pop(_METADATA, {})
        self.metadata = {key: text for key, text in stated.items() if isinstance(text, str)}
        entries = {key: self._entry(key, fields, len(header)) for key, fields in raw.items()}
        position = len(header)
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != position:
                raise CorruptError(f"{self.path}: {key} begins at byte {entry.start}, but {position} is next")
            position = entry.end
        if position != size_bytes:
            raise CorruptError(f"{self.path}: its tensors end at byte {position}, the file at {size_bytes}")
        return entries

    def _entry(self, key: str, fields: dict[str, Any], base: int) -> Entry:
        try:
            code, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
            itemsize = _STORED_ITEMSIZE[code]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{self.path}: the header's entry for {key} is {fields!r:.200}, which is not valid") from error
        if not {type(number) for number in (start, end, *shape)} == {int}:
            raise CorruptError(f"{self.path}: the header's entry for {key} is {fields!r:.200}, which is not valid")
        if problem := size_problem(shape, itemsize):
            raise CorruptError(f"{self.path}: {key}: {problem}")
        if start < 0 or end - start != math.prod(shape) * itemsize:
            raise CorruptError(f"{self.path}: {key} is {code}{list(shape)} but spans bytes {start} to {end}")
        return Entry(code, shape, base + start, base + end)
