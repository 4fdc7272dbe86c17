"""ModelCheckpoint: the drop-in for keras.callbacks.ModelCheckpoint."""

from __future__ import annotations

import contextlib
import glob
import os
import string
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras.src.utils import io_utils

from polyckpt import policy
from polyckpt.adapters.keras import written
from polyckpt.adapters.keras.skipping import skipping
from polyckpt.background import Background
from polyckpt.policy import BestBy, KeepLast, Mode, Record
from polyckpt.staging import Staging

_FILES = (".keras", ".h5")
_OTHER_NAMES = ".hdf5 .tf .ckpt .pb .pt .pth .bin .json .npz .safetensors .msgpack .zip .weights"


class ModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]  # Keras ships no types
    """keras.callbacks.ModelCheckpoint that is never fooled by NaN, never leaves half a file, and remembers the best.

    The first eight arguments, the messages and the warnings are those of Keras, so changing the import is enough. A file
    `.keras`, `.h5` or `.weights.h5` is what Keras writes, and replaces an earlier one in one step. Where `filepath` has no such
    suffix it is a directory, and a polyckpt checkpoint is saved there, with everything that an exact resume needs, or the
    weights alone with `save_weights_only`.

    keep_best, keep_last: of the files of a template such as "{epoch:02d}-{val_loss:.2f}.keras", keep the so many best by
    `monitor` and the so many last; by default all. One that would not be kept is not written, and a new one is in place
    before an old one is deleted. min_delta: how much better the best must be, at least 0. minutes: save also when so many have
    passed since the last save, at the end of a batch. async_save: leave to the background what need not be done between two
    steps (for a directory all but one copy in memory; for a file syncing it and putting it in place). resume: whether
    the best value, and the files to keep, are taken over from an earlier process that wrote to the same path; by default where
    training goes on, that is, where the optimizer has made steps or the first epoch is not 0.

    With an integer `save_freq` a monitored `val_...` metric is not known at the end of a batch: what is due by then is decided
    at the end of the epoch. A missing metric warns and saves, as in Keras; NaN and infinity are never best.

    Raises ValueError for arguments that contradict each other; KeyError, as it saves, for an unknown name in `filepath`;
    OSError where the path is taken; and the error of a save in the background at the next save or the end of training.

    >>> import numpy as np, tempfile
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> saving = ModelCheckpoint(tempfile.mkdtemp() + "/{epoch:02d}.keras", monitor="loss", keep_best=1)
    >>> history = model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, callbacks=[saving], verbose=0)
    """

    best: Any

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        keep_best: int | None = None,
        keep_last: int | None = None,
        min_delta: float = 0.0,
        minutes: float | None = None,
        async_save: bool = False,
        resume: bool | None = None,
    ) -> None:
        path = os.fspath(filepath)
        self._directories = not path.endswith(_FILES) and os.path.splitext(path)[1] not in _OTHER_NAMES.split()
        # Keras knows no directories; what it makes of its other arguments is the same.
        checked = path if not self._directories else path + (".weights.h5" if save_weights_only else ".keras")
        super().__init__(checked, monitor, verbose, save_best_only, save_weights_only, mode, save_freq, initial_value_threshold)
        self.filepath = path
        fields = [name for _, name, _, _ in string.Formatter().parse(path) if name]
        for name, number in (("keep_best", keep_best), ("keep_last", keep_last)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ValueError(f"{name}={number!r}: a whole number, 1 or more, or None to keep all")
            if number is not None and not fields:
                raise ValueError(f"{name}={number!r} needs a filepath with fields, such as {{epoch:02d}}. Received: {path}")
        if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
            raise ValueError(f"minutes={minutes!r}: a number above 0")
        if not min_delta >= 0:
            raise ValueError(f"min_delta={min_delta!r}: a number, 0 or more")
        self._keep_best, self._keep_last = keep_best, keep_last
        self._delta = min_delta
        self._minutes = minutes
        self._resume = resume
        self._async = async_save
        self._background = Background("ModelCheckpoint")
        self._staging = Staging()
        self._records: list[Record] = []
        self._looked = False
        self._due = False  # on a batch that could not decide
        self._saved_at = time.monotonic()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._saved_at = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._current_epoch = epoch
        if not self._looked:
            self._looked = True
            trained = epoch > 0 or int(getattr(self.model.optimizer, "iterations", 0)) > 0
            if trained if self._resume is None else self._resume:
                self._take_over()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        due = self._should_save_on_batch(batch)
        if self._minutes is not None and time.monotonic() - self._saved_at >= self._minutes * 60:
            self._saved_at = time.monotonic()
            due = True
        if not due or skipping(self._model):
            return
        logs = logs or {}
        if self._by_value and self.monitor.startswith("val_") and self.monitor not in logs:
            self._due = True
        else:
            self._consider(self._current_epoch, batch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._set_direction()
        if self.save_freq == "epoch" or self._due:
            self._due = False
            self._consider(epoch, None, logs or {})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._background.wait()

    @property
    def _by_value(self) -> bool:
        return bool(self.save_best_only or self._keep_best)

    @property
    def _mode(self) -> Mode:
        self._set_direction()
        return "min" if self.monitor_op is keras.ops.less else "max"

    def _set_direction(self) -> None:
        if self.monitor_op is None:
            self._set_monitor_op()

    def _consider(self, epoch: int, batch: int | None, logs: Mapping[str, Any]) -> None:
        value, best = self._value(logs), self.best
        if self.save_best_only and value is not None and not policy.improves(value, _number(best), self._mode, self._delta):
            self._say(epoch, f"{self.monitor} did not improve from {_shown(best)}")
            return
        record = Record(
            sequence=self._records[-1].sequence + 1 if self._records else 1,
            time=int(time.time()),
            epoch=epoch + 1 if batch is None else epoch,
            batch=None if batch is None else batch + 1,
            metrics=_scalars(logs),
        )
        if record.sequence not in self._kept([*self._records, record]):
            self._say(epoch, f"{self.monitor} is not among the {self._keep_best} best")
            return
        path = self._formatted(epoch, batch, logs)
        if self.save_best_only and value is not None:
            self._say(epoch, f"{self.monitor} improved from {_shown(best)} to {value:.5f}, saving model to {path}")
        elif not self.save_best_only:
            self._say(epoch, f"saving model to {path}")
        if value is not None and policy.improves(value, _number(best), self._mode):
            best = logs[self.monitor]
        self._write(path, record, _number(best))
        # Only what is saved is best: after a save that failed the next one is compared with what there is.
        self.best = best if self.save_best_only else self.best
        self._say(epoch, f"finished saving model to {path}")

    def _value(self, logs: Mapping[str, Any]) -> float | None:
        """The monitored value; None, after a warning, where there is none that decides."""
        if not self._by_value:
            return None
        current = logs.get(self.monitor)
        if current is None:
            warnings.warn(
                f"Can save best model only with {self.monitor} available. Available metrics are: {','.join(logs)}", stacklevel=4
            )
            return None
        if np.ndim(keras.ops.convert_to_numpy(current) if keras.ops.is_tensor(current) else current) > 0:
            warnings.warn(
                f"Can save best model only when `monitor` is a scalar value. Received: {current}. "
                "Falling back to `save_best_only=False`.",
                stacklevel=4,
            )
            return None
        return float(current)

    def _formatted(self, epoch: int, batch: int | None, logs: Mapping[str, Any]) -> str:
        numbers = {"epoch": epoch + 1, **({} if batch is None or "batch" in logs else {"batch": batch + 1})}
        try:
            return self.filepath.format(**numbers, **logs)
        except KeyError as error:
            raise KeyError(f'Failed to format this callback filepath: "{self.filepath}". Reason: {error}') from error

    def _write(self, path: str, record: Record, best: float | None) -> None:
        self._background.wait()
        self._saved_at = time.monotonic()
        record = replace(record, name=path)
        note = written.Note(template=self.filepath, monitor=self.monitor, best=best, record=record)
        commit = written.begin(
            path,
            self.model,
            note,
            directory=self._directories,
            weights_only=self.save_weights_only,
            staging=self._staging if self._async else None,
        )
        records = [*(each for each in self._records if each.name != path), record]
        kept = self._kept(records)

        def finish() -> None:
            commit()
            for each in records:
                if each.sequence not in kept and each.name:
                    written.delete(each.name)

        self._records = [each for each in records if each.sequence in kept]
        if self._async:
            self._background.submit(finish)
        else:
            finish()

    def _kept(self, records: Sequence[Record]) -> set[int]:
        if self._keep_best is None and self._keep_last is None:
            return {record.sequence for record in records}
        kept: set[int] = set()
        if self._keep_best is not None:
            kept |= BestBy(self.monitor, self._mode, self._keep_best).kept(records)
        if self._keep_last is not None:
            kept |= KeepLast(self._keep_last).kept(records)
        # What has no value can be compared with nothing, so it is saved, as Keras does, and kept.
        return kept | {record.sequence for record in records if self._keep_best and self.monitor not in record.metrics}

    def _take_over(self) -> None:
        """Go on with the best value and the files of an earlier process."""
        notes = [note for path in _matching(self.filepath) if (note := written.read(path)) and note.template == self.filepath]
        notes.sort(key=lambda note: note.record.sequence)
        self._records = [note.record for note in notes]
        if not self.save_best_only:
            return
        for note in notes:
            if note.monitor == self.monitor and policy.improves(note.best, _number(self.best), self._mode):
                self.best = note.best

    def _say(self, epoch: int, message: str) -> None:
        if self.verbose > 0:
            io_utils.print_msg(f"\nEpoch {epoch + 1}: {message}")


def _scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in logs.items():
        with contextlib.suppress(TypeError, ValueError):
            found[name] = float(value)
    return found


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _shown(best: Any) -> str:
    return "None" if best is None else f"{best:.5f}"


def _matching(template: str) -> list[str]:
    """The paths there are that `template` may have been formatted to."""
    parts = string.Formatter().parse(template)
    return glob.glob("".join(glob.escape(literal) + ("" if field is None else "*") for literal, field, _, _ in parts))
