"""Zip archives: the checksum that one keeps of each entry, compared with the bytes."""

from __future__ import annotations

import lzma
import struct
import threading
import zipfile
import zlib
from pathlib import Path

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
