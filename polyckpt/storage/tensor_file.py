"""Tensor files: safetensors, written in one pass with checksums, read through a memory map after bounded checks.

The layout is that of the safetensors README: a little-endian uint64 with the header's length, the header (JSON, padded with
spaces), then the tensors without gaps. Here the tensors begin at a multiple of 64 bytes and stand in descending order of
element size, so that each is aligned to its own.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from polyckpt import collecting
from polyckpt.checksums import BLOCK_BYTES, checksum, checksum_in_blocks
from polyckpt.dtypes import lookup, size_bytes
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


_Offset = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a file as its header states it. data_offsets: of its first byte and its end, from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[_Offset, _Offset]


_decode_entry = msgspec.json.Decoder(Entry).decode


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
    laid_out = _laid_out(leaves)
    header = _header(laid_out, metadata)
    checksums: dict[str, str] = {}
    try:
        with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1, "polyckpt-checksums") as beside:
            output = _Output(file)
            output.add(memoryview(header))
            for key, entry in laid_out.items():
                data = _bytes_of(key, leaves[key], entry)
                # To hand over a task costs more than to hash a few kilobytes.
                hashed = beside.submit(checksum_in_blocks, data) if len(data) >= BLOCK_BYTES else None
                output.add(data)
                checksums[key] = hashed.result() if hashed else checksum(data)
            output.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(error.errno, f"cannot write {path}: {error.strerror}") from error
    return Written(TensorFile(size_bytes=output.size_bytes, header_checksum=checksum(header)), checksums)


@collecting.paused()
def _laid_out(leaves: Mapping[str, Leaf]) -> dict[str, Entry]:
    """Where each tensor will lie, in the order of the file."""
    dtypes = {name: lookup(name, key) for name, key in {leaf.dtype: key for key, leaf in leaves.items()}.items()}
    entries, offset = {}, 0
    for key, leaf in sorted(leaves.items(), key=lambda item: -dtypes[item[1].dtype].itemsize):
        code, shape = dtypes[leaf.dtype].stored_code, dtypes[leaf.dtype].stored_shape(leaf.shape)
        try:
            end = offset + size_bytes(shape, _STORED_ITEMSIZE[code])
        except ValueError as error:
            raise UnsupportedError(f"{key}: {error}") from error
        entries[key] = Entry(code, shape, (offset, end))
        offset = end
    return entries


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    if _METADATA in entries:
        raise UnsupportedError(f"safetensors reserves the tensor name {_METADATA!r}")
    try:
        text = msgspec.json.encode({_METADATA: dict(metadata), **entries})
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"the tensor name {error.object!r} is not valid Unicode") from error
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise UnsupportedError(
            f"{len(entries)} tensors need a header of {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}"
        )
    return struct.pack("<Q", len(text)) + text


def _bytes_of(key: str, leaf: Leaf, entry: Entry) -> memoryview:
    array = leaf.read()
    expected = entry.data_offsets[1] - entry.data_offsets[0]
    if array.nbytes != expected or not array.flags.c_contiguous:
        raise UnsupportedError(
            f"{key}: {leaf.dtype}{list(leaf.shape)} is {expected} bytes, but reading it gave {array.nbytes}, "
            f"{'contiguous' if array.flags.c_contiguous else 'not contiguous'}"
        )
    return array.reshape(-1).view(np.uint8).data


class _Output:
    """A file that is written from front to back: what is small is gathered, what is large is on its way to the disk early.

    size_bytes: of what is written so far.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._gathered, self.size_bytes = file, bytearray(), 0

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
        local.begin_writeback(self._file.fileno(), self.size_bytes, len(data))
        self.size_bytes += len(data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names must differ: two readers might choose different ones of two equal names."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return members


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
            # Private and writable, so that frameworks may wrap it without a copy; nothing written reaches the file.
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            self._map = mmap.mmap(descriptor, status.st_size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._begin = len(header)
        self.entries, self.metadata = self._parse(header)

    def raw(self, key: str) -> np.ndarray:
        """The bytes of one tensor, uint8, without a copy."""
        start, end = self.span(key)
        return self._bytes[start:end]

    def span(self, key: str) -> tuple[int, int]:
        """The first byte of one tensor in the file, and its end."""
        start, end = self.entries[key].data_offsets
        return self._begin + start, self._begin + end

    def place(self, key: str) -> str:
        """Where one tensor lies in the file, for people."""
        return "bytes {} to {}".format(*self.span(key))

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

    def _parse(self, header: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
        """Entries and metadata."""
        text, entries, place = header[8:].rstrip(b" "), {}, ""
        try:
            members = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            beside, place = members.pop(_METADATA, None), _METADATA
            stated = {} if beside is None else msgspec.json.decode(beside, type=dict[str, Any])
            for place, member in members.items():
                entries[place] = _decode_entry(member)
            place = ""
            # Whoever spells JSON as msgspec does has no name twice where the same bytes come out again; that costs little.
            if msgspec.json.encode(entries if beside is None else {_METADATA: stated, **entries}) != text:
                json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            what = f"its header is not that of a tensor file: {place:.200}{': ' if place else ''}{error}"
            raise CorruptError(f"{self.path}: {what}") from error
        self._check(entries)
        return entries, {key: text for key, text in stated.items() if isinstance(text, str)}

    def _check(self, entries: Mapping[str, Entry]) -> None:
        """Raise where entries are not what their shapes say, or leave a gap, or overlap."""
        position = base = self._begin
        for key, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            start, end = entry.data_offsets
            if entry.dtype not in _STORED_ITEMSIZE:
                raise CorruptError(f"{self.path}: {key}: {entry.dtype!r:.80} is no type of a tensor file")
            try:
                expected = size_bytes(entry.shape, _STORED_ITEMSIZE[entry.dtype])
            except ValueError as error:
                raise CorruptError(f"{self.path}: {key}: {error}") from error
            if end - start != expected:
                shown = f"{entry.dtype}{list(entry.shape)}"
                raise CorruptError(f"{self.path}: {key} is {shown} but spans bytes {start} to {end}")
            if base + start != position:
                raise CorruptError(f"{self.path}: {key} begins at byte {base + start}, but {position} is next")
            position = base + end
        if position != self._bytes.size:
            raise CorruptError(f"{self.path}: its tensors end at byte {position}, the file at {self._bytes.size}")
