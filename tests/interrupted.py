"""Saves that are interrupted at their 1st, 2nd, ... step: ``python -m tests.interrupted DIRECTORY ACTION FLAGS``.

Steps are calls that change the disk. ACTION is kill (SIGKILL before the step, half of a write done), or the name of an errno
that the step and all later ones raise. FLAGS: "overwrite" (a checkpoint is there already), "plain" (as if the system had no
atomic exchange). Writes JSON: for every step what was found afterwards.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import polyckpt
from polyckpt.storage import local
from tests.sealing import save_small

STEPS = ("mkdir", "fsync", "rename", "rmdir", "unlink")
OLD, NEW, NEXT = 1.0, 2.0, 3.0


class Steps:
    """Counts the steps and strikes at the n-th."""

    def __init__(self, at: int, action: str) -> None:
        self.at, self.action, self.count = at, action, 0

    def step(self, name: str) -> None:
        self.count += 1
        if self.action == "kill" and self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        # A disk that is full or broken stays so, but it can still delete.
        if self.action != "kill" and self.count >= self.at and name not in ("rmdir", "unlink"):
            code = getattr(errno, self.action)
            raise OSError(code, os.strerror(code))

    def before(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.step(name)
            return original(*args, **kwargs)

        return call


class File:
    """A file whose writes are steps, each done by half before its second step."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self.file, self.steps = file, steps

    def write(self, data: Any) -> int:
        self.steps.step("write")
        half = self.file.write(bytes(data[: len(data) // 2]))
        self.file.flush()
        self.steps.step("write")
        rest = bytes(data[half:])
        while rest:
            rest = rest[self.file.write(rest) :]
        return len(data)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def interrupted_save(target: Path, at: int, action: str, flags: str) -> int:
    """In a child: 0 where the save ran through, 3 after the StorageError that it must raise, 4 after another one."""
    steps = Steps(at, action)
    for name in STEPS:
        setattr(os, name, steps.before(name, getattr(os, name)))
    local._exchange = (lambda *_: False) if "plain" in flags else steps.before("rename", local._exchange)
    original_open = builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "x" not in mode:
            return original_open(file, mode, *args, **kwargs)
        steps.step("open")
        return File(original_open(file, mode, *args, **kwargs), steps)

    builtins.open = opened
    try:
        save_small(target, NEW, overwrite="overwrite" in flags)
    except polyckpt.StorageError as error:
        return 3 if error.errno == getattr(errno, action, None) else 4
    return 0


def fork(target: Path, at: int, action: str, flags: str) -> int:
    """The exit status of `interrupted_save` in a child, -9 after a kill."""
    child = os.fork()
    if child == 0:
        status = 5
        try:
            status = interrupted_save(target, at, action, flags)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def found(path: Path) -> Any:
    """What can be read at `path`: the number in all of its arrays, or the error."""
    try:
        checkpoint = polyckpt.inspect(path)
        checkpoint.verify()
    except polyckpt.PolyckptError as error:
        return type(error).__name__
    values = {float(value) for name in checkpoint.weights for value in checkpoint.weights[name].flat}
    return values.pop() if len(values) == 1 else sorted(values)


def survey(directory: Path, action: str, flags: str) -> list[dict[str, Any]]:
    """What was found after each step; the last save ran through."""
    findings = []
    while not findings or findings[-1]["status"] != 0:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        earlier, target = save_small(directory / "earlier", OLD), directory / "target"
        if "overwrite" in flags:
            save_small(target, OLD)
        status = fork(target, len(findings) + 1, action, flags)
        finding = {"status": status, "target": found(target), "earlier": found(earlier), "there": sorted(os.listdir(directory))}
        save_small(target, NEXT, overwrite=True)
        findings.append({**finding, "next": found(target), "there_next": sorted(os.listdir(directory))})
    return findings


if __name__ == "__main__":
    json.dump(survey(Path(sys.argv[1]), sys.argv[2], sys.argv[3]), sys.stdout)
