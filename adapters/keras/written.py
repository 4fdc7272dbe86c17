"""What ModelCheckpoint writes: files of Keras and checkpoints of polyckpt, each with a note of why it was saved."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import msgspec

import polyckpt
from polyckpt import history, schema, snapshot
from polyckpt.policy import Record
from polyckpt.staging import Staging
from polyckpt.storage import local
from polyckpt.storage.run_directory import RunDirectory

_MEMBER = "polyckpt.json"
_ATTRIBUTE = "polyckpt"
_EXTRA = "polyckpt.ModelCheckpoint"


@dataclass(frozen=True)
class Note:
    """template: the path with its fields. best: the best `monitor` up to then. record: of this file; its name is the path."""

    template: str
    monitor: str
    best: float | None
    record: Record


def begin(
    path: str, model: Any, note: Note, *, directory: bool, weights_only: bool, staging: Staging | None
) -> Callable[[], None]:
    """Read all that is needed of the model; the function returned puts the file or directory in place, at any time.

    staging: where that is to be later. Raises OSError where something else is at `path`.
    """
    if directory:
        return _begin_checkpoint(path, model, note, weights_only, staging)
    if os.path.isdir(path):
        raise OSError(
            f"Please specify a non-directory filepath for ModelCheckpoint. Filepath used is an existing directory: {path}"
        )
    save = model.save_weights if weights_only else model.save
    if "://" in path:  # what another file system can do in one step is its own affair
        save(path, overwrite=True)
        return lambda: None
    replacement = local.Replacement(local.absolute(path))
    try:
        save(str(replacement.path), overwrite=True)
        _annotate(replacement.path, _encoded(note))
    except BaseException:
        replacement.discard()
        raise
    return replacement.commit


def read(path: str) -> Note | None:
    """The note in a file or checkpoint, its record named by `path`; None where there is none that can be read."""
    try:
        if os.path.isdir(path):
            entry = polyckpt.inspect(path).manifest.native["extra"][_EXTRA]
            return _decoded(entry["state"], path)
        if path.endswith(".keras"):
            with zipfile.ZipFile(path) as archive:
                return _decoded(archive.read(_MEMBER).decode(), path)
        with h5py.File(path, "r") as file:
            return _decoded(str(file.attrs[_ATTRIBUTE]), path)
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile, polyckpt.CheckpointError):
        return None


def delete(path: str) -> None:
    """Delete a file or checkpoint that `begin` wrote."""
    if os.path.isdir(path):
        whole = local.absolute(path)
        RunDirectory(whole.parent).delete(whole.name)
    else:
        Path(path).unlink(missing_ok=True)


def _begin_checkpoint(path: str, model: Any, note: Note, weights_only: bool, staging: Staging | None) -> Callable[[], None]:
    optimizer = getattr(model, "optimizer", None)
    captured = snapshot.capture(
        model,
        False if weights_only else None,
        epoch=note.record.epoch,
        step=None if optimizer is None else int(optimizer.iterations),
        batch=note.record.batch,
        metrics=note.record.metrics,
        extra={_EXTRA: _encoded(note)},
    )
    if staging is not None:
        captured.stage(staging)
    return lambda: captured.write(local.absolute(path), overwrite=True, time=note.record.time)


def _annotate(path: Path, text: str) -> None:
    if path.suffix == ".keras":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_MEMBER, text)
    else:
        with h5py.File(path, "a") as file:
            file.attrs[_ATTRIBUTE] = text


def _encoded(note: Note) -> str:
    about = {"template": note.template, "monitor": note.monitor, "best": note.best}
    return json.dumps({**about, "record": history.members(note.record)})


class _Record(msgspec.Struct):
    sequence: int
    time: int
    epoch: int | None
    batch: int | None
    metrics: dict[str, schema.Number]


class _Note(msgspec.Struct):
    template: str
    monitor: str
    best: float | None
    record: _Record


def _decoded(text: str, path: str) -> Note:
    stated = msgspec.json.decode(text, type=_Note)
    record = Record(
        sequence=stated.record.sequence,
        time=stated.record.time,
        epoch=stated.record.epoch,
        batch=stated.record.batch,
        metrics={name: schema.from_number(number) for name, number in stated.record.metrics.items()},
        name=path,
    )
    return Note(stated.template, stated.monitor, stated.best, record)
