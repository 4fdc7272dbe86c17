"""What a loss of power may leave of a save: ``python -m tests.faults.reordered DIRECTORY [--samples N] [--every N]``.

The calls of saves are recorded once; after each of them the states that a disk may be left in are made and opened. Writes
JSON: what was counted. Fails where a checkpoint is lost, or something is there that is none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polyckpt
from tests.crash.savers import temporaries
from tests.faults import recorded
from tests.faults.disk import Disk, Operation, State
from tests.faults.recorded import record
from tests.faults.single import NEW, NEXT, OLD, arrays, manager, slots, tell
from tests.interrupted import found
from tests.sealing import save_small

MISSING = "NotACheckpointError"
Judge = Callable[[Path, list[Any], bool], None]
GOES_ON = 0.2
"""The share of the states in which the next save is made as well."""


class Trial:
    """A sequence of operations, at each of which the power may be lost."""

    def __init__(self, directory: Path, rng: random.Random, samples: int) -> None:
        self.place, self.rng, self.samples = directory / "state", rng, samples
        self.counts: Counter[str] = Counter()
        self.seen: set[Any] = set()

    def run(self, name: str, before: Sequence[Operation], operations: Sequence[Operation], judge: Judge) -> None:
        """before: operations that are long over. judge: fails for a directory that must not be found after these marks."""
        disk, marks = Disk(), []
        for operation in before:
            disk.apply(operation)
        disk.sync_all()
        for number, operation in enumerate([("mark", "begin"), *operations]):
            disk.apply(operation)
            marks += [operation[1]] if operation[0] == "mark" else []
            self.counts["moments"] += 1
            for state in disk.states(self.rng, self.samples):
                self._judge(state, judge, marks, f"{name}: after {number}, {operation[:2]}")

    def _judge(self, state: State, judge: Judge, marks: list[Any], what: str) -> None:
        self.counts["states"] += 1
        key = hash((judge, state.contents(), str(marks)))
        if key in self.seen:
            return
        self.seen.add(key)
        self.counts["different states"] += 1
        shutil.rmtree(self.place, ignore_errors=True)
        state.build(self.place)
        try:
            judge(self.place, marks, self.rng.random() < GOES_ON)
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}, {traceback.format_exc()}; the state is left in {self.place}") from error


def judge_new(place: Path, marks: list[Any], go_on: bool) -> None:
    """A checkpoint beside others is whole or absent, and present once its save has returned."""
    assert found(place / "earlier") == OLD and found(place / "target") == OLD
    there = found(place / "new")
    assert there == NEW or (there == MISSING and NEW not in marks), there
    if go_on:
        save_small(place / "new", NEXT, overwrite=True)
        assert found(place / "new") == NEXT
        assert sorted(os.listdir(place)) == ["earlier", "new", "target"]


def judge_replaced(place: Path, marks: list[Any], go_on: bool) -> None:
    """A checkpoint that is replaced is the old one or the new one, and the new one once its save has returned."""
    assert found(place / "earlier") == OLD
    there = found(place / "target")
    order = [OLD, NEW, NEXT]
    returned = [mark for mark in marks if mark in order]
    assert there in order and order.index(there) >= max(map(order.index, returned), default=0), (there, marks)
    if go_on:
        save_small(place / "target", 9.0, overwrite=True)
        assert found(place / "target") == 9.0
        assert sorted(os.listdir(place)) == ["earlier", "target"]


def judge_run(place: Path, marks: list[Any], go_on: bool) -> None:
    """A manager goes on from the newest checkpoint whose save has returned, or a newer one.

    The second step is the best and never deleted. Damaged is at most what was being deleted, and that is reported.
    """
    saved = max((mark for mark in marks if isinstance(mark, int)), default=0)
    run = place / "run"
    with warnings.catch_warnings(record=True) as caught, manager(run) as ckpts:
        warnings.simplefilter("always")
        start = ckpts.restore(arrays(0), slots(0))
        assert saved <= start.step <= saved + 1, f"{start.step} was restored, {saved} was saved"
        if start.step:
            assert {float(value) for array in start.model.values() for value in array.flat} == {float(start.step)}
        doomed = set(range(1, start.step - 1)) - {2}
        for record in ckpts.checkpoints:
            value = found(run / str(record.name))
            assert value == record.step or (value == "CorruptError" and record.step in doomed), (record.step, value)
        assert (ckpts.best and ckpts.best.step) == min(range(1, start.step + 1), key=lambda step: abs(step - 2), default=None)
        if go_on:
            tell(ckpts, start.step + 1)
            assert ckpts.checkpoints[-1].step == start.step + 1
    warned = [str(warning.message) for warning in caught]
    damaged = {int(step) for text in warned for step in re.findall(r"corrupt-step-0*([0-9]+):", text)}
    assert damaged <= doomed, warned
    assert not temporaries(run)


def survey(directory: Path, samples: int, every: int, seed: int) -> dict[str, int]:
    """Every trial; returns what was counted."""
    rng = random.Random(seed)
    trial = Trial(directory, rng, samples)

    def recorded_in(name: str, *works: Any, **options: Any) -> tuple[Path, list[Operation]]:
        place = directory / name
        place.mkdir(exist_ok=True)
        return place, record(place, *works, **options)

    warm(directory / "warm")
    for plain in (False, True):
        suffix = " without exchange" if plain else ""
        _, before = recorded_in(f"old{suffix}", recorded.prepare_target)
        for name, work, judge in (("new", recorded.save, judge_new), ("replaced", recorded.replace, judge_replaced)):
            _, whole = recorded_in(f"{name}{suffix}", recorded.prepare_target, work, plain=plain)
            trial.run(f"{name}{suffix}", before, whole[len(before) :], judge)
        steps = sum(operation[0] != "mark" for operation in whole[len(before) :]) + 1
        for kill in range(1, steps, every):
            # Killed, and the power is lost while the next process saves: it must not have relied on what it found.
            place, first = recorded_in(
                f"killed {kill}{suffix}", recorded.prepare_target, recorded.replace, kill=kill, plain=plain
            )
            then = record(place, recorded.replace_again, plain=plain)
            trial.run(f"killed at {kill}{suffix}", before, [*first[len(before) :], *then], judge_replaced)
            shutil.rmtree(place)
    _, before = recorded_in("run before", recorded.prepare_run)
    _, whole = recorded_in("run", recorded.prepare_run, recorded.train)
    trial.run("run", before, whole[len(before) :], judge_run)
    return trial.counts


def warm(directory: Path) -> None:
    """Import what a save needs, so that only its own calls are recorded."""
    with manager(directory) as ckpts:
        tell(ckpts, 1)
    polyckpt.inspect(directory / "last").verify()
    shutil.rmtree(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults.reordered", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--samples", type=int, default=20, help="random states at each moment, besides the extreme ones")
    parser.add_argument("--every", type=int, default=1, help="at each how many-th call a process is killed before")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    json.dump(survey(given.directory, given.samples, given.every, given.seed), sys.stdout)
