"""The policies of one run together, and what they make of its records. Pure: no files, no clock."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from polyckpt.errors import PolicyError
from polyckpt.policy import (
    AnyOf,
    BestBy,
    EarlyStopping,
    Keep,
    KeepLast,
    OnImprovement,
    Patience,
    Record,
    When,
    retained,
)


@dataclass(frozen=True, slots=True)
class State:
    """What follows from the records so far. when: the state of the save policy; best: the best record, saved or not."""

    when: Any
    patience: Patience
    best: Record | None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """best_by: what is best. keep: what is kept, None for all. every: what is saved, None for all. stopping: when to stop."""

    best_by: BestBy | None
    keep: tuple[Keep, ...] | None
    every: When | None
    stopping: EarlyStopping | None

    @classmethod
    def of(
        cls,
        *,
        monitor: str | None,
        mode: str,
        keep_best: int | None,
        keep_last: int | None,
        keep: Iterable[Keep] | Keep,
        every: When | None,
        patience: int | None,
        min_delta: float,
        early_stopping: EarlyStopping | None,
    ) -> Self:
        """The rules that the arguments of CheckpointManager stand for. Raises PolicyError."""
        if monitor is None and (keep_best is not None or mode != "auto"):
            raise PolicyError("keep_best= and mode= need monitor=: the metric by which a checkpoint is best")
        further = tuple(keep) if isinstance(keep, Iterable) else (keep,)
        given = [*(("keep", each, Keep) for each in further), ("every", every, When)]
        for name, each, kind in (*given, ("early_stopping", early_stopping, EarlyStopping)):
            if each is not None and (isinstance(each, type) or not isinstance(each, kind)):
                raise PolicyError(f"{name}={each!r} is no policy of that sort")
        best = BestBy(monitor, mode, 1 if keep_best is None else keep_best) if monitor is not None else None
        kept = (*further, *([] if best is None else [best]), *([] if keep_last is None else [KeepLast(keep_last)]))
        best = best or next((each for each in further if isinstance(each, BestBy)), None)
        if patience is not None and early_stopping is not None:
            raise PolicyError("patience= is short for early_stopping=: give one of them")
        if patience is None and min_delta:
            raise PolicyError("min_delta= goes with patience=; OnImprovement and EarlyStopping have one of their own")
        stopping = early_stopping if patience is None else EarlyStopping(patience, min_delta)
        if best is not None:
            stopping = stopping and stopping.monitoring(best.metric, best.mode)
            every = every and every.monitoring(best.metric, best.mode)
        rules = cls(best_by=best, keep=None if keep_last is None else kept, every=every, stopping=stopping)
        if "" in rules.metrics:
            raise PolicyError("OnImprovement and EarlyStopping need a metric: pass monitor= here or metric= there")
        return rules

    @functools.cached_property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that something is decided by, "" for one that is not named."""
        found = [each.metric for each in (self.best_by, *(self.keep or ())) if isinstance(each, BestBy)]
        parts = self.every.parts if isinstance(self.every, AnyOf) else (self.every,)
        found += [each.metric or "" for each in (self.stopping, *parts) if isinstance(each, EarlyStopping | OnImprovement)]
        return tuple(dict.fromkeys(found))

    def start(self, time: int) -> State:
        """The state of a run that begins at `time`."""
        return State(self.every and self.every.start(time), Patience(), None)

    def update(self, state: State, record: Record) -> State:
        """The state after `record`."""
        best = record if self.best_by and self.best_by.improves(record, state.best) else state.best
        return State(
            when=self.every and self.every.update(state.when, record),
            patience=self.stopping.update(state.patience, record) if self.stopping else state.patience,
            best=best,
        )

    def fold(self, records: Iterable[Record], time: int) -> State:
        """The state after all `records` of a run that began at `time`."""
        state = self.start(time)
        for record in records:
            state = self.update(state, record)
        return state

    def due(self, state: State, record: Record) -> bool:
        """Whether `record` is to be saved."""
        return self.every is None or self.every.due(state.when, record)

    def retained(self, checkpoints: Sequence[Record]) -> set[int]:
        """The sequence numbers of the checkpoints to keep."""
        if self.keep is None:
            return {record.sequence for record in checkpoints}
        return retained(self.keep, checkpoints)

    def ranked(self, checkpoints: Iterable[Record]) -> list[Record]:
        """The checkpoints that can be best, the best first."""
        return self.best_by.ranked(checkpoints) if self.best_by else []

    def missing(self, metrics: Mapping[str, float]) -> str | None:
        """What is wrong with metrics that lack one to decide by; None where they lack none."""
        absent = [name for name in self.metrics if name not in metrics]
        if not absent:
            return None
        near = [f" (did you mean {close[0]!r}?)" if (close := difflib.get_close_matches(n, metrics, 1)) else "" for n in absent]
        wanted = ", ".join(repr(name) + hint for name, hint in zip(absent, near, strict=True))
        return f"metrics lack {wanted}; there are: {', '.join(metrics) or 'none'}"
