"""What lies in the directory of a run, read without becoming its writer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import msgspec

from polyckpt import schema
from polyckpt.cli import screen
from polyckpt.errors import CheckpointError, CorruptError, NotACheckpointError, PolicyError, PolyckptError, RunError
from polyckpt.formats import table
from polyckpt.heads import FILE_NAME, decode_head
from polyckpt.history import History
from polyckpt.policy import Record
from polyckpt.rules import Rules
from polyckpt.run import Run, read
from polyckpt.storage import local
from polyckpt.storage.run_directory import RunDirectory


class Listed(msgspec.Struct, frozen=True):
    """A checkpoint in a directory. time: of its save, in seconds since 1970. marks: best, last, or what is wrong with it."""

    name: str
    path: Path
    progress: schema.Progress
    metrics: dict[str, float]
    time: float
    marks: tuple[str, ...] = ()


def opened(path: Path, monitor: str | None, mode: str, keep_last: int | None = None, keep_best: int | None = None) -> Run:
    """The run in a directory under the rules that a CheckpointManager would have. Raises PolicyError or RunError."""
    directory = local.absolute(path)
    if not directory.is_dir():
        raise NotACheckpointError(f"{directory}: no such directory")
    rules = Rules.of(
        monitor=monitor,
        mode=mode,
        keep_best=keep_best,
        keep_last=keep_last,
        keep=(),
        every=None,
        patience=None,
        min_delta=0.0,
        early_stopping=None,
    )
    found = read(RunDirectory(directory), History(directory), rules, 0)
    if not found.checkpoints:
        # Of no manager of ours: whatever checkpoints lie there are the run.
        there, unreadable = _lying_there(directory)
        found = Run(rules=rules, started=0, records=there, checkpoints=tuple(there), damaged={**found.damaged, **unreadable})
    if not (found.checkpoints or found.damaged):
        raise NotACheckpointError(f"{directory}: no checkpoint in it")
    return found


def _lying_there(directory: Path) -> tuple[list[Record], dict[str, CorruptError]]:
    """The checkpoints in a directory, of any format, in the order of training, and the errors of those that cannot be read."""
    from polyckpt.formats.opened import open_

    records, unreadable = [], {}
    steps = table.steps(directory)
    for child in sorted(directory.iterdir()):
        if child.is_symlink() or not (child in steps or is_checkpoint(child)):
            continue
        try:
            told = open_(child).manifest
        except (PolyckptError, OSError) as error:
            unreadable[child.name] = CorruptError(str(error))
            continue
        metrics = {name: float(schema.from_number(value)) for name, value in told.metrics.items()}
        time = int(datetime.fromisoformat(told.saved_at_utc).timestamp())
        records.append(Record(sequence=1, time=time, metrics=metrics, name=child.name, **msgspec.structs.asdict(told.progress)))
    records.sort(key=lambda each: (each.step or 0, each.epoch or 0, each.time, str(each.name)))
    return [replace(record, sequence=place) for place, record in enumerate(records, 1)], unreadable


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint of ours, or in a format of others; a directory of many is none."""
    return (path / FILE_NAME).is_file() or (bool(table.candidates(path)) and not table.steps(path))


def best(path: Path, monitor: str | None, mode: str) -> Path:
    """The best checkpoint of a run: by the metric, or what its own manager took for the best."""
    run = opened(path, monitor, mode)
    name = best_of(run, path, monitor)
    if name is not None:
        return (local.absolute(path) / name).resolve()
    if monitor is not None:
        raise RunError(f"{path}: {run.no_best()}")
    raise PolicyError(f"{path}: its manager had no monitor, so that none is best: name a metric with --monitor")


def best_of(run: Run, path: Path, monitor: str | None) -> str | None:
    """The name of the best checkpoint of a run that was opened with this monitor; None where none is."""
    if monitor is not None:
        return next((each.name for each in run.selected("best", str(path))), None)
    link = local.absolute(path) / "best"
    return os.readlink(link) if link.is_symlink() else None


def listed(path: Path, monitor: str | None, mode: str) -> list[Listed]:
    """Every checkpoint in a directory, oldest first."""
    run, directory = opened(path, monitor, mode), local.absolute(path)
    chosen = best_of(run, path, monitor)
    last = run.checkpoints[-1].name if run.checkpoints else None
    found = []
    for record in run.checkpoints:
        marks = tuple(mark for mark, name in (("best", chosen), ("last", last)) if name == record.name)
        found.append(_listed(directory, record, marks))
    for name in run.others:
        try:
            head = _head(directory / name)
        except CheckpointError as error:
            found.append(Listed(name, directory / name, schema.Progress(), {}, 0.0, (str(error),)))
            continue
        metrics = {metric: float(schema.from_number(value)) for metric, value in head.metrics.items()}
        time = datetime.fromisoformat(head.saved_at_utc).timestamp()
        found.append(Listed(name, directory / name, head.progress, metrics, time))
    found += [Listed(name, directory / name, schema.Progress(), {}, 0.0, ("damaged",)) for name in run.damaged]
    return sorted(found, key=lambda each: (each.time, each.name))


def _listed(directory: Path, record: Record, marks: tuple[str, ...]) -> Listed:
    name = str(record.name)
    progress = schema.Progress(epoch=record.epoch, step=record.step, batch=record.batch)
    metrics = {metric: float(value) for metric, value in record.metrics.items()}
    return Listed(name, directory / name, progress, metrics, float(record.time), marks)


def _head(path: Path) -> schema.Head:
    source = path / FILE_NAME
    return decode_head(local.read_manifest(source), str(source))


def checkpoints(paths: Sequence[Path]) -> list[Path]:
    """The checkpoints that paths stand for: themselves, or all in a directory, damaged ones included."""
    found = []
    for path in paths:
        directory = local.absolute(path)
        if not directory.is_dir() or is_checkpoint(directory):
            found.append(directory)
            continue
        inside = sorted({each.path.resolve() for each in listed(path, None, "auto")})
        found += inside
    return found


def prune(
    path: Path, monitor: str | None, mode: str, keep_last: int, keep_best: int | None, *, dry_run: bool
) -> Iterator[tuple[int, str]]:
    """Delete the checkpoints that neither is among the newest or best nor marked best, oldest first: bytes and name of each.

    Raises LockedError where a training run writes to the directory.
    """
    run, directory = opened(path, monitor, mode, keep_last, keep_best), local.absolute(path)
    if run.id is None:
        raise RunError(f"{directory}: no CheckpointManager wrote what lies there, so nothing of it is deleted")
    kept = run.rules.retained(run.checkpoints)
    marked = best_of(run, path, monitor)
    files, history = RunDirectory(directory), History(directory)
    if not dry_run:
        files.claim()
        history.begin(str(run.id))
    try:
        for record in run.checkpoints:
            name = str(record.name)
            if record.sequence in kept or name == marked or name in run.copies:
                continue
            size_bytes = screen.bytes_of(directory / name)
            if dry_run or files.delete(name):
                if not dry_run:
                    history.event("deleted", name=name)
                yield size_bytes, name
    finally:
        if not dry_run:
            history.close()
            files.release()
