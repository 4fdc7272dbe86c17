"""Files of torch.save, and directories of torch.distributed.checkpoint: recognised without torch."""

from __future__ import annotations

import zipfile
from pathlib import Path

from polyckpt.formats.table import Format

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled number with which files of torch.save before version 1.6 begin."""

METADATA = ".metadata"

_PROTOCOLS = range(2, 6)
"""Of pickles that begin with theirs."""


def is_file(path: Path) -> bool:
    """Whether torch.save wrote it: a zip archive with a `data.pkl` one folder down, or the older stream of pickles.

    Any other pickle is taken for one too: reading it says why that is not done.
    """
    if not path.is_file():
        return False
    if begins_archive(path):
        return True
    with open(path, "rb") as file:
        begin = file.read(3)
        if begin == LEGACY_MAGIC[:3]:
            return True
        if len(begin) < 3 or begin[0] != 0x80 or begin[1] not in _PROTOCOLS or begin[2] == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) == b"."


def begins_archive(path: Path) -> bool:
    """Whether it is an archive of torch.save, be it the beginning of one: its records lie in one folder, which has a pickle."""
    with open(path, "rb") as file:
        header = file.read(30)
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            return False
        first = file.read(int.from_bytes(header[26:28], "little"))
    if first.count(b"/") == 1 and first.endswith(b"/data.pkl"):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def is_distributed(path: Path) -> bool:
    """Whether torch.distributed.checkpoint wrote it: a directory with `.metadata` and files of data."""
    return path.is_dir() and (path / METADATA).is_file() and any(path.glob("*.distcp"))


FILE = Format(
    name="torch",
    title="a file of torch.save",
    adapter="torch",
    recognises=is_file,
    reader="polyckpt.adapters.torch.files:read",
    writer="polyckpt.adapters.torch.files:write",
    suffixes=(".pt", ".pth", ".bin", ".ckpt"),
    needs="polyckpt[torch]",
)

DISTRIBUTED = Format(
    name="dcp",
    title="a directory of torch.distributed.checkpoint",
    adapter="torch",
    recognises=is_distributed,
    reader="polyckpt.adapters.torch.distributed_files:read",
    needs="polyckpt[torch]",
)
