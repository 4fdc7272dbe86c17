"""Random runs, killed anywhere and started again, decide, keep, delete and name the best as runs that were never killed."""

from __future__ import annotations

import builtins
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt import CheckpointManager, manager
from polyckpt.policy import BestBy, EarlyStopping, Every, KeepEvery, OnImprovement

HISTORIES = 500
CALLS = ("write", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir", "ftruncate", "truncate", "pwrite")


class Killed(BaseException):
    """No code runs after it: every further call on the file system raises it again."""


@dataclass
class Machine:
    """Counts calls that change the file system, and dies at one of them.

    descriptors: of temporary directories, whose locks a system gives up for the dead.
    """

    calls: int = 0
    dies_at: float = math.inf
    now: float = 0.0
    descriptors: set[int] = field(default_factory=set)

    def step(self) -> None:
        self.calls += 1
        if self.calls >= self.dies_at:
            raise Killed

    def bury(self) -> None:
        self.dies_at = math.inf
        for descriptor in list(self.descriptors):
            os.close(descriptor)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    def wrap(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            made.step()
            return function(*arguments, **keywords)

        return call

    real_open, real_close = os.open, os.close

    def opened(path: Any, *arguments: Any, **keywords: Any) -> int:
        made.step()
        descriptor = real_open(path, *arguments, **keywords)
        if os.path.basename(path).startswith(".polyckpt-tmp-"):
            made.descriptors.add(descriptor)
        return descriptor

    def closed(descriptor: int) -> None:
        made.descriptors.discard(descriptor)
        real_close(descriptor)

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "close", closed)
    monkeypatch.setattr(os, "fsync", wrap(lambda _: None))  # nothing here loses power
    monkeypatch.setattr(builtins, "open", wrap(builtins.open))
    monkeypatch.setattr(manager.time, "time", lambda: made.now)
    return made


@dataclass(frozen=True)
class Call:
    epoch: int
    batch: int | None
    time: float
    metrics: dict[str, float] | None


def random_calls(rng: random.Random) -> list[Call]:
    """What a training loop tells: epochs of some batches, metrics now and then, with values that repeat, NaN among them."""
    calls, time = [], 1_000_000.0
    per_epoch = rng.choice([1, 1, 2, 3])
    for number in range(rng.randint(3, 14)):
        time += rng.choice([1, 60, 900, 4000])
        epoch, batch = divmod(number + 1, per_epoch)
        metrics = {"loss": rng.choice([0.1, 0.2, 0.25, 0.3, 0.5, float("nan"), float("inf")]), "acc": rng.choice([0, 1, 2, 3])}
        calls.append(Call(epoch, batch or None, time, metrics if rng.random() < 0.8 else None))
    return calls


def random_rules(rng: random.Random) -> dict[str, Any]:
    stopping = EarlyStopping(rng.randint(1, 3), rng.choice([0, 0.05]), rng.randint(0, 2), rng.choice([None, 0.25]))
    return {
        "monitor": "loss",
        "keep_best": rng.randint(0, 3),
        "keep_last": rng.choice([1, 1, 2, 3, None]),
        "keep": rng.choice([(), (BestBy("acc", keep=2),), (KeepEvery(epochs=2), KeepEvery(hours=1)), (KeepEvery(steps=3),)]),
        "every": rng.choice(
            [None, Every(steps=2), Every(epochs=1, minutes=10), OnImprovement(), Every(steps=3) | OnImprovement()]
        ),
        **rng.choice([{}, {"patience": rng.randint(0, 3), "min_delta": 0.01}, {"early_stopping": stopping}]),
    }


@dataclass(frozen=True)
class Seen:
    """What a manager shows after one call."""

    saved: bool
    best: int | None
    stop: bool
    kept: frozenset[int]


class Process:
    """A training script: it restores, goes on from there, and stops where it is told to."""

    def __init__(self, directory: Path, rules: dict[str, Any], calls: list[Call], machine: Machine) -> None:
        self.directory, self.rules, self.calls, self.machine = directory, rules, calls, machine
        self.seen: dict[int, Seen] = {}
        self.resumed_from: int | None = None

    def run(self) -> CheckpointManager:
        self.saved = False
        self.machine.now = 999_999.0  # only a run without any checkpoint goes by when it began
        self.ckpts = CheckpointManager(self.directory, **self.rules)
        start = self.ckpts.restore({"w": np.zeros(1)})
        assert (start.model["w"] == start.step).all()
        self.resumed_from = start.step or None
        for number, call in enumerate(self.calls[start.step :], start.step + 1):
            if self.ckpts.should_stop:
                break
            self.machine.now = call.time
            model = {"w": np.full(1, float(number))}
            path = self.ckpts.save(model, step=number, epoch=call.epoch, batch=call.batch, metrics=call.metrics)
            self.seen[number] = self.look(path)
        return self.ckpts

    def look(self, path: Path | None) -> Seen:
        best = self.ckpts.best
        kept = frozenset(record.step for record in self.ckpts.checkpoints)
        return Seen(path is not None, best and best.step, self.ckpts.should_stop, kept)


def on_disk(directory: Path) -> Iterator[int]:
    for path in directory.glob("step-*"):
        yield polyckpt.inspect(path).manifest.progress.step


def metrics_of(ckpts: CheckpointManager) -> list[str]:
    return [repr((record.step, record.metrics, record.name)) for record in ckpts.records]


@pytest.mark.filterwarnings("ignore:epoch:UserWarning")
@pytest.mark.parametrize("seed", range(4))
def test_killed_runs_decide_as_uninterrupted_ones(machine: Machine, seed: int) -> None:
    rng = random.Random(seed)
    kills = resumes = stops = 0
    for _ in range(HISTORIES):
        root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        calls, rules = random_calls(rng), random_rules(rng)
        machine.calls, machine.dies_at = 0, math.inf
        straight = Process(root / "straight", rules, calls, machine)
        expected = straight.run()
        total = machine.calls
        check_best(straight)

        killed = Process(root / "killed", rules, calls, machine)
        for _ in range(rng.randint(1, 4)):
            machine.calls, machine.dies_at = 0, rng.randint(1, total)
            try:
                killed.run()
            except Killed:
                kills += 1
            machine.bury()
            manager._let_go(killed.ckpts._files, killed.ckpts._history)  # a dead process holds no lock
            compare(killed, straight)
        machine.calls = 0
        ckpts = killed.run()
        compare(killed, straight)
        resumes += killed.resumed_from is not None
        stops += expected.should_stop

        what = f"{rules}, {calls}"
        own = frozenset({killed.resumed_from}) - {None}
        kept = {record.step for record in expected.checkpoints}
        # What a killed process had yet to delete is deleted by the next save, if there is one.
        there = {record.step for record in ckpts.checkpoints}
        assert there - own == kept - own if killed.saved else there >= kept, what
        assert set(on_disk(root / "killed")) == {record.step for record in ckpts.checkpoints}, what
        assert set(on_disk(root / "straight")) == kept, what
        assert metrics_of(ckpts) == metrics_of(expected), what
        assert (ckpts.best and ckpts.best.step) == (expected.best and expected.best.step), what
        assert ckpts.should_stop == expected.should_stop, what
        for link in ("best", "last") if rules["keep_best"] else ("last",):
            links = [os.path.realpath(root / name / link) for name in ("killed", "straight")]
            assert os.path.basename(links[0]) == os.path.basename(links[1]), what
        assert not list((root / "killed").glob(".polyckpt-tmp-*")), what
        manager._let_go(ckpts._files, ckpts._history)
        manager._let_go(expected._files, expected._history)
        shutil.rmtree(root)
    assert kills > HISTORIES and resumes > HISTORIES / 3 and stops > HISTORIES / 20, (kills, resumes, stops)


def check_best(straight: Process) -> None:
    losses = {number: (call.metrics or {}).get("loss", math.nan) for number, call in enumerate(straight.calls, 1)}
    for number, seen in straight.seen.items():
        finite = [(losses[each], each) for each in range(1, number + 1) if math.isfinite(losses[each])]
        assert seen.best == (min(finite)[1] if finite else None), (number, losses)


def compare(killed: Process, straight: Process) -> None:
    for number, seen in killed.seen.items():
        wanted = straight.seen[number]
        own = frozenset({killed.resumed_from}) - {None}
        assert own <= seen.kept, "what was resumed from was deleted"
        what = f"call {number}: {seen}, not {wanted}; resumed from {killed.resumed_from}; {killed.rules}"
        assert (seen.saved, seen.best, seen.stop) == (wanted.saved, wanted.best, wanted.stop), what
        killed.saved |= seen.saved
        assert seen.kept - own == wanted.kept - own if killed.saved else seen.kept >= wanted.kept - own, what
    killed.seen.clear()
