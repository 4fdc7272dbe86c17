"""history.jsonl: every decision and metric of a run, one line each, only ever appended.

A line is a JSON object whose last member is a checksum of all before it, so that a torn or damaged line is known and left
out. Records stand in the order of the run; one whose sequence number is not above those before it says that the run went
back there: what it follows is that far, and the lines between are of a branch that was given up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from polyckpt import schema
from polyckpt.checksums import checksum
from polyckpt.errors import StorageError
from polyckpt.policy import Record
from polyckpt.storage import local

FILE_NAME = "history.jsonl"
MAX_BYTES = 1 << 33
"""More than forty million records: a run that tells its loss after each step must not come to an end here."""
_SHOWN = 10
"""Damaged lines that are named."""
FAILED = "failed"
"""The event of a save that did not come to its end."""
_SEAL = b',"checksum":"'


class _Line(msgspec.Struct, gc=False):
    """A line: one names the run, the first unless that was damaged; others are a record (with a sequence) or an event."""

    run: str | None = None
    sequence: int | None = None
    time: int = 0
    epoch: int | None = None
    step: int | None = None
    batch: int | None = None
    metrics: dict[str, schema.Number] = {}
    name: str | None = None
    event: str | None = None


@dataclass(frozen=True)
class Told:
    """What a history tells: the run's id, its records in order, and the name of every checkpoint it ever made.

    last: the name that was told last, whose checkpoint a kill may have kept from coming to its end.
    """

    run: str | None
    records: tuple[Record, ...]
    names: frozenset[str]
    last: str | None = None


class History:
    """The history file in `directory`; opened for appending when the first line is added."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self._descriptor: int | None = None
        self._lock = threading.Lock()  # lines come from the thread that saves too

    def read(self) -> Told:
        """All that can be read. Lines that cannot are reported in a warning; without a file there is nothing.

        Raises CorruptError for what is no regular file, or too large to be a history, StorageError where the system refuses.
        """
        run: str | None = None
        records: list[Record] = []
        places: dict[str, int] = {}  # of the names that there were, where the last record of that name stood
        last: str | None = None
        damaged: list[int] = []
        for number, text in enumerate(self._lines(), 1):
            line = _decode(text)
            if line is None:
                if len(damaged) < _SHOWN:
                    damaged.append(number)
                continue
            run = run or line.run
            if line.event == FAILED and line.name:
                place = places.get(line.name, len(records))
                if place < len(records) and records[place].name == line.name:
                    records[place] = replace(records[place], name=None)
            if line.sequence is None:
                continue
            while records and records[-1].sequence >= line.sequence:
                records.pop()
            if line.name:
                places[line.name], last = len(records), line.name
            records.append(_record(line))
        if damaged:
            warnings.warn(f"{self.path}: lines {damaged} are damaged and left out", stacklevel=2)
        return Told(run, tuple(records), frozenset(places), last)

    def _lines(self) -> Iterator[bytes]:
        try:
            yield from local.read_lines(self.path, MAX_BYTES, "a history")
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {self.path}: {error.strerror}") from error

    @property
    def open(self) -> bool:
        """Whether lines can be added."""
        return self._descriptor is not None

    def begin(self, run: str) -> None:
        """Make sure that the file names the run and ends in a whole line."""
        self.close()
        try:
            self._descriptor = local.open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            first = _decode(os.pread(self._descriptor, 1000, 0).partition(b"\n")[0])
            if (whole := local.end_of_lines(self._descriptor)) < os.fstat(self._descriptor).st_size:
                os.ftruncate(self._descriptor, whole)
            if not whole or first is None:
                self._append({"run": run})
        except BaseException as error:
            self.close()  # else it would look as if lines could be added
            if isinstance(error, StorageError) or not isinstance(error, OSError):
                raise
            raise StorageError(error.errno, f"cannot write {self.path}: {error.strerror}") from error

    def add(self, record: Record) -> None:
        """Append a record."""
        self._append({**members(record), "name": record.name})

    def event(self, what: str, **about: Any) -> None:
        """Append what happened to a checkpoint, for people to read."""
        self._append({"event": what, **about})

    def sync(self) -> None:
        """Make what was appended durable."""
        try:
            if self._descriptor is not None:
                os.fsync(self._descriptor)
        except OSError as error:
            raise StorageError(error.errno, f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file; a later `begin` opens it again."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):  # it is closed whatever the system says
                os.close(descriptor)

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._descriptor is not None, "begin() comes first"
        body = msgspec.json.encode(line).removesuffix(b"}")
        data = body + _SEAL + checksum(body).encode() + b'"}\n'
        try:
            with self._lock:
                if (size_bytes := os.write(self._descriptor, data)) != len(data):
                    os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - size_bytes)
                    raise OSError(errno.ENOSPC, "no space left for a whole line")
        except OSError as error:
            raise StorageError(error.errno, f"cannot write {self.path}: {error.strerror}") from error


def members(record: Record) -> dict[str, Any]:
    """A record as JSON, but for its name."""
    metrics = {name: schema.to_number(value) for name, value in record.metrics.items()}
    return {
        **{name: getattr(record, name) for name in ("sequence", "time", "epoch", "step", "batch")},
        "metrics": msgspec.to_builtins(metrics),
    }


def _decode(text: bytes) -> _Line | None:
    body, seal, stated = text.rpartition(_SEAL)
    if not seal or stated != checksum(body).encode() + b'"}':
        return None
    try:
        return msgspec.json.decode(body + b"}", type=_Line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


def _record(line: _Line) -> Record:
    assert line.sequence is not None
    metrics = {name: schema.from_number(number) for name, number in line.metrics.items()}
    return Record(
        sequence=line.sequence,
        time=line.time,
        epoch=line.epoch,
        step=line.step,
        batch=line.batch,
        metrics=metrics,
        name=line.name,
    )
