"""EarlyStopping that goes on counting where an interrupted run stopped."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import keras

import polyckpt
from polyckpt.adapters.keras.skipping import stop_before_training, train_again
from polyckpt.history import History
from polyckpt.policy import Record

_BEST_WEIGHTS = "best-weights-{:08d}"


class EarlyStopping(keras.callbacks.EarlyStopping):  # type: ignore[misc]  # Keras ships no types
    """keras.callbacks.EarlyStopping, in which NaN and infinity are never best, and which can survive a restart.

    The first eight arguments are those of Keras. directory: where the monitored values are kept, one line per epoch, and with
    restore_best_weights the best weights. A fit that begins after epoch 0 (by `initial_epoch`, or because BackupAndRestore
    resumed it) first recalls the values of the epochs before, and then stops, and restores the best weights, exactly where one
    that was never interrupted would. Without a directory it begins anew, as Keras does.

    >>> import numpy as np, tempfile
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> stopping = EarlyStopping("loss", patience=3, directory=tempfile.mkdtemp())
    >>> history = model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, callbacks=[stopping], verbose=0)
    """

    restore_best_weights: bool
    stopped_epoch: int
    best_epoch: int

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0,
        patience: int = 0,
        verbose: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
        *,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(monitor, min_delta, patience, verbose, mode, baseline, restore_best_weights, start_from_epoch)
        self.directory = None if directory is None else Path(directory)
        self._history: History | None = None
        self._recalling = False
        self._kept: list[int] = []  # epochs whose weights are on disk
        self._over = False  # whether an earlier fit stopped

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._recalling = self.directory is not None
        self._over = False

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._recalling and self.directory is not None:
            self._recalling = False
            self.directory.mkdir(parents=True, exist_ok=True)
            self._history = History(self.directory)
            told = self._history.read()
            self._recall([record for record in told.records if record.sequence <= epoch])
            self._history.begin(told.run or secrets.token_hex(8))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._over:
            return
        super().on_epoch_end(epoch, logs)
        value = (logs or {}).get(self.monitor)
        if self._history is None or value is None:
            return
        if self.best_weights is not None and self.best_epoch not in self._kept:
            self._keep_best()
        metrics = {self.monitor: float(value)}
        self._history.add(Record(sequence=epoch + 1, time=int(time.time()), epoch=epoch + 1, metrics=metrics))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_end(logs)
        if self._over:
            train_again(self.model)
        if self._history is not None:
            self._history.close()
            self._history = None

    def _is_improvement(self, monitor_value: Any, reference_value: Any) -> Any:
        return math.isfinite(float(monitor_value)) and super()._is_improvement(monitor_value, reference_value)

    def _keep_best(self) -> None:
        assert self.directory is not None
        weights = {str(number): array for number, array in enumerate(self.best_weights)}
        polyckpt.save(self._weights_path(self.best_epoch), weights, epoch=self.best_epoch + 1, overwrite=True)
        # The best before stays too: a fit may be resumed from the epoch before this one.
        *outdated, before = self._kept or [self.best_epoch]
        for epoch in outdated:
            shutil.rmtree(self._weights_path(epoch), ignore_errors=True)
        self._kept = [*dict.fromkeys([before, self.best_epoch])]

    def _weights_path(self, epoch: int) -> Path:
        assert self.directory is not None
        return self.directory / _BEST_WEIGHTS.format(epoch + 1)

    def _recall(self, records: list[Record]) -> None:
        """Live through earlier epochs again: the same decisions, of which the last counts."""
        restores, self.restore_best_weights = self.restore_best_weights, False
        for record in records:
            super().on_epoch_end(record.sequence - 1, dict(record.metrics))
        self.restore_best_weights = restores
        if records and restores and self.best is not None:
            model, path = self.model, self._weights_path(self.best_epoch)
            template = {str(number): array for number, array in enumerate(model.get_weights())}
            restored = polyckpt.load(path, template)
            self.best_weights = [restored.model[str(number)] for number in range(len(template))]
            self._kept = [self.best_epoch]
        if records and self.stopped_epoch == records[-1].sequence - 1 > 0:
            self._over = True
            stop_before_training(self.model)
        elif records:
            self.model.stop_training = False
            self.stopped_epoch = 0
