"""Batches of an epoch that are read but not trained on: `fit` has no other way to begin within an epoch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import keras

_train_functions: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""What trains the models that are skipping batches now."""


def skipping(model: Any) -> bool:
    """Whether the batch that just ended was skipped."""
    return model in _train_functions


def skip_batches(model: Any, batches: float, logs: Mapping[str, Any], then: Callable[[Any], None] = lambda _: None) -> None:
    """Let the next `batches` of a fit be read only; their logs are `logs`. `then` is called with the data of the last of them.

    To be called in on_epoch_begin. All three trainers look `model.train_function` up anew for every batch.
    """
    left = batches

    def skip(*arguments: Any) -> Any:
        nonlocal left
        left -= model.steps_per_execution
        *state, data = arguments
        if keras.backend.backend() == "torch":  # the batches themselves are handed over, elsewhere an iterator of them
            batch = data[-1]
        else:
            for _ in range(model.steps_per_execution):
                batch = next(data)
        if left <= 0:
            model.train_function = finish
            then(batch)
        return (dict(logs), *state) if state else dict(logs)  # on JAX what is trained is handed on

    def finish(*arguments: Any) -> Any:
        train_again(model)
        return model.train_function(*arguments)

    if batches > 0:
        _train_functions[model] = model.train_function
        model.train_function = skip


def stop_before_training(model: Any) -> None:
    """Let the fit that has begun end without another step."""
    skip_batches(model, math.inf, {})
    model.stop_training = True


def train_again(model: Any) -> None:
    """Skip no more; also what a fit that failed while it skipped has left."""
    if model in _train_functions:
        model.train_function = _train_functions.pop(model)
