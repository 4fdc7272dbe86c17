"""When to save, what is best, what to keep, when to stop: pure decisions over the records of a run.

A `Record` is one call of `CheckpointManager.save`. Decisions that need the past are folds: `start` gives a state, `update`
the state after one more record. The same fold over the same records always decides alike, so a resumed run, which folds
over what lies on disk, decides as one that never stopped.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast, runtime_checkable

from polyckpt.errors import PolicyError

Mode = Literal["min", "max"]

_LOWER_WORDS = """
    loss losses logloss error errors err mse mae rmse msle rmsle mape smape medae nll perplexity ppl bpb bpc bpd wer cer mer
    fid kid kl divergence kldivergence distance crossentropy entropy hinge eer fpr fnr regret cost penalty deviance
    misclassification brier ece
"""
_HIGHER_WORDS = """
    acc accuracy auc auroc auprc roc ap map map50 map75 f1 f2 fbeta f1score precision recall sensitivity specificity iou miou
    jaccard dice bleu sacrebleu rouge rouge1 rouge2 rougel meteor chrf cider psnr ssim r2 r2score score reward rewards return
    kappa mcc matthews correlation corr pearson spearman pearsonr spearmanr ndcg mrr hits top1 top5 likelihood elbo similarity
    tpr tnr winrate em
"""
_LOWER, _HIGHER = frozenset(_LOWER_WORDS.split()), frozenset(_HIGHER_WORDS.split())
_TURNED = frozenset({"neg", "negative", "negated", "minus", "inverse", "inverted"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One call of `save`: where training was, what was measured, and the checkpoint that was made of it.

    sequence: its place in the run, from 1. epoch, step: completed so far; batch: batches consumed of the epoch under way.
    time: seconds since 1970, UTC. metrics: name -> number. name: the checkpoint's directory within the run's, None where
    none was made.
    """

    sequence: int
    time: int
    epoch: int | None = None
    step: int | None = None
    batch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    name: str | None = None


def infer_mode(metric: str) -> Mode:
    """Whether less or more of `metric` is better, by the words of its name.

    Raises PolicyError where they do not say, or say both; a loss or an error *of* something is one all the same.

    >>> infer_mode("val_loss"), infer_mode("valTop5Accuracy"), infer_mode("dice_loss"), infer_mode("mean_io_u")
    ('min', 'max', 'min', 'max')
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", metric)
    words = re.findall(r"[a-z0-9]+", spaced.lower())
    candidates = [*words, *(first + second for first, second in itertools.pairwise(words))]
    lower, higher = _LOWER.intersection(candidates), _HIGHER.intersection(candidates)
    if not _TURNED.intersection(words):
        if lower and (not higher or words[-1] in {"loss", "error", "err"}):
            return "min"
        if higher and not lower:
            return "max"
    raise PolicyError(f"whether less or more of {metric!r} is better cannot be told from the name: pass mode='min' or 'max'")


def resolve_mode(metric: str, mode: str) -> Mode:
    """`mode` itself, or for "auto" what the name of the metric says. Raises PolicyError for another word."""
    if mode == "auto":
        return infer_mode(metric)
    if mode not in ("min", "max"):
        raise PolicyError(f"mode={mode!r}: 'min', 'max' or 'auto'")
    return cast(Mode, mode)


def value_of(record: Record | None, metric: str) -> float | None:
    """The finite value of `metric`; None where it is missing, NaN or infinite, none of which is ever best."""
    value = None if record is None else record.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def improves(value: float | None, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Whether `value` is better than `best` by more than `min_delta`. Nothing that is not finite is; any number beats None.

    >>> improves(0.5, 0.6, "min"), improves(0.5, 0.6, "min", 0.2), improves(float("nan"), None, "min")
    (True, False, False)
    """
    if value is None or not math.isfinite(value):
        return False
    if best is None or math.isnan(best):
        return True
    return value + min_delta < best if mode == "min" else value - min_delta > best


@runtime_checkable
class Keep(Protocol):
    """What to keep."""

    def kept(self, checkpoints: Sequence[Record]) -> set[int]:
        """The sequence numbers, of the checkpoints that there are in their order, to keep for this reason."""
        ...


@dataclass(frozen=True)
class KeepLast:
    """Keep the `n` newest, at least 1.

    >>> sorted(KeepLast(2).kept([Record(sequence=i, time=0, name=f"step-{i}") for i in (1, 2, 3)]))
    [2, 3]
    """

    n: int

    def __post_init__(self) -> None:
        _positive(self.n, "KeepLast", "n: the newest is always kept, since the run resumes from it")

    def kept(self, checkpoints: Sequence[Record]) -> set[int]:
        return {record.sequence for record in checkpoints[-self.n :]}


@dataclass(frozen=True, kw_only=True)
class KeepEvery:
    """Keep for ever the first checkpoint at or after each multiple of `epochs` or `steps`, and in each slot of `hours` (UTC).

    >>> made = [Record(sequence=i, time=0, epoch=i, name=f"epoch-{i}") for i in range(1, 12)]
    >>> sorted(KeepEvery(epochs=5).kept(made))
    [5, 10]
    """

    epochs: int | None = None
    steps: int | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        _intervals(self, epochs=self.epochs, steps=self.steps, hours=self.hours)

    def kept(self, checkpoints: Sequence[Record]) -> set[int]:
        first: dict[tuple[str, int], int] = {}
        seconds = None if self.hours is None else self.hours * 3600
        for attribute, interval in (("epoch", self.epochs), ("step", self.steps), ("time", seconds)):
            for record in checkpoints if interval is not None else ():
                count = getattr(record, attribute)
                if count is not None:
                    first.setdefault((attribute, int(count // interval)), record.sequence)
        # Before the first multiple there is nothing to keep; a slot of time is one from its beginning.
        return {sequence for (attribute, slot), sequence in first.items() if slot or attribute == "time"}


@dataclass(frozen=True)
class BestBy:
    """Keep the `keep` best by one metric; of equals the earlier. mode: "min", "max", or "auto" for what the name says.

    Never the one whose metric is missing, NaN or infinite. keep=0 keeps none, and the best is known all the same.

    >>> made = [Record(sequence=i, time=0, metrics={"val_loss": v}, name=str(i)) for i, v in enumerate([3, float("nan"), 1, 2])]
    >>> sorted(BestBy("val_loss", keep=2).kept(made))
    [2, 3]
    """

    metric: str
    mode: str = "auto"
    keep: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise PolicyError(f"BestBy({self.metric!r}): the name of a metric")
        if not _is_count(self.keep):
            raise PolicyError(f"BestBy({self.metric!r}, keep={self.keep!r}): a whole number, 0 or more")
        object.__setattr__(self, "mode", resolve_mode(self.metric, self.mode))

    def improves(self, record: Record, best: Record | None) -> bool:
        """Whether `record` is better than the `best` so far."""
        return improves(value_of(record, self.metric), value_of(best, self.metric), cast(Mode, self.mode))

    def ranked(self, checkpoints: Iterable[Record]) -> list[Record]:
        """Those that have a finite value, the best first."""
        sign = 1 if self.mode == "min" else -1
        valued = [(value, record) for record in checkpoints if (value := value_of(record, self.metric)) is not None]
        return [record for _, record in sorted(valued, key=lambda pair: (sign * pair[0], pair[1].sequence))]

    def kept(self, checkpoints: Sequence[Record]) -> set[int]:
        return {record.sequence for record in self.ranked(checkpoints)[: self.keep]}


def retained(policies: Iterable[Keep], checkpoints: Sequence[Record]) -> set[int]:
    """The sequence numbers that at least one policy keeps, and always that of the newest."""
    kept = {record.sequence for record in checkpoints[-1:]}
    return kept.union(*(policy.kept(checkpoints) for policy in policies))


class When:
    """When to save. Two are joined by `|`: either is enough."""

    def start(self, time: int) -> Any:
        """The state of a run that begins at `time`."""
        raise NotImplementedError

    def due(self, state: Any, record: Record) -> bool:
        """Whether `record` is to be saved."""
        raise NotImplementedError

    def update(self, state: Any, record: Record) -> Any:
        """The state after `record`; its `name` says whether it was saved."""
        raise NotImplementedError

    def monitoring(self, metric: str | None, mode: str) -> When:
        """The same, with `metric` where it names none."""
        return self

    def __or__(self, other: When) -> When:
        return AnyOf((self, other))


@dataclass(frozen=True, kw_only=True)
class Every(When):
    """Save when a multiple of `epochs` or `steps` was reached, or `minutes` have passed, since the last save.

    >>> every = Every(epochs=5, minutes=10)
    >>> state = every.start(time=0)
    >>> every.due(state, Record(sequence=1, time=60, epoch=4)), every.due(state, Record(sequence=2, time=60, epoch=5))
    (False, True)
    >>> every.due(state, Record(sequence=3, time=601, epoch=4))
    True
    """

    epochs: int | None = None
    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        _intervals(self, epochs=self.epochs, steps=self.steps, minutes=self.minutes)

    def start(self, time: int) -> Record:
        return Record(sequence=0, time=time, epoch=0, step=0)

    def due(self, state: Record, record: Record) -> bool:
        if (self.epochs is None or record.epoch is None) and (self.steps is None or record.step is None) and not self.minutes:
            raise PolicyError(f"{self} cannot decide: the call gave epoch={record.epoch}, step={record.step}")
        for interval, now, last in ((self.epochs, record.epoch, state.epoch), (self.steps, record.step, state.step)):
            if interval is not None and now is not None and now // interval > (last or 0) // interval:
                return True
        # A clock that went back says nothing about how long it has been: save rather than wait for it to catch up.
        return self.minutes is not None and not 0 <= record.time - state.time < self.minutes * 60

    def update(self, state: Record, record: Record) -> Record:
        if record.name is None:
            return state
        # A save that did not say its epoch or step leaves the last that did.
        epoch = state.epoch if record.epoch is None else record.epoch
        step = state.step if record.step is None else record.step
        return replace(record, epoch=epoch, step=step, metrics={})


@dataclass(frozen=True)
class OnImprovement(When):
    """Save when a metric improved by more than `min_delta` on the best before; by default that which the manager monitors.

    >>> when = OnImprovement(metric="val_acc")
    >>> state = when.update(when.start(0), Record(sequence=1, time=0, metrics={"val_acc": 0.5}))
    >>> when.due(state, Record(sequence=2, time=0, metrics={"val_acc": 0.5}))
    False
    """

    min_delta: float = 0.0
    metric: str | None = None
    mode: str = "auto"

    def __post_init__(self) -> None:
        _check_delta(self, self.min_delta)
        if self.metric is not None:
            object.__setattr__(self, "mode", resolve_mode(self.metric, self.mode))

    def start(self, time: int) -> float | None:
        return None

    def due(self, state: float | None, record: Record) -> bool:
        metric, mode = _settled(self)
        return improves(value_of(record, metric), state, mode, self.min_delta)

    def update(self, state: float | None, record: Record) -> float | None:
        return value_of(record, _settled(self)[0]) if self.due(state, record) else state

    def monitoring(self, metric: str | None, mode: str) -> OnImprovement:
        return replace(self, metric=metric, mode=mode) if self.metric is None else self


@dataclass(frozen=True)
class AnyOf(When):
    """Save when any of `parts` says so."""

    parts: tuple[When, ...]

    def start(self, time: int) -> tuple[Any, ...]:
        return tuple(part.start(time) for part in self.parts)

    def due(self, state: tuple[Any, ...], record: Record) -> bool:
        return any(part.due(each, record) for part, each in zip(self.parts, state, strict=True))

    def update(self, state: tuple[Any, ...], record: Record) -> tuple[Any, ...]:
        return tuple(part.update(each, record) for part, each in zip(self.parts, state, strict=True))

    def monitoring(self, metric: str | None, mode: str) -> AnyOf:
        return AnyOf(tuple(part.monitoring(metric, mode) for part in self.parts))


@dataclass(frozen=True, slots=True)
class Patience:
    """The state of early stopping. best: the value to beat; wait: evaluations since; stopped: whether patience ran out."""

    best: float | None = None
    wait: int = 0
    stopped: bool = False


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` evaluations in a row without an improvement of more than `min_delta`.

    The rules are those of keras.callbacks.EarlyStopping: the first `start_from_epoch` epochs do not count, and with a
    `baseline` an improvement restarts the wait only where it beats that too. A record without the metric is no evaluation; a
    NaN is one without improvement. Once stopped, a run stays so. metric: by default that which the manager monitors.

    >>> stopping, state = EarlyStopping(patience=2, metric="loss"), Patience()
    >>> for epoch, loss in enumerate([1.0, 2.0, 3.0], 1):
    ...     state = stopping.update(state, Record(sequence=epoch, time=0, epoch=epoch, metrics={"loss": loss}))
    >>> state
    Patience(best=1.0, wait=2, stopped=True)
    """

    patience: int
    min_delta: float = 0.0
    start_from_epoch: int = 0
    baseline: float | None = None
    metric: str | None = None
    mode: str = "auto"

    def __post_init__(self) -> None:
        for name, count in (("patience", self.patience), ("start_from_epoch", self.start_from_epoch)):
            if not _is_count(count):
                raise PolicyError(f"EarlyStopping: {name}={count!r}: a whole number, 0 or more")
        _check_delta(self, self.min_delta)
        if self.baseline is not None and not math.isfinite(self.baseline):
            raise PolicyError(f"EarlyStopping: baseline={self.baseline!r}: a finite number or None")
        if self.metric is not None:
            object.__setattr__(self, "mode", resolve_mode(self.metric, self.mode))

    def update(self, state: Patience, record: Record) -> Patience:
        """The state after `record`."""
        metric, mode = _settled(self)
        if metric not in record.metrics or (record.epoch is not None and record.epoch <= self.start_from_epoch):
            return state
        value, wait = value_of(record, metric), state.wait + 1
        if improves(value, state.best, mode, self.min_delta):
            beaten = self.baseline is None or improves(value, self.baseline, mode, self.min_delta)
            return replace(state, best=value, wait=0 if beaten else wait)
        # As in Keras, the first epoch never ends a run, not even with patience=0.
        first = state == Patience() if record.epoch is None else record.epoch <= 1
        return replace(state, wait=wait, stopped=state.stopped or (wait >= self.patience and not first))

    def monitoring(self, metric: str | None, mode: str) -> EarlyStopping:
        """The same, with `metric` where it names none."""
        return replace(self, metric=metric, mode=mode) if self.metric is None else self


def _settled(policy: OnImprovement | EarlyStopping) -> tuple[str, Mode]:
    if policy.metric is None:
        raise PolicyError(f"{type(policy).__name__} has no metric: give the manager a monitor, or pass metric= here")
    return policy.metric, cast(Mode, policy.mode)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(value: Any, owner: str, what: str) -> None:
    if not _is_count(value) or value == 0:
        raise PolicyError(f"{owner}({value!r}): {what}. A whole number, 1 or more")


def _check_delta(owner: Any, min_delta: Any) -> None:
    if isinstance(min_delta, bool) or not isinstance(min_delta, int | float) or not 0 <= min_delta < math.inf:
        raise PolicyError(f"{type(owner).__name__}: min_delta={min_delta!r}: a number, 0 or more")


def _intervals(owner: Any, **intervals: Any) -> None:
    name = type(owner).__name__
    if all(value is None for value in intervals.values()):
        raise PolicyError(f"{name}(): one of {', '.join(intervals)} is needed")
    for unit, value in intervals.items():
        whole = unit in ("epochs", "steps")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < math.inf:
            raise PolicyError(f"{name}({unit}={value!r}): {'a whole number' if whole else 'a number'} above 0")
