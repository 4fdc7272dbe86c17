"""The parent: it kills savers at random instants and compares what is left with what they told."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polyckpt
from polyckpt.errors import PolyckptError
from tests.crash.savers import KEEP_BEST, KEEP_LAST, MODES, Mode, contents, loss, number_in, saver, slots, temporaries


class Life:
    """What one saver told before it was killed."""

    def __init__(self, told: bytes) -> None:
        *lines, _ = told.split(b"\n")
        self.lines: list[list[Any]] = [json.loads(line) for line in lines]
        failures = [line for line in self.lines if line[0] == "failed"]
        assert not failures, failures

    def last(self, what: str) -> Any:
        return next((line[1] for line in reversed(self.lines) if line[0] == what), None)

    def all(self, what: str) -> list[list[Any]]:
        return [line[1:] for line in self.lines if line[0] == what]


def live_and_die(directory: Path, mode: Mode, seconds: float) -> Life:
    """A saver that is killed after a while."""
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        saver(directory, mode, tells)
    os.close(tells)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(told, "rb") as file:
        return Life(file.read())


class Watch:
    """What is known of one directory from kill to kill; `check` fails where anything else is found."""

    def __init__(self, directory: Path, mode: Mode) -> None:
        self.directory, self.mode = directory, mode
        self.committed = self.newest = 0
        self.counts: Counter[str] = Counter()

    def check(self, life: Life) -> None:
        self.counts["kills"] += 1
        resumed = life.last("resumed")
        if resumed is None:
            self.counts["before the restore was over"] += 1
        else:
            assert resumed >= self.committed, f"resumed from {resumed}, but {self.committed} was committed"
            assert life.all("resumed")[0][1] == 0, "leftovers of the killed"
        self.committed = max(self.committed, life.last("done") or 0, resumed or 0)
        begun = life.last("begin") or 0
        left = temporaries(self._place())
        assert left <= 1 + (self.mode.save.__name__ == "manage") * 2, left
        self.counts["with a leftover directory"] += bool(left)
        newest = self.look(life)
        assert newest >= self.committed, f"{newest} is the newest, but {self.committed} was committed"
        assert newest <= max(begun, self.committed), (newest, begun)
        if begun > (life.last("done") or 0):
            self.counts["during a save"] += 1
            self.counts["during a save, after its commit"] += newest == begun
        self.counts["saves that were committed"] += newest - self.newest
        self.newest = self.committed = newest

    def look(self, life: Life) -> int:
        """The number of the newest checkpoint; every one there is has been verified."""
        raise NotImplementedError

    def _place(self) -> Path:
        return self.directory

    def verified(self, path: Path) -> int:
        checkpoint = polyckpt.inspect(path)
        checkpoint.verify()
        start = polyckpt.load(path, contents(1), slots(1))
        number = number_in(start.model, start.optimizer)
        assert checkpoint.manifest.progress.step == number
        self.counts["checkpoints verified"] += 1
        return number


class OverwriteWatch(Watch):
    def look(self, life: Life) -> int:
        try:
            return self.verified(self.directory / "checkpoint")
        except polyckpt.NotACheckpointError:
            assert self.committed == 0
            return 0


class CollectWatch(Watch):
    def __init__(self, directory: Path, mode: Mode) -> None:
        super().__init__(directory, mode)
        self.seen = 0

    def look(self, life: Life) -> int:
        numbers = sorted(int(path.name) for path in self.directory.glob("[0-9]*"))
        assert numbers == list(range(1, len(numbers) + 1)), "one that was committed is gone"
        # The new ones, and ten of the others in turn.
        for number in {*numbers[self.seen :], *numbers[self.counts["kills"] % 20 :: 20][:10]}:
            assert self.verified(self.directory / str(number)) == number
        self.seen = len(numbers)
        return self.seen


class ManagerWatch(Watch):
    """Compares a manager's decisions with those that follow from what was told, computed here from the rules in words."""

    def __init__(self, directory: Path, mode: Mode) -> None:
        super().__init__(directory, mode)
        self.there: set[int] = set()
        self.every = "every" in mode.options

    def _place(self) -> Path:
        return self.directory / "run"

    def look(self, life: Life) -> int:
        run = self._place()
        there = {int(path.name.removeprefix("step-")) for path in run.glob("step-*")}
        for number in there:
            assert self.verified(run / f"step-{number:08d}") == number
        assert not list(run.glob("corrupt-*")) + list(run.glob("abandoned-*"))
        newest = max(there, default=0)
        self._compare_kept(life, there, newest)
        self._compare_decided(life)
        self._compare_reader(there, newest)
        for link in ("best", "last"):
            assert (run / link).exists() or not (run / link).is_symlink(), f"{link} points to what is not there"
        self.there = there
        return newest

    def due(self, number: int, last: int) -> bool:
        """Whether the n-th call saves, where the `last` one that did is this: at multiples of three, and at each new best."""
        best_before = min((loss(each) for each in range(1, number)), default=float("inf"))
        return not self.every or number // 3 > last // 3 or loss(number) < best_before

    def _compare_kept(self, life: Life, there: set[int], newest: int) -> None:
        """On disk is what is kept after the newest save, and at most what was to be deleted then."""
        resumed, begun = life.last("resumed"), life.last("begin") or 0
        kept = before = set(self.there)
        own = {resumed} if resumed else set()
        saved = max(kept, default=0)
        for number in range((resumed or saved) + 1, begun + 1):
            if not self.due(number, saved):
                continue
            saved = number
            if number > newest:
                break
            before, kept = kept | {number}, retained(kept | {number}, own)
        assert kept <= there <= before | kept, (kept, there, before)

    def _compare_decided(self, life: Life) -> None:
        """What the manager itself said after each call."""
        for number, best, kept in life.all("decided"):
            assert best == best_of(number), (number, best)
            assert set(kept) >= set(sorted(kept)[-KEEP_LAST:])
            self.counts["decisions compared"] += 1

    def _compare_reader(self, there: set[int], newest: int) -> None:
        """What another process sees, which writes nothing."""
        ckpts = polyckpt.CheckpointManager(self._place(), monitor="loss", keep_last=KEEP_LAST, keep_best=KEEP_BEST)
        assert [record.step for record in ckpts.checkpoints] == sorted(there)
        assert [record.step for record in ckpts.records] == list(range(1, newest + 1)), "a measurement is lost"
        assert all(record.metrics["loss"] == loss(record.step or 0) for record in ckpts.records)
        assert (ckpts.best and ckpts.best.step) == best_of(newest)
        self.counts["decisions compared"] += 1


def best_of(newest: int) -> int | None:
    """The first of the least that was measured."""
    return min(range(1, newest + 1), key=loss, default=None)


def retained(there: set[int], own: set[int], loss: Callable[[int], float] = loss) -> set[int]:
    """The last two, the two best (of equal ones the earlier), and what the process was resumed from."""
    return set(sorted(there)[-KEEP_LAST:]) | set(sorted(there, key=lambda each: (loss(each), each))[:KEEP_BEST]) | own & there


WATCHES = {"manage": ManagerWatch, "overwrite": OverwriteWatch, "collect": CollectWatch}


def crash(directory: Path, name: str, kills: int, rng: random.Random) -> Counter[str]:
    """Kill savers of one mode; returns what was counted."""
    mode = MODES[name]
    directory.mkdir()
    watch = WATCHES[mode.save.__name__](directory, mode)
    warm(directory.with_name(f"{directory.name} warm"))
    seconds = survey(directory.with_name(f"{directory.name} once"), mode)
    for _ in range(kills):
        # At any moment of its beginning and its first saves.
        span = 1.2 * seconds["begins"] + max(12 * seconds["saves"], 2 * seconds["begins"])
        try:
            watch.check(live_and_die(directory, mode, rng.uniform(0, span)))
        except (AssertionError, PolyckptError) as error:
            raise AssertionError(f"{name}, kill {watch.counts['kills']}: {error!r}; left in {directory}") from error
    return watch.counts


def warm(directory: Path) -> None:
    """Import all that a saver needs, so that it begins within a few milliseconds of its fork."""
    with polyckpt.CheckpointManager(directory, monitor="loss") as ckpts:
        ckpts.save(contents(1), slots(1), step=1, metrics={"loss": loss(1)})
        number_in(ckpts.restore(contents(1)).model, slots(1))


def survey(directory: Path, mode: Mode) -> dict[str, float]:
    """How long a saver takes to begin, and how long for one save."""
    directory.mkdir()
    began, saves, started = 0.0, 0, time.perf_counter()
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        saver(directory, mode, tells)
    os.close(tells)
    with os.fdopen(told, "rb") as file:
        for line in file:
            now = time.perf_counter() - started
            what = json.loads(line)[0]
            began = began or now
            saves += what == "begin"
            if now > began + 0.15:
                break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {"begins": began, "saves": 0.15 / max(saves, 1)}
