"""BackupAndRestore: an interrupted fit goes on at the very batch."""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

import polyckpt
from polyckpt.adapters.keras.skipping import skip_batches, skipping, train_again

_writers: weakref.WeakValueDictionary[str, polyckpt.CheckpointManager] = weakref.WeakValueDictionary()
"""Who writes to a directory in this process."""

_PLAIN = (bool, int, float, str, type(None), np.ndarray, np.generic)


class BackupAndRestore(keras.callbacks.Callback):  # type: ignore[misc]  # Keras ships no types
    """keras.callbacks.BackupAndRestore that goes on exactly where `fit` was interrupted, within an epoch too.

    The first four arguments are those of Keras. With an integer `save_freq` a resumed fit reads the batches of the epoch that
    were trained on already, without training on them again, and goes on with the next: weights, optimizer, random states and
    the running metrics are those of an uninterrupted run, and so are the logs of the epoch. The order of `fit(shuffle=True)`
    is drawn again as it was, but on TensorFlow, whose data pipeline keeps it to itself: shuffle there by yourself, with a
    seed. A backup appears whole or not at all and is verified when it is read; with double_checkpoint a damaged one gives way
    to the one before. delete_checkpoint removes what this callback wrote, and nothing else.

    callbacks: others whose state is to be resumed too, for example keras.callbacks.ReduceLROnPlateau: what changes of their
    attributes that are numbers, strings, arrays, or lists and dicts of those. async_save: write in the background. This
    callback stands last in the list for `fit`, so that the others have seen an epoch before it is backed up.

    Raises ValueError for an empty directory, another `save_freq`, and, as fit begins, for a model that is not built.

    >>> import numpy as np, tempfile
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> backup = BackupAndRestore(tempfile.mkdtemp(), save_freq=10)
    >>> history = model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, callbacks=[backup], verbose=0)
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        async_save: bool = False,
    ) -> None:
        super().__init__()
        if not backup_dir:
            raise ValueError("Empty `backup_dir` argument passed")
        if save_freq != "epoch" and (not isinstance(save_freq, int) or isinstance(save_freq, bool) or save_freq < 1):
            raise ValueError(
                f"Invalid value for argument `save_freq`. Received: save_freq={save_freq}. "
                "Expected either 'epoch' or a positive integer value."
            )
        self.backup_dir = backup_dir
        self.save_freq = save_freq
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint
        self._others = tuple(callbacks)
        self._async_save = async_save
        self._manager: polyckpt.CheckpointManager | None = None
        self._epoch = 0
        self._batch = 0  # consumed of this epoch
        self._unsaved = 0  # batches since the last backup
        self._epoch_random: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self._at_begin: list[dict[str, Any]] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not self.model.built:
            raise ValueError(
                "To use the BackupAndRestore callback, your model must be built before you call `fit()`. "
                f"Model {self.model} is unbuilt. You can build it beforehand by calling it on a batch of data."
            )
        train_again(self.model)
        keep_last = 2 if self.double_checkpoint else 1
        # A fit that failed, in a notebook say, never came to its end.
        if earlier := _writers.pop(os.path.abspath(self.backup_dir), None):
            earlier.close()
        self._manager = polyckpt.CheckpointManager(self.backup_dir, keep_last=keep_last, async_save=self._async_save)
        _writers[os.path.abspath(self.backup_dir)] = self._manager
        self._epoch = self._batch = self._unsaved = 0
        self._at_begin, self._resumed = [], None
        restored = self._manager.restore(self.model)
        if restored.checkpoint is None:
            return
        self.model._initial_epoch = self._epoch = restored.epoch
        self._unsaved = restored.extra["unsaved"]
        self._resumed = {**restored.extra, "batch": restored.batch or 0}

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch, self._batch = epoch, 0
        if not self._at_begin:
            self._at_begin = [_plain_state(callback) for callback in self._others]
        resumed, self._resumed = self._resumed, None
        for callback, state in zip(self._others, resumed["callbacks"] if resumed else (), strict=False):
            vars(callback).update(state)
        if resumed is None or not resumed["batch"]:
            self._epoch_random = _random_states()
            return
        now, model = _random_states(), self.model
        self._epoch_random = resumed["epoch_random"]
        # On JAX what is trained is taken from the variables before the first batch, so they must be right by then.
        built = _set_metrics(model, resumed["metrics"])

        def go_on(batch: Any) -> None:
            if not built:
                model._symbolic_build(data_batch=batch)
                _set_metrics(model, resumed["metrics"])
            _set_random_states(now)

        skip_batches(model, resumed["batch"], resumed["logs"], then=go_on)
        _set_random_states(self._epoch_random)  # last, so that the data come as they came

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        consumed, self._batch = batch + 1 - self._batch, batch + 1
        if skipping(self._model):
            return
        self._unsaved += consumed
        if isinstance(self.save_freq, int) and self._unsaved >= self.save_freq:
            self._unsaved = 0
            self._save(self._epoch, self._batch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch, self._batch = epoch + 1, 0
        if self.save_freq == "epoch":
            self._save(epoch + 1, None, logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        assert self._manager is not None
        if self.delete_checkpoint:
            self._manager.delete()
        self._manager.close()
        self.model._initial_epoch = None  # the next fit begins where it is told to

    def _save(self, epoch: int, batch: int | None, logs: Mapping[str, Any] | None) -> None:
        assert self._manager is not None
        model = self.model  # on JAX, asking for it brings the state of training into the variables
        extra = {
            "unsaved": self._unsaved,
            "epoch_random": self._epoch_random if batch else {},
            "metrics": [keras.ops.convert_to_numpy(variable) for variable in model.metrics_variables] if batch else [],
            "logs": {name: float(value) for name, value in (logs or {}).items() if np.ndim(value) == 0},
            "callbacks": [
                {name: value for name, value in _plain_state(callback).items() if not _same(value, before.get(name))}
                for callback, before in zip(self._others, self._at_begin, strict=True)
            ],
        }
        self._manager.save(model, epoch=epoch, step=int(model.optimizer.iterations), batch=batch, extra=extra)


def _set_metrics(model: Any, values: Sequence[np.ndarray]) -> bool:
    """Set the running metrics; False where there are none yet, as on TensorFlow before the first batch."""
    variables = model.metrics_variables
    if len(variables) != len(values):
        return False
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return True


def _plain_state(callback: keras.callbacks.Callback) -> dict[str, Any]:
    # `params` belongs to the fit, and Keras turns the sign of min_delta as it sets monitor_op, which is not restored.
    return {name: value for name, value in vars(callback).items() if _is_plain(value) and name not in ("params", "min_delta")}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    return isinstance(value, _PLAIN)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _random_states() -> dict[str, Any]:
    """What the order of data may be drawn from."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}
    if keras.backend.backend() == "torch":
        import torch

        states["torch"] = torch.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "torch" in states:
        import torch

        torch.set_rng_state(states["torch"])
