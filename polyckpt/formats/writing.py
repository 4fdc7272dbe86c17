"""What is written in a format of others: from what, and how it comes into its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyckpt.checkpoint import Checkpoint
from polyckpt.errors import CheckpointExistsError, StorageError
from polyckpt.formats.table import Format
from polyckpt.storage import local


@dataclass(frozen=True)
class Source:
    """What a writer writes: a checkpoint of the framework of its format, and, where the caller gave them, the live objects
    into which it was loaded.
    """

    checkpoint: Checkpoint
    model: Any = None
    optimizer: Any = None


def check(target: Path, format: Format, *, overwrite: bool) -> None:
    """Raise CheckpointExistsError where `target` may not be written."""
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise CheckpointExistsError(f"{target}: is there already. Write to another path, or pass overwrite=True (--force)")
    if target.is_symlink() or (target.is_dir() and any(target.iterdir()) and not _is_one(target, format)):
        what = (
            "a symbolic link"
            if target.is_symlink()
            else f"a directory that holds several checkpoints, or is not {format.title}"
        )
        raise CheckpointExistsError(f"{target}: {what}, so it is not replaced. Write to another path")


def _is_one(target: Path, format: Format) -> bool:
    return format.recognises(target) and not format.steps(target)


def write(source: Source, target: Path, format: Format, *, overwrite: bool) -> None:
    """Write `target`, whole or not at all. Raises CheckpointExistsError, StorageError, and as the format's writer does."""
    check(target, format, overwrite=overwrite)
    replacement = local.Replacement(target)
    try:
        format.write(source, replacement.path)
        replacement.commit()
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(error.errno, f"cannot write {target}: {error.strerror or error}") from error
    finally:
        replacement.discard()
