"""Zip archives: the checksum that one keeps of each entry, compared with the bytes."""

from __future__ import annotations

import lzma
import struct
import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from polyckpt.errors import CorruptError

BLOCK_BYTES = 1 << 20
BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What reading an archive that is damaged may raise."""


def check_entry(path: Path, name: str) -> None:
    """Compare an entry with its CRC32, a block at a time. Raises CorruptError."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [each for each in archive.infolist() if each.filename == name]
            if len(found) != 1:
                raise CorruptError(f"{path}: {name} occurs {len(found)} times in the archive")
            with archive.open(found[0]) as entry:
                while entry.read(BLOCK_BYTES):
                    pass
    except BROKEN as error:
        raise CorruptError(f"{path}: {name}: not the bytes that the archive was written with: {error}") from error


_END_BYTES = 22
_MANY = 0xFFFF


def check_count(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise CorruptError where an archive ends with another number of entries than are found: zipfile passes over the rest."""
    with open(path, "rb") as file:
        file.seek(-_END_BYTES - len(archive.comment), 2)
        stated = int.from_bytes(file.read(_END_BYTES)[10:12], "little")
    found = len(archive.infolist())
    if stated not in (found, _MANY):
        raise CorruptError(f"{path}: {found} entries are found in the archive, which says that it has {stated}")


class EntryCheck:
    """Compares an entry of an archive when it is first called, whoever calls."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._lock, self._done = threading.Lock(), False

    def __call__(self) -> None:
        """Raises CorruptError, and does so again at the next call."""
        with self._lock:
            if not self._done:
                check_entry(self._path, self._name)
                self._done = True


class Records:
    """The checksums that archives keep of records of which each is a tensor, or what several tensors are views of."""

    def __init__(self) -> None:
        self._known: dict[int, set[int]] = {}
        self._unread: list[Path] = []
        self._lock = threading.Lock()

    def add(self, path: Path, found: Sequence[zipfile.ZipInfo]) -> None:
        """Take over those of an archive. torch can be told to write none, and they are all zero."""
        if any(record.CRC for record in found):
            self._unread.append(path)
            for record in found:
                self._known.setdefault(record.file_size, set()).add(record.CRC)

    def check(self, data: np.ndarray) -> None:
        """Raise CorruptError where the bytes of a tensor, or where they are no record all there are, have changed."""
        if zlib.crc32(data.data) in self._known.get(data.nbytes, ()):
            return
        with self._lock:
            while self._unread:
                check_all(self._unread[-1])
                self._unread.pop()


def check_all(path: Path | IO[bytes], where: str = "") -> None:
    """Compare every entry of an archive with its CRC32. Raises CorruptError."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except BROKEN as error:
        raise CorruptError(f"{where or path}: a damaged archive: {error}") from error
    if damaged is not None:
        raise CorruptError(f"{where or path}: {damaged}: not the bytes that the archive was written with")
