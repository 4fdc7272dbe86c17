"""Directories on a local file system that appear whole or not at all.

A save fills a temporary directory beside its target, syncs it, renames it into place and syncs the parent. Every temporary
directory is locked while its writer lives, so that the next save beside it can tell a leftover of a killed process, which it
removes, from the work of a neighbour, which it leaves alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from polyckpt.errors import CheckpointExistsError, CorruptError, NotACheckpointError, StorageError
from polyckpt.heads import FILE_NAME, MAX_BYTES

_BLOCK_BYTES, _LINE_BYTES = 1 << 20, 1 << 22
TEMPORARY_PREFIX = ".polyckpt-tmp-"
_REPLACED_SUFFIX = ".polyckpt-replaced"


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` from the root on. ".." stays where it follows a name, since only the system knows what links lie before it."""
    try:
        whole = Path(path).absolute()
    except FileNotFoundError as error:
        raise StorageError(error.errno, f"{os.fspath(path)!r}: the working directory of this process is gone") from error
    if "\0" in str(whole):
        raise StorageError(errno.EINVAL, f"{str(whole)!r}: a path cannot hold a null character")
    return Path(os.path.realpath(whole)) if whole.name in ("", "..") else whole


def locate(path: Path) -> Path:
    """The directory of the checkpoint `path`, which is not quite `path` where a kill fell into a replacement.

    Raises NotACheckpointError, saying what there is instead.
    """
    try:
        if (path / FILE_NAME).is_file():
            return path
        if not path.exists() and (_replaced(path) / FILE_NAME).is_file():
            return _replaced(path)
        if not path.exists():
            raise NotACheckpointError(f"{path}: no such file or directory")
        if not path.is_dir():
            raise NotACheckpointError(f"{path}: a file; a checkpoint is a directory with a {FILE_NAME}")
        inside = sorted(child.name for child in path.iterdir() if (child / FILE_NAME).is_file())
    except NotACheckpointError:
        raise
    except OSError as error:
        raise StorageError(error.errno, f"cannot read {path}: {error.strerror}") from error
    hint = f"; it holds the checkpoints {', '.join(inside[-5:])}: name one of them" if inside else ""
    raise NotACheckpointError(f"{path}: a directory without a {FILE_NAME}, so not a checkpoint{hint}")


@contextlib.contextmanager
def replacing(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new directory to fill; when the block ends it becomes `target`, and when the block raises it is removed.

    Raises CheckpointExistsError where `target` is taken and may not be replaced, before the block runs; StorageError
    where the system refuses.
    """
    parent = target.parent
    try:
        make_directories(parent)
        _recover(target)
        _check_target(target, overwrite)
        remove_leftovers(parent)
        temporary, lock = _create_temporary(parent)
    except PermissionError as error:
        raise StorageError(error.errno, f"cannot save to {target}: {error.strerror}: {error.filename}") from error
    except (NotADirectoryError, FileExistsError) as error:
        if isinstance(error, CheckpointExistsError):
            raise
        raise StorageError(error.errno, f"cannot save to {target}: {error.filename} is not a directory") from error
    except OSError as error:
        raise StorageError(error.errno, f"cannot save to {target}: {error.strerror}") from error
    try:
        yield temporary
        try:
            sync_directory(temporary)
            replaced = _commit(temporary, target, overwrite)
        except CheckpointExistsError:
            raise
        except OSError as error:
            raise StorageError(error.errno, f"cannot save to {target}: {error.strerror}") from error
        try:
            sync_directory(parent)
        except OSError as error:
            raise StorageError(
                error.errno, f"{target} is saved, but a loss of power might undo that: cannot sync {parent}: {error.strerror}"
            ) from error
        if replaced is not None:
            discard(replaced)
    finally:
        # After a replacement this is the old checkpoint, after a failure the unfinished one, else nothing.
        discard(temporary)
        unlock(lock)


class Replacement:
    """A file or directory at `path`, to be written by anybody, that becomes `target` in one step.

    `path` has the name of the target, in a temporary directory beside it. Raises StorageError where the system refuses.
    """

    def __init__(self, target: Path) -> None:
        self._target, self._discarded = target, False
        try:
            make_directories(target.parent)
            remove_leftovers(target.parent)
            self._directory, self._lock = _create_temporary(target.parent)
        except OSError as error:
            raise StorageError(error.errno, f"cannot save to {target}: {error.strerror}") from error
        self.path = self._directory / target.name

    def commit(self) -> None:
        """Make it durable and put it in place."""
        try:
            for directory, _, names in os.walk(self.path):
                for name in names:
                    _sync(Path(directory, name))
                sync_directory(Path(directory))
            if self.path.is_dir():
                self._exchange()
            else:
                _sync(self.path)
                os.replace(self.path, self._target)
            sync_directory(self._target.parent)
        except OSError as error:
            raise StorageError(error.errno, f"cannot save to {self._target}: {error.strerror}") from error
        finally:
            self.discard()

    def _exchange(self) -> None:
        """Put a directory in the place of what stands there, if anything does."""
        if not self._target.exists():
            os.rename(self.path, self._target)
        elif not _exchange(self.path, self._target):
            os.rename(self._target, self._directory / ".replaced")
            os.rename(self.path, self._target)

    def discard(self) -> None:
        """Remove what is not in place; once more does nothing."""
        if self._discarded:
            return
        self._discarded = True
        discard(self._directory)
        unlock(self._lock)


def unlock(lock: int) -> None:
    """Give up the lock on a directory. Closing alone would leave it with every process that was forked meanwhile."""
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    with contextlib.suppress(OSError):  # it is closed whatever the system says
        os.close(lock)


def lock_to_read(path: Path) -> int | None:
    """A lock that keeps managers from deleting the checkpoint `path`, for `unlock`; None where locks are not to be had."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def lock_to_remove(path: Path) -> int | None:
    """A lock that no reader holds, for `unlock`; None where one does."""
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        pass  # no locks here, so no readers that hold one
    return lock


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and sync it to disk. Raises StorageError where the system refuses."""
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(error.errno, f"cannot write {path}: {error.strerror}") from error


def open_file(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the regular file `path`. A symbolic link is followed to read, but never to write.

    Raises CorruptError for what is no regular file, OSError where the system refuses.
    """
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    try:
        # Without O_NONBLOCK a planted FIFO would block for ever.
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if writes else 0), 0o666)
    except OSError as error:
        if writes and error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, behind which nothing is written; remove it") from error
        raise
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    if not regular:
        os.close(descriptor)
        raise CorruptError(f"{path}: not a regular file")
    return descriptor


def read_at(descriptor: int, size_bytes: int, offset: int = 0) -> bytes:
    """So many bytes from `offset` on, fewer only where the file ends: the system may give less than it was asked for."""
    blocks = []
    while block := os.pread(descriptor, size_bytes, offset):
        blocks.append(block)
        size_bytes, offset = size_bytes - len(block), offset + len(block)
    return b"".join(blocks)


def read_manifest(path: str | Path) -> bytes:
    """The bytes of a manifest. Raises as `open_file` does, and CorruptError where they are more than one may have."""
    descriptor = open_file(path)
    try:
        return read_at(descriptor, _size_bytes(descriptor, path, MAX_BYTES, "a manifest"))
    finally:
        os.close(descriptor)


def read_lines(path: Path, limit: int, what: str) -> Iterator[bytes]:
    """The whole lines of a regular file, one after the other; one of many megabytes may come in pieces.

    Raises as `open_file` does, and CorruptError where there are more bytes than `what` may have.
    """
    descriptor = open_file(path)
    try:
        _size_bytes(descriptor, path, limit, what)
        rest, offset = b"", 0
        while block := read_at(descriptor, _BLOCK_BYTES, offset):
            offset += len(block)
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
            if len(rest) > _LINE_BYTES:
                yield rest
                rest = b""
    finally:
        os.close(descriptor)


def end_of_lines(descriptor: int) -> int:
    """The bytes of an open file up to the end of its last whole line."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - _BLOCK_BYTES)
        if line := read_at(descriptor, end - start, start).rfind(b"\n") + 1:
            return start + line
        end = start
    return 0


def _size_bytes(descriptor: int, path: str | Path, limit: int, what: str) -> int:
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes > limit:
        raise CorruptError(f"{path}: {size_bytes} bytes; {what} has at most {limit}")
    return size_bytes


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        what = "a symbolic link" if target.is_symlink() else "a file"
        raise CheckpointExistsError(f"{target}: {what}; polyckpt replaces only checkpoints. Save to another path")
    if target.samefile(os.curdir):
        raise CheckpointExistsError(f"{target}: the working directory of this process. Save to another path")
    if not os.listdir(target):
        return
    if not _is_manifest(target / FILE_NAME):
        raise CheckpointExistsError(f"{target}: a directory that is no checkpoint, so it is not replaced. Save to another path")
    if not overwrite:
        raise CheckpointExistsError(f"{target}: a checkpoint is there already. Save to another path, or pass overwrite=True")


def _is_manifest(path: Path) -> bool:
    """Whether the file begins as a manifest does; other programs have a manifest.json too."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return re.match(rb'\{\s*"format":\s*"polyckpt"', file.read(100)) is not None


def make_directories(directory: Path) -> None:
    """`directory` and its missing parents, each made durable in its own parent."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def temporary_path(parent: Path) -> Path:
    """A name in `parent` that `remove_leftovers` knows."""
    return parent / f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}"


def _create_temporary(parent: Path) -> tuple[Path, int]:
    """A new directory and the descriptor whose lock says that its writer lives."""
    while True:
        path = temporary_path(parent)
        path.mkdir()
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # a neighbour took the still unlocked directory for a leftover
        except OSError:
            with contextlib.suppress(OSError):
                path.rmdir()
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)  # as above, just earlier
            continue
        except OSError:
            return path, lock  # no locks on this file system: nobody there removes leftovers either
        if os.path.isdir(path):
            return path, lock
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Remove what killed writers left in `parent`; what cannot be removed now can wait."""
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(OSError):
                _remove_leftover(path)


def _remove_leftover(path: Path) -> None:
    """Remove one, unless its writer lives, or locks are not to be had."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
        return
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(lock)


def discard(path: Path) -> None:
    """Remove a directory as far as that can be done; the next save beside it removes the rest."""
    with contextlib.suppress(OSError):  # which comes in spite of ignore_errors, from fstat
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a directory that nobody needs, once what is in its place is certain to stay there.

    It may hold the checkpoint that was replaced by a save which was killed: without the sync, a loss of power could undo the
    replacement but not the removal.
    """
    sync_directory(path.parent)
    discard(path)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}{_REPLACED_SUFFIX}")


def _recover(target: Path) -> None:
    """Finish what a kill between the two renames of `_commit` left."""
    replaced = _replaced(target)
    if replaced.exists():
        if target.exists():
            _remove(replaced)
        else:
            os.rename(replaced, target)


def _commit(temporary: Path, target: Path, overwrite: bool) -> Path | None:
    """Put a directory in its place; returns what is to be removed once that is certain to last, `temporary` apart."""
    try:
        os.rename(temporary, target)  # also over an empty directory
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _check_target(target, overwrite)  # again: a neighbour may have put something there during the save
    if _exchange(temporary, target):
        return None
    # No atomic exchange here: at every moment the old checkpoint stands under one of two names that `locate` knows.
    os.rename(target, _replaced(target))
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(_replaced(target), target)
        raise
    return _replaced(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot."""
    names = (os.fsencode(first), os.fsencode(second))
    library = _library()
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        at_cwd, rename_exchange = -100, 2
        failed = library.renameat2(at_cwd, names[0], at_cwd, names[1], ctypes.c_uint(rename_exchange))
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        rename_swap = 2
        failed = library.renamex_np(names[0], names[1], ctypes.c_uint(rename_swap))
    else:
        return False
    if failed and (code := ctypes.get_errno()) not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), os.fspath(second))
    return not failed


def link(existing: Path, new: Path) -> bool:
    """Give a file a further name; False where the file system cannot."""
    try:
        os.link(existing, new)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise StorageError(error.errno, f"cannot link {existing} to {new}: {error.strerror}") from error
    return True


def begin_writeback(descriptor: int, start: int, size_bytes: int) -> None:
    """Have the system begin to write a part of a file to the disk, where it can be told so. Nothing is durable by that."""
    if sys.platform == "linux" and (call := getattr(_library(), "sync_file_range", None)) is not None:
        sync_file_range_write = 2
        call(descriptor, ctypes.c_int64(start), ctypes.c_int64(size_bytes), ctypes.c_uint(sync_file_range_write))


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    _sync(path, os.O_DIRECTORY)


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
