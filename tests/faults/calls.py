"""A layer between polyckpt and the system that sees every call on files under one directory, and may let it fail.

Descriptors are followed to the paths that they were opened by, so that calls on them count as well.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyckpt.storage import local

BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "truncate", "stat", "lstat", "readlink", "scandir", "listdir")
BY_TWO_PATHS = ("rename", "replace", "link", "symlink")
BY_DESCRIPTOR = ("fsync", "fdatasync", "ftruncate", "fstat", "posix_fallocate", "read", "pread", "preadv")
WRITES = ("write", "pwrite", "writev", "pwritev")
READS = ("read", "pread")
LOOKS = {"stat", "lstat", "fstat", "readlink", "scandir", "listdir", "read", "pread", "preadv", "flock", "close"}
"""Calls that change no file."""


@dataclass(frozen=True)
class Call:
    """One call: its name, the path that it is about, and its arguments."""

    name: str
    path: str
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether it changes what is on disk; opening does where it creates."""
        if self.name == "open":
            return bool(self.arguments[1] & os.O_CREAT)
        return self.name not in LOOKS

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


def _fails(call: Call, number: int) -> None:
    """No fault."""


class Layer:
    """Puts itself in place of the functions of the system, in this process, for good.

    before: called before each call with it and its number, from 1 on; may raise. after: called with a call that was made, and
    what it returned.
    """

    def __init__(
        self,
        root: Path,
        before: Callable[[Call, int], Any] = _fails,
        after: Callable[[Call, Any], None] = lambda call, result: None,
    ) -> None:
        self.root, self.before, self.after = str(root), before, after
        self.count = 0
        self.paths: dict[int, str] = {}
        self.written: set[int] = set()  # descriptors that can write: closing another one cannot fail
        self.real = {name: getattr(os, name) for name in (*BY_PATH, *BY_TWO_PATHS, *BY_DESCRIPTOR, *WRITES, "open", "close")}
        for name in BY_PATH:
            setattr(os, name, self._by_path(name))
        for name in BY_TWO_PATHS:
            setattr(os, name, self._by_two_paths(name, self.real[name]))
        for name in (*BY_DESCRIPTOR, *WRITES):
            setattr(os, name, self._by_descriptor(name, self.real[name]))
        os.open, os.close = self._open, self._close  # type: ignore[assignment]
        fcntl.flock = self._by_descriptor("flock", fcntl.flock)
        builtins.open = io.open = self._open_file  # type: ignore[assignment]
        local._exchange = self._by_two_paths("renameat2", local._exchange)

    def path_of(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path that a call is about; None for one that lies elsewhere."""
        if isinstance(path, int):
            return self.paths.get(path)
        if dir_fd is not None and not os.path.isabs(path):
            directory = self.paths.get(dir_fd)
            return None if directory is None else os.path.join(directory, path)
        whole = os.path.abspath(os.fsdecode(path))
        return whole if whole == self.root or whole.startswith(f"{self.root}/") else None

    def _make(self, call: Call, function: Callable[[], Any]) -> Any:
        self.count += 1
        short = self.before(call, self.count)
        result = function() if short is None else short
        self.after(call, result)
        return result

    def _by_path(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def made(path: Any = ".", *arguments: Any, **keywords: Any) -> Any:
            whole = self.path_of(path, keywords.get("dir_fd"))
            if whole is None:
                return real(path, *arguments, **keywords)
            return self._make(Call(name, whole, (path, *arguments), keywords), lambda: real(path, *arguments, **keywords))

        return made

    def _by_two_paths(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def made(first: Any, second: Any, **keywords: Any) -> Any:
            one, two = (os.fsdecode(first) if name == "symlink" else self.path_of(first)), self.path_of(second)
            if one is None or two is None:
                return real(first, second, **keywords)
            return self._make(Call(name, two, (one, two), keywords), lambda: real(first, second, **keywords))

        return made

    def _by_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def made(descriptor: int, *arguments: Any) -> Any:
            path = self.paths.get(descriptor)
            if path is None:
                return real(descriptor, *arguments)
            return self._make(Call(name, path, (descriptor, *arguments)), lambda: real(descriptor, *arguments))

        return made

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        whole = self.path_of(path, dir_fd)
        if whole is None:
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)
        call = Call("open", whole, (path, flags))
        descriptor = self._make(call, lambda: self.real["open"](path, flags, mode, dir_fd=dir_fd))
        self.paths[descriptor] = whole
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self.written.add(descriptor)
        return descriptor

    def _close(self, descriptor: int) -> None:
        path = self.paths.pop(descriptor, None)
        self.real["close"](descriptor)  # first: a descriptor is gone whatever its close returns
        if path is not None and descriptor in self.written:
            self.written.discard(descriptor)
            self._make(Call("close", path, (descriptor,)), lambda: None)

    def adopt(self, descriptor: int, original: int) -> None:
        """Follow a duplicate in the place of a descriptor that is about to be closed by other means."""
        self.paths[descriptor] = self.paths.pop(original)
        if original in self.written:
            self.written.discard(original)
            self.written.add(descriptor)

    def _open_file(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(file, int) or self.path_of(file) is None:
            return REAL_OPEN(file, mode, buffering, *arguments, **keywords)
        assert "b" in mode, f"open({file!r}, {mode!r}) is not followed"
        raw = _File(self, file, mode.replace("b", ""))
        if buffering == 0:
            return raw
        return io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)


REAL_OPEN = builtins.open
_FLAGS = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}


class _File(io.FileIO):
    """What `open` returns: its reads and writes are calls of the layer."""

    def __init__(self, layer: Layer, path: Any, mode: str) -> None:
        self.layer = layer
        super().__init__(path, mode, opener=lambda path, _: layer._open(path, _FLAGS[mode] | os.O_CLOEXEC, 0o666))

    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)

    def readinto(self, buffer: Any) -> int:
        data = os.read(self.fileno(), len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: os.read(self.fileno(), 1 << 20), b""))

    def close(self) -> None:
        if not self.closed:
            descriptor = os.dup(self.fileno())
            self.layer.adopt(descriptor, self.fileno())
            super().close()
            os.close(descriptor)


class Fault:
    """Lets the call number `at` end otherwise: `before` of a Layer.

    action: the name of an errno; "short" for a write of which the system takes half, or a read of which it gives half; "kill".
    """

    def __init__(self, at: int, action: str) -> None:
        self.at, self.action = at, action
        self.struck: Call | None = None
        self.layer: Layer | None = None

    def install(self, root: Path) -> None:
        self.layer = Layer(root, self)

    def __call__(self, call: Call, number: int) -> Any:
        if number != self.at:
            return None
        self.struck = call
        if self.action == "short":
            return self._half(call)
        if self.action == "kill" and call.name in WRITES:
            self._half(call)
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.action)
        raise OSError(code, os.strerror(code), call.path)

    def _half(self, call: Call) -> Any:
        """The first half of a read or a write, rounded up: what it returns."""
        assert self.layer is not None
        descriptor, what, *rest = call.arguments
        real = self.layer.real[call.name]
        if call.name in READS:
            return real(descriptor, (what + 1) // 2, *rest)
        if call.name in ("writev", "pwritev"):
            whole = b"".join(map(bytes, what))
            return real(descriptor, [whole[: (len(whole) + 1) // 2]], *rest)
        whole = bytes(what)
        return real(descriptor, whole[: (len(whole) + 1) // 2], *rest)
