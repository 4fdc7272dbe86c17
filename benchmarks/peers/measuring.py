"""How a piece of work is measured: every contender once per round, so that a slow minute of the machine is everybody's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MB = 1_000_000


def nothing(*_: Any) -> None:
    """What a contender does that needs no step here."""


Meter = Callable[[Callable[[], Any]], tuple[float, Any]]
"""Runs something; returns what was measured, and the result."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do a piece of work.

    run: what is measured. prepare, settle: before and after every run, not measured. spoil, check: before and after the
    warm-up run only; check raises where something is not what was saved. settle, check: given what `run` returned. notes: what
    sets this contender apart, by column.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], object] = nothing
    settle: Callable[[Any], object] = nothing
    spoil: Callable[[], object] = nothing
    check: Callable[[Any], object] = nothing
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured side by side.

    size_bytes: what is moved, where speed is of interest. setting: what holds as long as it is measured. unit: "s" or "MB".
    """

    key: str
    title: str
    contenders: Sequence[Contender]
    meter: Meter
    unit: str = "s"
    size_bytes: int | None = None
    setting: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    more_rounds: int = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the rounds gave, and the notes, by contender; holds none of the values that were moved."""

    key: str
    title: str
    unit: str
    size_bytes: int | None
    values: dict[str, list[float]]
    notes: dict[str, dict[str, str]]

    def median(self, contender: str) -> float:
        """Of all rounds but the warm-up."""
        return statistics.median(self.values[contender])


def measure(work: Work, rounds: int) -> Measured:
    """One warm-up round, in which the results are checked, then `rounds` that count."""
    values: dict[str, list[float]] = {contender.name: [] for contender in work.contenders}
    os.sync()
    with work.setting():
        for number in range(rounds + work.more_rounds + 1):
            for contender in work.contenders:
                value = _run(contender, work.meter, warm_up=number == 0)
                if number:
                    values[contender.name].append(value)
    return Measured(
        key=work.key,
        title=work.title,
        unit=work.unit,
        size_bytes=work.size_bytes,
        values=values,
        notes={contender.name: contender.notes for contender in work.contenders},
    )


def _run(contender: Contender, meter: Meter, warm_up: bool) -> float:
    contender.prepare()
    if warm_up:
        contender.spoil()
    gc.collect()
    value, result = meter(contender.run)
    if warm_up:
        contender.check(result)
    contender.settle(result)
    return value


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time, until the GPU too is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else nothing
    wait()
    began = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - began, result


def extra_memory(run: Callable[[], Any]) -> tuple[float, Any]:
    """The most private memory, in MB, that the process takes at any time of `run` beyond what it had (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
    began, most, done = _private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()
    finally:
        done.set()
        watcher.join()
    return max(0, most - began) / MB, result


def written(run: Callable[[], Path]) -> tuple[float, Path]:
    """The MB of the files in the directory that `run` returns, without those that are links to files of another."""
    path = run()
    statuses = [file.stat() for file in path.rglob("*") if file.is_file()]
    return sum(status.st_size for status in statuses if status.st_nlink == 1) / MB, path


def sync_tree(path: Path) -> None:
    """Everything at `path`, and its name, to disk."""
    for each in (path, *path.rglob("*"), path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def require(holds: bool, problem: str) -> None:
    """Raise where something that is measured does not do its work."""
    if not holds:
        raise AssertionError(problem)


@contextlib.contextmanager
def not_durable() -> Iterator[None]:
    """Python code that syncs files does not, for as long as this lasts."""
    real = os.fsync, os.fdatasync
    os.fsync = os.fdatasync = nothing
    try:
        yield
    finally:
        os.fsync, os.fdatasync = real


def clear(path: Path) -> None:
    """Remove what there is at `path`, and wait for all that is not on disk yet: it would fall into the next one's time."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()


def _private_bytes() -> int:
    if sys.platform != "linux":
        raise NotImplementedError("private memory is read from /proc")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
