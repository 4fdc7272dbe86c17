"""Files of torch.save, and directories of torch.distributed.checkpoint: recognised without torch."""

from __future__ import annotations

import zipfile
from pathlib import Path

from polyckpt.formats.table import Format

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled number with which files of torch.save before version 1.6 begin."""

METADATA = ".metadata"


def is_file(path: Path) -> bool:
    """Whether torch.save wrote it: a zip archive with a `data.pkl` one folder down, or the older stream of pickles."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
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
