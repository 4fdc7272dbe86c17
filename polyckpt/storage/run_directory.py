"""The directory of a run on a local file system: what lies in it, who writes to it, what is moved and removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from polyckpt import schema
from polyckpt.errors import CorruptError, LockedError, StorageError, VersionError
from polyckpt.heads import FILE_NAME, decode_head
from polyckpt.storage import local

LOCK_NAME = ".polyckpt-lock"
ABANDONED, CORRUPT = ASIDE = ("abandoned-", "corrupt-")
"""How the names of checkpoints begin that were set aside."""
_NAME = re.compile(r"(step|epoch)-[0-9]{8,}(-[0-9]+)?\Z")

_held: dict[tuple[int, int], RunDirectory] = {}
"""Directories that this process writes to, by device and inode."""


@dataclass(frozen=True)
class Found:
    """What lies in a run's directory.

    heads: of checkpoints by name. damaged: the error of each whose manifest cannot be read. others: names of checkpoints that
    no manager wrote.
    """

    heads: Mapping[str, schema.Head]
    damaged: Mapping[str, CorruptError]
    others: Sequence[str]


class RunDirectory:
    """The directory `path` of one run. Names are those of checkpoints in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._key = (0, 0)

    def scan(self, known: Collection[str] | None) -> Found:
        """Every checkpoint in the directory. Links are not followed, and what was set aside does not count.

        known: the names of the run's checkpoints, None where that is not known. Under another name a directory without a
        manifest is nothing, and a checkpoint of a format that cannot be read is one of `others`. Raises VersionError.
        """
        heads: dict[str, schema.Head] = {}
        damaged: dict[str, CorruptError] = {}
        others: list[str] = []
        try:
            entries = [entry for entry in os.scandir(self.path) if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            entries = []
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {self.path}: {error.strerror}") from error
        for entry in sorted(entries, key=lambda entry: entry.name):
            source = os.path.join(entry.path, FILE_NAME)
            if not _NAME.match(entry.name):
                if not entry.name.startswith((*ASIDE, ".")) and os.path.isfile(source):
                    others.append(entry.name)
                continue
            try:
                head = decode_head(local.read_manifest(source), source)
            except FileNotFoundError:
                if known and entry.name in known and os.path.isdir(entry.path):  # else it was deleted meanwhile
                    damaged[entry.name] = CorruptError(f"{entry.path}: it has no {FILE_NAME}")
            except VersionError:
                if known is None or entry.name in known:
                    raise
                others.append(entry.name)
            except CorruptError as error:
                damaged[entry.name] = error
            except OSError as error:
                if error.errno != errno.EIO:
                    raise StorageError(error.errno, f"cannot read {source}: {error.strerror}") from error
                damaged[entry.name] = CorruptError(f"{source}: {error.strerror}")
            else:
                if head.run is None:
                    others.append(entry.name)
                else:
                    heads[entry.name] = head
        return Found(heads, damaged, others)

    def claim(self) -> None:
        """Become the only writer until `release`. Raises LockedError, which names the one there is."""
        import socket

        if self.claimed:
            return
        try:
            local.make_directories(self.path)
            status = os.stat(self.path)
        except OSError as error:
            raise StorageError(error.errno, f"cannot write to {self.path}: {error.strerror}") from error
        key = (status.st_dev, status.st_ino)
        if key in _held:
            raise LockedError(
                f"{self.path}: another CheckpointManager of this process writes to it. Close that one first; "
                "`with CheckpointManager(...) as` does it also where the block is interrupted"
            )
        path = self.path / LOCK_NAME
        try:
            lock = local.open_file(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StorageError(error.errno, f"cannot write {path}: {error.strerror}") from error
        try:
            # A lock of fcntl would be lost as soon as anything in this process closes the file, such as a copy of the run.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(lock, 1000, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise LockedError(
                f"{self.path}: another CheckpointManager writes to it: {holder}. Reading is free, but two writers would "
                "delete each other's checkpoints: end that process, or use another directory"
            ) from error
        except OSError:
            pass  # this file system has no locks
        self._lock, self._key = lock, key
        _held[key] = self
        with contextlib.suppress(OSError):
            os.truncate(lock, 0)
            os.pwrite(lock, msgspec.json.encode({"pid": os.getpid(), "host": socket.gethostname()}) + b"\n", 0)
        local.remove_leftovers(self.path)

    @property
    def claimed(self) -> bool:
        """Whether this process is the writer."""
        return self._lock is not None

    def release(self) -> None:
        """Let others write."""
        if self._lock is not None:
            del _held[self._key]
            local.unlock(self._lock)
            self._lock = None

    def free_name(self, name: str) -> str:
        """`name`, or with the first number after it under which nothing lies."""
        candidate, number = name, 1
        while os.path.lexists(self.path / candidate):
            number += 1
            candidate = f"{name}-{number}"
        return candidate

    def set_aside(self, name: str, prefix: str) -> str:
        """Rename a checkpoint so that it no longer counts; `prefix` is one of ASIDE. Returns its new name."""
        new = self.free_name(prefix + name)
        try:
            os.rename(self.path / name, self.path / new)
            local.sync_directory(self.path)
        except OSError as error:
            raise StorageError(error.errno, f"cannot rename {self.path / name} to {new}: {error.strerror}") from error
        return new

    def delete(self, name: str) -> bool:
        """Delete a checkpoint: it vanishes by one rename. False where it is being read, so that it stays."""
        try:
            lock = local.lock_to_remove(self.path / name)
            if lock is None:
                return False
            try:
                doomed = local.temporary_path(self.path)
                os.rename(self.path / name, doomed)
                local.discard(doomed)
            finally:
                local.unlock(lock)
        except FileNotFoundError:
            return True
        except OSError as error:
            raise StorageError(error.errno, f"cannot delete {self.path / name}: {error.strerror}") from error
        return True

    def remove(self, history: Path) -> None:
        """Remove a run without checkpoints: its `history`, the lock, and the directory where it is empty then."""
        for path in (history, self.path / LOCK_NAME):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def link(self, link: str, name: str | None) -> bool:
        """Let the symbolic link `link` point to a checkpoint, or be gone; False where something else has its name."""
        path = self.path / link
        # Not every file system has links, and nothing depends on these.
        with contextlib.suppress(OSError):
            if os.path.lexists(path):
                if not path.is_symlink() or not _NAME.match(os.readlink(path)):
                    return False
                if os.readlink(path) == name:
                    return True
            if name is None:
                path.unlink(missing_ok=True)
            else:
                temporary = local.temporary_path(self.path)
                os.symlink(name, temporary)
                os.replace(temporary, path)
        return True


def _disown() -> None:
    """A forked worker writes to nothing, and must not hold the lock when the writer is gone."""
    for each in _held.values():
        if each._lock is not None:
            os.close(each._lock)
            each._lock = None
    _held.clear()


os.register_at_fork(after_in_child=_disown)
