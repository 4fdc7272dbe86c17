"""Learning rate schedulers of torch: the rates they will give, without touching them, and how to bring one to a place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


class Scheduler:
    """polyckpt.adapter.Schedule of a scheduler of torch."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self._scheduler = scheduler
        self.calls = int(getattr(scheduler, "last_epoch", 0))

    def rates(self) -> Iterator[tuple[float, ...]]:
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self._optimizer.param_groups]
        beside = _beside(self._scheduler, SimpleNamespace(param_groups=groups, step=lambda: None))
        while True:
            yield tuple(float(group["lr"]) for group in groups)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    beside.step()
                except ValueError:  # a one-cycle policy ends after its steps
                    return

    def advance(self, calls: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of calls before the first update
            for _ in range(calls):
                self._scheduler.step()

    @property
    def _optimizer(self) -> Any:
        return self._scheduler.optimizer


def _beside(scheduler: Any, optimizer: Any) -> Any:
    """A scheduler that is as far as `scheduler`, over another optimizer."""
    found = copy.copy(scheduler)
    found.optimizer = optimizer
    if hasattr(found, "_schedulers"):
        found._schedulers = [_beside(each, optimizer) for each in found._schedulers]
    return found


def schedule(value: Any) -> Scheduler | None:
    """The schedule of a scheduler whose rates follow from its calls alone."""
    known = isinstance(value, LRScheduler) and not isinstance(value, ReduceLROnPlateau)
    return Scheduler(value) if known else None
