"""CheckpointManager over whole runs: what is saved, kept, linked and restored, in one process and from one to the next."""

from __future__ import annotations

import fractions
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt import BestBy, CheckpointManager, Every, KeepEvery, OnImprovement, manager
from polyckpt.errors import PolicyError, RunError
from polyckpt.storage.run_directory import Found, RunDirectory
from tests.managed import epochs, params, tell, value
from tests.sealing import run_python


def on_disk(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.is_symlink())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time, in minutes."""
    now = [1_000_000.0]
    monkeypatch.setattr(manager.time, "time", lambda: 60 * now[0])
    return lambda minutes: now.__setitem__(0, minutes)


# The loop, as it is documented.


def train(directory: Path, losses: Sequence[float], crash_after: int | None = None) -> list[int]:
    """The epochs that one process trained."""
    model, trained = params(), []
    with CheckpointManager(directory, monitor="val_loss", keep_best=2, keep_last=1, patience=3, min_delta=0.05) as ckpts:
        start = ckpts.restore(model)
        model = start.model
        assert (start.checkpoint is None) == (start.epoch == 0)
        for epoch in range(start.epoch or 0, len(losses)):
            if ckpts.should_stop:
                break
            model["w"] += epoch + 1
            trained.append(epoch + 1)
            ckpts.save(model, epoch=epoch + 1, metrics={"val_loss": losses[epoch], "val_acc": np.float32(0.5)})
            if len(trained) == crash_after:
                raise ZeroDivisionError
            if ckpts.should_stop:
                break
    return trained


LOSSES = [0.9, 0.8, 0.5, 0.49, 0.48, 0.47, 0.46, 0.1]


def test_a_loop_that_crashed_goes_on_where_it_was_and_stops_where_it_would_have(tmp_path: Path) -> None:
    assert train(tmp_path / "straight", LOSSES) == [1, 2, 3, 4, 5, 6]
    for crash_after in (2, 3):
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "crashed", LOSSES, crash_after)
    assert train(tmp_path / "crashed", LOSSES) == [6]
    assert train(tmp_path / "crashed", LOSSES) == [], "a run that had stopped trains no further epoch"
    for directory in (tmp_path / "straight", tmp_path / "crashed"):
        reader = CheckpointManager(directory, monitor="val_loss", patience=3, min_delta=0.05)
        assert reader.should_stop and [record.metrics["val_loss"] for record in reader.records] == LOSSES[:6]
        assert set(epochs(reader)) >= {5, 6}
        assert reader.best and (reader.best.epoch, reader.best.name) == (6, "epoch-00000006")
        assert value(polyckpt.load(directory / "best", params())) == 21


def test_all_that_save_takes_comes_back(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpts:
        ckpts.save(params(1), params(2), epoch=np.int64(3), step=np.int32(70), batch=4, lr=[0.1, 0.2], extra={"k": [1, "x"]})
    restored = CheckpointManager(tmp_path).restore(params(), params())
    assert (restored.epoch, restored.step, restored.batch, restored.lr) == (3, 70, 4, (0.1, 0.2))
    assert restored.extra == {"k": [1, "x"]} and (restored.optimizer["w"] == 2).all()


def test_the_order_of_a_run_is_not_that_of_its_names(tmp_path: Path) -> None:
    """Numbers of more than eight digits sort before shorter ones; what has a step and what has none have other names."""
    with CheckpointManager(tmp_path, keep_last=2) as ckpts:
        for number, step in enumerate((99_999_998, 99_999_999, 100_000_000), 1):
            ckpts.save(params(number), step=step)
        assert on_disk(tmp_path) == ["step-100000000", "step-99999999"]
        ckpts.save(params(4), epoch=1)
    again = CheckpointManager(tmp_path, keep_last=2)
    assert [record.name for record in again.checkpoints] == ["step-100000000", "epoch-00000001"]
    assert value(again.restore(params())) == 4
    assert value(again.restore(params(), step=100_000_000)) == 3
    assert value(again.restore(params(), step=1)) == 4


def test_a_directory_is_where_it_was_when_the_manager_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with CheckpointManager("runs/ä b/./c/") as ckpts:
        monkeypatch.chdir(tmp_path / "elsewhere")
        path = ckpts.save(params(1), epoch=1)
        assert path == tmp_path / "runs" / "ä b" / "c" / "epoch-00000001" == ckpts.directory / ckpts.checkpoints[0].name
    assert on_disk(tmp_path / "elsewhere") == []
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved" / "ä b")
    with CheckpointManager(tmp_path / "link" / "c") as ckpts:
        assert value(ckpts.restore(params())) == 1
        ckpts.save(params(2), epoch=2)
    assert value(polyckpt.load(tmp_path / "moved" / "ä b" / "c" / "last", params())) == 2


def test_a_closed_manager_can_go_on(tmp_path: Path) -> None:
    ckpts = CheckpointManager(tmp_path, monitor="loss")
    tell(ckpts, 3, 2)
    ckpts.close()
    ckpts.close()
    with CheckpointManager(tmp_path, monitor="loss") as other:
        tell(other, 1, first=3)
        assert epochs(ckpts) == epochs(other) == [1, 2, 3]
    tell(ckpts, 0.5, first=4)
    assert epochs(ckpts) == [2, 3, 4] and [record.sequence for record in ckpts.records] == [1, 2, 3, 4]
    ckpts.close()


# What is kept.


def test_each_of_several_policies_keeps_what_it_would_alone(tmp_path: Path) -> None:
    keep = [BestBy("acc"), BestBy("wer", keep=2), KeepEvery(steps=25), KeepEvery(epochs=6)]
    nan = float("nan")
    measured = [(5, nan, 9), (4, 7, nan), (3, 1, 3), (2, 7, 3), (8, 2, 4), (7, 0, 5), (9, 1, 6), (9, 1, 7)]
    with CheckpointManager(tmp_path, monitor="loss", keep_best=1, keep_last=1, keep=keep) as ckpts:
        for n, (loss, acc, wer) in enumerate(measured, 1):
            ckpts.save(params(n), epoch=n, step=10 * n, metrics={"loss": loss, "acc": acc, "wer": wer})
        # Steps: 30, 50, 80 are the first at or after 25, 50, 75. acc: 2, of equals the earlier. wer: 3 and 4. loss: 4. epoch 6.
        assert epochs(ckpts) == [2, 3, 4, 5, 6, 8]
    assert on_disk(tmp_path) == [f"step-000000{n}0" for n in (2, 3, 4, 5, 6, 8)]


def test_one_of_each_hour_is_kept(tmp_path: Path, clock: Callable[[float], None]) -> None:
    with CheckpointManager(tmp_path, keep_last=1, keep=KeepEvery(hours=2)) as ckpts:
        for epoch, minutes in enumerate((0, 50, 119, 120, 200, 239, 600, 601), 1):
            clock(120_000 + minutes)
            ckpts.save(params(epoch), epoch=epoch)
        assert epochs(ckpts) == [1, 4, 7, 8]


def test_all_are_kept_where_no_number_of_the_last_is_given(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep_best=1, keep_last=None) as ckpts:
        tell(ckpts, *range(12))
        assert epochs(ckpts) == list(range(1, 13))


def test_kept_checkpoints_of_an_earlier_process_go_when_better_ones_come(tmp_path: Path) -> None:
    options = {"monitor": "loss", "keep_best": 2, "keep_last": 1}
    with CheckpointManager(tmp_path, **options) as ckpts:
        tell(ckpts, 5, 4, 9)
        assert epochs(ckpts) == [1, 2, 3]
    with CheckpointManager(tmp_path, **options) as ckpts:
        tell(ckpts, 3, 2, first=4)
        assert epochs(ckpts) == [4, 5]


# Links.


def test_links_change_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks finds the one or the other, each of them whole."""
    seen = []
    replace, unlink = os.replace, os.unlink

    def replaced(source: Any, target: Any) -> None:
        looked = {link: os.path.lexists(tmp_path / link) for link in ("best", "last")}
        replace(source, target)
        seen.append((os.path.basename(target), looked))
        polyckpt.inspect(target).verify()

    def unlinked(path: Any, **options: Any) -> None:
        assert os.path.basename(path) not in ("best", "last")
        unlink(path, **options)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "unlink", unlinked)
    with CheckpointManager(tmp_path, monitor="loss", keep_last=1) as ckpts:
        tell(ckpts, 3, 4, 2)
    assert [link for link, _ in seen] == ["last", "best", "last", "last", "best"]
    assert all(looked == {"best": True, "last": True} for _, looked in seen[2:])


def test_a_best_that_is_no_longer_there_has_no_link(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep_best=0, keep_last=1) as ckpts:
        ckpts.save(params(1), epoch=1, metrics={"loss": 1})
        assert os.readlink(tmp_path / "best") == "epoch-00000001"
        ckpts.save(params(2), epoch=2, metrics={"loss": float("nan")})
        assert on_disk(tmp_path) == ["epoch-00000002"]
        tell(ckpts, 7, first=3)
        assert os.path.exists(tmp_path / "best")


@pytest.mark.parametrize("link", ["best", "last"])
def test_what_is_no_link_of_the_run_keeps_its_name(tmp_path: Path, link: str) -> None:
    (tmp_path / "a" / link).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / link).symlink_to(tmp_path / "a")
    for run in "ab":
        with CheckpointManager(tmp_path / run, monitor="loss") as ckpts:
            tell(ckpts, 2, 1)
            assert epochs(ckpts) == [1, 2]
    assert (tmp_path / "a" / link).is_dir() and not (tmp_path / "a" / link).is_symlink()
    assert os.readlink(tmp_path / "b" / link) == str(tmp_path / "a")


# When to save.


def test_minutes_count_from_the_last_save_whatever_the_clock_does(tmp_path: Path, clock: Callable[[float], None]) -> None:
    every = Every(minutes=10)
    times = [(1000, False), (1009, False), (1010, True), (1019, False), (1020, True), (500, True), (509, False), (511, True)]
    clock(1000)
    ckpts = CheckpointManager(tmp_path, every=every, keep_last=None)
    for step, (minutes, due) in enumerate(times, 1):
        clock(minutes)
        assert (ckpts.save(params(step), step=step) is not None) == due, (step, minutes)
        if step == 4:
            ckpts.close()
            ckpts = CheckpointManager(tmp_path, every=every, keep_last=None)
            assert ckpts.restore(params()).step == 3
    ckpts.close()


def test_one_of_several_reasons_is_enough(tmp_path: Path, clock: Callable[[float], None]) -> None:
    every = Every(epochs=4) | OnImprovement(min_delta=1.0) | Every(minutes=60)
    clock(0)
    told = [(0, 9), (0, 8.5), (0, 8), (0, 7), (0, 9), (61, 9), (62, 5), (62, 4), (62, 4.5)]
    wanted = [True, False, False, True, False, True, True, True, False]
    with CheckpointManager(tmp_path, monitor="loss", every=every, keep_last=None) as ckpts:
        saved = []
        for epoch, (minutes, loss) in enumerate(told, 1):
            clock(minutes)
            saved.append(ckpts.save(params(epoch), epoch=epoch, metrics={"loss": loss}) is not None)
    assert saved == wanted


def test_a_multiple_that_was_passed_is_enough(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, every=Every(steps=10, epochs=3), keep_last=None) as ckpts:
        told = [(1, 7), (1, 9), (1, 12), (2, 19), (2, 23), (3, 24), (4, 29), (6, 29)]
        saved = [ckpts.save(params(), epoch=epoch, step=step) is not None for epoch, step in told]
        assert saved == [False, False, True, False, True, True, False, True]
        assert ckpts.save(params(), epoch=6, step=29, force=True) == tmp_path / "step-00000029-2"
        with pytest.raises(PolicyError, match=r"cannot decide: the call gave epoch=None, step=30"):
            CheckpointManager(tmp_path / "b", every=Every(epochs=1)).save(params(), step=30)


def test_a_step_that_is_told_and_not_saved_costs_no_file(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, every=Every(steps=1000)) as ckpts:
        for step in range(1, 500):
            assert ckpts.save(params(), step=step) is None
        assert ckpts.records == () == ckpts.checkpoints
    assert on_disk(tmp_path) == [] and (tmp_path / "history.jsonl").read_bytes().count(b"\n") == 1


# Going back.


def names(directory: Path) -> set[str]:
    return {name.replace("step-000000", "") for name in on_disk(directory)}


def test_a_run_can_go_back_twice(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None) as ckpts:
        tell(ckpts, 9, 8, 7, 6)
        for loss in (5, 4):
            assert value(ckpts.restore(params(), step=20)) == 2
            tell(ckpts, loss, loss, first=3)
        assert epochs(ckpts) == [1, 2, 3, 4]
        assert names(tmp_path) == {"10", "20", "30", "40", *(f"abandoned-{n}" for n in ("30", "40", "30-2", "40-2"))}
    again = CheckpointManager(tmp_path, monitor="loss")
    assert [record.metrics["loss"] for record in again.records] == [9, 8, 4, 4]
    assert again.restore(params()).epoch == 4


def test_going_back_in_a_new_process_takes_the_new_branch_from_then_on(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None, patience=2) as ckpts:
        tell(ckpts, 1, 2, 3)
        assert ckpts.should_stop
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None, patience=2) as ckpts:
        ckpts.restore(params(), step=10)
        assert names(tmp_path) == {"10", "20", "30"}, "nothing moves before training goes on from there"
        tell(ckpts, 0.5, first=2)
        assert not ckpts.should_stop and names(tmp_path) == {"10", "20", "abandoned-20", "abandoned-30"}
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None, patience=2) as ckpts:
        start = ckpts.restore(params())
        assert (start.epoch, start.metrics) == (2, {"loss": 0.5}) and not ckpts.should_stop


def test_a_restore_that_is_only_looked_at_changes_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None) as ckpts:
        tell(ckpts, 3, 1, 2)
        for step in (10, "best", 20):
            ckpts.restore(params(), step=step)  # type: ignore[arg-type]
        tell(ckpts, 4, first=4)
        ckpts.restore(params(), step=10)
        ckpts.restore(params())
        tell(ckpts, 5, first=5)
        assert epochs(ckpts) == [1, 2, 3, 4, 5] and len(ckpts.records) == 5
    assert names(tmp_path) == {"10", "20", "30", "40", "50"}


def test_repeating_the_last_step_after_resuming_from_it_is_no_way_back(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None) as ckpts:
        tell(ckpts, 3, 2)
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None) as ckpts:
        ckpts.restore(params(), step="last")
        tell(ckpts, 1, first=2)
        assert names(tmp_path) == {"10", "20", "20-2"}
        with pytest.raises(RunError, match="epoch 1 step 10 cannot follow epoch 2 step 20"):
            tell(ckpts, 1, first=1)
        with pytest.raises(RunError, match="epoch 1 step 30 cannot follow"):
            ckpts.save(params(), epoch=1, step=30, metrics={"loss": 1})
        assert len(ckpts.records) == 3


# Metrics.


JAX_METRICS = """
import sys, jax, numpy as np, polyckpt
with polyckpt.CheckpointManager(sys.argv[1], monitor="loss") as ckpts:
    for epoch, loss in enumerate([jax.numpy.float32(0.5), jax.numpy.ones(()), jax.numpy.bfloat16(0.25)], 1):
        ckpts.save({"w": np.ones(3)}, epoch=epoch, metrics={"loss": loss})
"""


def test_numbers_of_other_libraries_are_metrics(tmp_path: Path) -> None:
    given = [np.bool_(True), np.array([0.25]), fractions.Fraction(1, 8), 10**300]
    with CheckpointManager(tmp_path / "a", monitor="loss", keep_last=None) as ckpts:
        for epoch, loss in enumerate(given, 1):
            ckpts.save(params(), epoch=epoch, metrics={"loss": loss})
        assert [record.metrics["loss"] for record in ckpts.records] == [1, 0.25, 0.125, 10**300]
        assert ckpts.best and ckpts.best.epoch == 3
    assert CheckpointManager(tmp_path / "a", monitor="loss").best == ckpts.best
    done = run_python(JAX_METRICS, tmp_path / "b")  # of its own: tests that fork are no place for the threads of JAX
    assert done.returncode == 0, done.stderr
    assert [record.metrics["loss"] for record in CheckpointManager(tmp_path / "b").records] == [0.5, 1, 0.25]


def test_neither_nan_nor_infinity_is_best_but_both_are_told(tmp_path: Path) -> None:
    told = [float("nan"), float("-inf"), 3.0, float("nan"), float("inf")]
    with CheckpointManager(tmp_path, monitor="loss", keep_last=1, patience=2) as ckpts:
        tell(ckpts, *told)
        assert epochs(ckpts) == [3, 5] and ckpts.best and ckpts.best.epoch == 3 and ckpts.should_stop
    again = CheckpointManager(tmp_path, monitor="loss", patience=2)
    assert repr([record.metrics["loss"] for record in again.records]) == repr(told) and again.should_stop


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"monitor": "loss", "keep_best": -1}, "keep=-1"),
    ({"monitor": "loss", "mode": "smaller"}, "'min', 'max' or 'auto'"),
    ({"monitor": "goodness"}, "pass mode="),
    ({"monitor": ""}, "the name of a metric"),
    ({"monitor": 5}, "the name of a metric"),
    ({"keep_last": 0}, "the newest is always kept"),
    ({"keep_last": -1}, "1 or more"),
    ({"keep_last": True}, "1 or more"),
    ({"monitor": "loss", "patience": 1.5}, "patience=1.5"),
    ({"monitor": "loss", "min_delta": 0.1}, "goes with patience="),
    ({"monitor": "loss", "patience": 2, "min_delta": -0.1}, "min_delta=-0.1"),
    ({"patience": 3}, "pass monitor="),
    ({"every": OnImprovement()}, "pass monitor="),
    ({"monitor": "loss", "patience": 3, "early_stopping": polyckpt.EarlyStopping(3)}, "give one of them"),
]


@pytest.mark.parametrize(("options", "told"), BAD_OPTIONS, ids=repr)
def test_options_that_decide_nothing_are_refused_at_once(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        CheckpointManager(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_metric_of_a_further_policy_must_be_there_too(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep=BestBy("val_acc")) as ckpts:
        with pytest.raises(PolicyError, match=r"metrics lack 'val_acc'; there are: loss"):
            tell(ckpts, 1)
        assert ckpts.checkpoints == () == ckpts.records


# Readers beside a writer.


def looks(directory: Path, stop: threading.Event) -> Iterator[CheckpointManager]:
    while not stop.is_set():
        yield CheckpointManager(directory, monitor="loss", patience=1000)


def test_what_is_saved_between_two_looks_of_a_reader_leaves_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan, later = RunDirectory.scan, [(2, 3)]

    def scanned(files: RunDirectory, known: Collection[str] | None) -> Found:
        if later:
            tell(ckpts, *(1 / epoch for epoch in later.pop()), first=2)
        return scan(files, known)

    with CheckpointManager(tmp_path, monitor="loss", every=Every(epochs=3)) as ckpts:
        tell(ckpts, 1)
        monkeypatch.setattr(RunDirectory, "scan", scanned)
        reader = CheckpointManager(tmp_path, monitor="loss")
        assert [record.epoch for record in reader.records] == [1, 2, 3]
        assert not later


def test_a_reader_sees_a_consistent_run_while_it_is_written(tmp_path: Path) -> None:
    stop, problems, looked = threading.Event(), [], []

    def read() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for reader in looks(tmp_path, stop):
                    records = reader.records
                    assert [record.sequence for record in records] == list(range(1, len(records) + 1))
                    assert not reader.should_stop
                    there = [record.sequence for record in reader.checkpoints]
                    assert there == sorted(set(there))
                    if len(records) > 2:  # the links follow the first checkpoint
                        best = reader.best
                        assert best and best.metrics["loss"] <= min(record.metrics["loss"] for record in records)
                        polyckpt.inspect(tmp_path / "last").verify()
                    looked.append(len(records))
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    with CheckpointManager(tmp_path, monitor="loss", keep_last=2, every=Every(epochs=2)) as ckpts:
        for epoch in range(1, 201):
            tell(ckpts, 1 / (epoch % 7 + 1), first=epoch)
    stop.set()
    thread.join()
    assert not problems, problems
    assert len(set(looked)) > 3
