"""Policies are pure: the same records always give the same decision. Their rules are checked against plain restatements."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyckpt.errors import PolicyError
from polyckpt.policy import (
    BestBy,
    EarlyStopping,
    Every,
    Keep,
    KeepEvery,
    KeepLast,
    OnImprovement,
    Patience,
    Record,
    improves,
    infer_mode,
    resolve_mode,
    retained,
)
from polyckpt.rules import Rules

values = st.one_of(st.floats(allow_nan=True, allow_infinity=True, width=16), st.sampled_from([0.0, 0.5, 1.0, -1.0]))
modes = st.sampled_from(["min", "max"])


def made(losses: list[float | None]) -> list[Record]:
    return [
        Record(sequence=i, time=60 * i, epoch=i, step=10 * i, metrics={} if loss is None else {"loss": loss}, name=f"c{i}")
        for i, loss in enumerate(losses, 1)
    ]


histories = st.lists(st.one_of(st.none(), values), max_size=20).map(made)
keepers: st.SearchStrategy[Keep] = st.one_of(
    st.builds(KeepLast, st.integers(1, 4)),
    st.builds(BestBy, st.just("loss"), modes, st.integers(0, 4)),
    st.builds(lambda n: KeepEvery(epochs=n), st.integers(1, 6)),
    st.builds(lambda n: KeepEvery(steps=n), st.integers(1, 60)),
    st.builds(lambda n: KeepEvery(hours=n / 60), st.integers(1, 6)),
)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("loss", "min"),
        ("val_loss", "min"),
        ("valLoss", "min"),
        ("train/loss_epoch", "min"),
        ("val_mean_squared_error", "min"),
        ("rmse", "min"),
        ("eval_perplexity", "min"),
        ("test.WER", "min"),
        ("dice_loss", "min"),
        ("accuracy_error", "min"),
        ("sparse_categorical_crossentropy", "min"),
        ("kullback_leibler_divergence", "min"),
        ("FID", "min"),
        ("acc", "max"),
        ("val_acc", "max"),
        ("sparse_categorical_accuracy", "max"),
        ("top_5_accuracy", "max"),
        ("AUC", "max"),
        ("val_AUROC", "max"),
        ("f1", "max"),
        ("f1_macro", "max"),
        ("val_F1Score", "max"),
        ("mean_io_u", "max"),
        ("one_hot_mean_io_u", "max"),
        ("mIoU", "max"),
        ("bbox/mAP_50", "max"),
        ("BLEU-4", "max"),
        ("episode_reward", "max"),
        ("r2", "max"),
        ("cosine_similarity", "max"),
    ],
)
def test_the_name_says_which_way_is_better(metric: str, mode: str) -> None:
    assert infer_mode(metric) == resolve_mode(metric, "auto") == BestBy(metric).mode == mode


@pytest.mark.parametrize(
    "metric",
    ["", "val_los", "x", "metric", "lossless", "neg_mean_squared_error", "negative_log_likelihood", "loss_score", "lr"],
)
def test_a_name_that_does_not_say_asks(metric: str) -> None:
    with pytest.raises(PolicyError, match=r"mode='min' or 'max'"):
        infer_mode(metric)
    assert resolve_mode(metric, "max") == "max"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(PolicyError, match="mode='maximum': 'min', 'max' or 'auto'"):
        BestBy("loss", "maximum")


@given(values, st.one_of(st.none(), values), modes, st.floats(0, 2))
def test_what_is_not_finite_never_improves(value: float, best: float | None, mode: Any, delta: float) -> None:
    result = improves(value, best, mode, delta)
    if not math.isfinite(value):
        assert not result
    elif best is None or math.isnan(best):
        assert result
    elif mode == "min":
        assert result == (value + delta < best)
    else:
        assert result == (value - delta > best)
    assert not (result and best is not None and math.isfinite(best) and improves(best, value, mode, delta))


@given(histories, modes, st.integers(0, 5))
def test_the_best_are_the_first_of_the_sorted(records: list[Record], mode: Any, keep: int) -> None:
    finite = [r for r in records if math.isfinite(r.metrics.get("loss", math.nan))]
    ordered = sorted(finite, key=lambda r: (r.metrics["loss"] if mode == "min" else -r.metrics["loss"], r.sequence))
    policy = BestBy("loss", mode, keep)
    assert policy.ranked(records) == ordered
    assert policy.kept(records) == {r.sequence for r in ordered[:keep]}
    best = None
    for record in records:
        best = record if policy.improves(record, best) else best
    assert best == (ordered[0] if ordered else None)


@given(histories, st.integers(1, 30))
def test_the_last_are_kept(records: list[Record], n: int) -> None:
    assert KeepLast(n).kept(records) == {r.sequence for r in records[-n:]}


@given(histories, st.lists(keepers, max_size=4))
def test_deleting_what_is_not_kept_one_by_one_is_deleting_it_at_once(records: list[Record], policies: list[Keep]) -> None:
    """Retention after each save over what it left gives what any later look at it gives: nothing depends on the deleted."""
    there: list[Record] = []
    for number, record in enumerate(records, 1):
        there.append(record)
        kept = retained(policies, there)
        assert record.sequence in kept, "the newest is always kept"
        there = [each for each in there if each.sequence in kept]
        assert retained(policies, there) == kept, "a second look deletes nothing more"
        assert kept == retained(policies, records[:number]), "nor does it matter that others were deleted before"


@given(histories, st.lists(keepers, max_size=3), st.data())
def test_what_stayed_for_another_reason_changes_nothing(records: list[Record], policies: list[Keep], data: Any) -> None:
    kept = retained(policies, records)
    also = data.draw(st.sets(st.sampled_from([r.sequence for r in records]))) if records else set()
    there = [r for r in records if r.sequence in kept | also]
    assert retained(policies, there) == kept


def test_every_so_many_keeps_the_first_at_or_after_each_multiple() -> None:
    steps = [Record(sequence=i, time=0, step=s) for i, s in enumerate([1, 937, 1874, 2811, 3000, 3748, 7000], 1)]
    assert KeepEvery(steps=1000).kept(steps) == {3, 4, 5, 7}
    assert KeepEvery(epochs=1).kept(steps) == set(), "without epochs nothing is kept by them"
    hours = [Record(sequence=i, time=t) for i, t in enumerate([10, 3599, 3600, 7100, 7199, 7201, 3], 1)]
    assert KeepEvery(hours=1).kept(hours) == {1, 3, 6}


def fed(policy: Any, records: list[Record]) -> list[bool]:
    """Whether each record was due, where those that were are saved."""
    state, due = policy.start(0), []
    for record in records:
        due.append(policy.due(state, record))
        named = Record(
            sequence=record.sequence,
            time=record.time,
            epoch=record.epoch,
            step=record.step,
            metrics=record.metrics,
            name="c" if due[-1] else None,
        )
        state = policy.update(state, named)
    return due


def test_intervals_are_those_since_the_last_save() -> None:
    records = [Record(sequence=i, time=30 * i, epoch=i // 4, step=i) for i in range(1, 13)]
    assert [r.step for r, due in zip(records, fed(Every(epochs=1), records), strict=True) if due] == [4, 8, 12]
    assert [r.step for r, due in zip(records, fed(Every(epochs=2), records), strict=True) if due] == [8]
    assert [r.step for r, due in zip(records, fed(Every(steps=5), records), strict=True) if due] == [5, 10]
    assert [r.step for r, due in zip(records, fed(Every(minutes=2), records), strict=True) if due] == [4, 8, 12]
    assert [r.step for r, due in zip(records, fed(Every(steps=5, minutes=2), records), strict=True) if due] == [4, 5, 9, 10]
    uneven = [Record(sequence=i, time=0, step=7 * i) for i in range(1, 8)]
    assert [r.step for r, due in zip(uneven, fed(Every(steps=10), uneven), strict=True) if due] == [14, 21, 35, 42]


def test_a_clock_that_goes_back_makes_a_save_due() -> None:
    every, state = Every(minutes=10), Every(minutes=10).start(1000)
    assert [every.due(state, Record(sequence=1, time=t, step=1)) for t in (1000, 1599, 1600, 999)] == [False, False, True, True]


def test_every_needs_what_it_counts() -> None:
    with pytest.raises(PolicyError, match="epoch=None, step=3"):
        Every(epochs=1).due(Every(epochs=1).start(0), Record(sequence=1, time=0, step=3))
    assert not Every(epochs=1, minutes=1).due(Every(epochs=1).start(0), Record(sequence=1, time=0, step=3))


@given(histories, modes, st.sampled_from([0.0, 0.25, 1.0]))
def test_on_improvement_saves_each_new_best(records: list[Record], mode: Any, delta: float) -> None:
    expected, best = [], None
    for record in records:
        expected.append(improves(record.metrics.get("loss"), best, mode, delta))
        best = record.metrics["loss"] if expected[-1] else best
    assert fed(OnImprovement(delta, "loss", mode), records) == expected


@given(histories, modes)
def test_either_of_two_is_enough(records: list[Record], mode: Any) -> None:
    one, two = Every(steps=20), OnImprovement(metric="loss", mode=mode)
    # An improvement is one whether or not it was saved, but a save restarts the interval.
    both = fed(one | two, records)
    assert all(each or not improved for each, improved in zip(both, fed(two, records), strict=True))
    assert all(both[i] for i, record in enumerate(records) if record.step % 20 == 0)


@given(
    st.lists(st.one_of(st.none(), values), max_size=15),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 3),
    st.sampled_from([None, 0.25]),
    modes,
)
def test_early_stopping_is_that_of_keras(
    losses: list[float | None], patience: int, delta: float, start: int, baseline: float | None, mode: Any
) -> None:
    policy, state = EarlyStopping(patience, delta, start, baseline, "loss", mode), Patience()
    stopped_at = None
    for record in made(losses):
        state = policy.update(state, record)
        if state.stopped:
            stopped_at = record.epoch
            break
    assert stopped_at == keras_stops_at(losses, patience, delta, start, baseline, mode)


def keras_stops_at(losses: Any, patience: int, delta: float, start: int, baseline: float | None, mode: str) -> int | None:
    """The documented rules of keras.callbacks.EarlyStopping, but that NaN and infinity are never better."""

    def better(value: float, reference: float | None) -> bool:
        if not math.isfinite(value):
            return False
        return reference is None or (value + delta < reference if mode == "min" else value - delta > reference)

    best, wait = None, 0
    for epoch, value in enumerate(losses):
        if value is None or epoch < start:
            continue
        wait += 1
        if better(value, best):
            best = value
            if baseline is None or better(value, baseline):
                wait = 0
        elif wait >= patience and epoch > 0:
            return epoch + 1
    return None


def test_once_stopped_a_run_stays_so() -> None:
    policy, state = EarlyStopping(1, metric="loss"), Patience()
    for record in made([1.0, 2.0, 0.0]):
        state = policy.update(state, record)
    assert state == Patience(best=0.0, wait=0, stopped=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeepLast(0), "newest is always kept"),
        (lambda: KeepLast(1.5), "whole number"),
        (lambda: KeepLast(True), "whole number"),
        (lambda: BestBy("loss", keep=-1), "whole number, 0 or more"),
        (lambda: BestBy("", "min"), "name of a metric"),
        (lambda: BestBy(3, "min"), "name of a metric"),
        (lambda: KeepEvery(), "one of epochs, steps, hours is needed"),
        (lambda: KeepEvery(hours=0), "a number above 0"),
        (lambda: Every(), "one of epochs, steps, minutes is needed"),
        (lambda: Every(epochs=0), "a whole number above 0"),
        (lambda: Every(steps=2.5), "a whole number above 0"),
        (lambda: Every(minutes=math.inf), "a number above 0"),
        (lambda: EarlyStopping(-1), "patience=-1"),
        (lambda: EarlyStopping(1, min_delta=-1), "min_delta=-1"),
        (lambda: EarlyStopping(1, min_delta=math.nan), "min_delta=nan"),
        (lambda: EarlyStopping(1, baseline=math.nan), "baseline=nan"),
        (lambda: EarlyStopping(1, start_from_epoch=-1), "start_from_epoch=-1"),
        (lambda: OnImprovement("0.1"), "min_delta='0.1'"),
        (lambda: OnImprovement().due(None, Record(sequence=1, time=0)), "has no metric"),
    ],
)
def test_bad_policies_are_refused(make: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make()
    with pytest.raises(ValueError, match=message):
        make()


def test_policies_and_records_are_frozen_values() -> None:
    assert Every(epochs=1) == Every(epochs=1) and BestBy("loss") == BestBy("loss", "min", 1)
    assert len({KeepLast(1), KeepLast(1), KeepLast(2)}) == 2
    with pytest.raises(FrozenInstanceError):
        KeepLast(1).n = 2  # type: ignore[misc]


ARGUMENTS: dict[str, Any] = {
    "monitor": None,
    "mode": "auto",
    "keep_best": None,
    "keep_last": 3,
    "keep": (),
    "every": None,
    "patience": None,
    "min_delta": 0.0,
    "early_stopping": None,
}


def rules(**changes: Any) -> Rules:
    return Rules.of(**{**ARGUMENTS, **changes})


def test_short_arguments_stand_for_policies() -> None:
    short = rules(monitor="loss", keep_best=2, keep_last=1, patience=3, min_delta=0.1, every=OnImprovement())
    assert short.best_by == BestBy("loss", "min", 2)
    assert set(short.keep or ()) == {BestBy("loss", "min", 2), KeepLast(1)}
    assert short.stopping == EarlyStopping(3, 0.1, metric="loss", mode="min")
    assert short.every == OnImprovement(metric="loss", mode="min")
    assert rules(monitor="acc").best_by == BestBy("acc", "max", 1)
    assert rules(keep_last=None).retained(made([1.0] * 9)) == set(range(1, 10))
    assert rules(keep=BestBy("acc", keep=2)).best_by == BestBy("acc", "max", 2)
    assert rules(monitor="loss", keep=BestBy("acc"), early_stopping=EarlyStopping(1, metric="bleu")).metrics == (
        "loss",
        "acc",
        "bleu",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"monitor": "loss", "patience": 1, "early_stopping": EarlyStopping(1)}, "give one of them"),
        ({"monitor": "loss", "min_delta": 0.1}, "min_delta= goes with patience="),
        ({"patience": 1}, "need a metric"),
        ({"every": Every(epochs=1) | OnImprovement()}, "need a metric"),
        ({"monitor": "quality"}, "mode='min' or 'max'"),
        ({"keep_best": 2}, "need monitor="),
        ({"mode": "min"}, "need monitor="),
        ({"monitor": "loss", "keep_best": -1}, "whole number, 0 or more"),
        ({"keep_last": 0}, "newest is always kept"),
    ],
)
def test_contradicting_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        rules(**changes)


def test_missing_metrics_are_named_with_those_there_are() -> None:
    assert rules(monitor="val_loss").missing({"val_loss": 1.0}) is None
    said = rules(monitor="val_loss", keep=BestBy("acc")).missing({"val_los": 1.0, "lr": 1.0})
    assert said == "metrics lack 'val_loss' (did you mean 'val_los'?), 'acc'; there are: val_los, lr"
    assert rules(monitor="val_loss").missing({}) == "metrics lack 'val_loss'; there are: none"
