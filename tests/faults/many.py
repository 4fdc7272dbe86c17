"""Many processes and threads in one run's directory at once: ``python -m tests.faults.many DIRECTORY [--seconds N]``.

Eight processes of eight threads: in each, one thread trains as soon as no other writes, which deletes old checkpoints; the
others load the newest and the best, replace one checkpoint beside the run, and read that. Writes JSON: what was counted. Fails
where a load is torn, two write at a time, or anything is raised but a clear refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polyckpt
from polyckpt.errors import LockedError, NotACheckpointError, RunError
from tests.crash.savers import contents, loss, number_in, slots, temporaries

PROCESSES, THREADS = 8, 8
Work = Callable[[Path, Counter[str]], None]


def train(directory: Path, counts: Counter[str]) -> None:
    """A few steps of the run, where nobody else writes to it."""
    try:
        with polyckpt.CheckpointManager(directory / "run", monitor="loss", keep_last=1, keep_best=1) as ckpts:
            start = ckpts.restore(contents(1), slots(1))
            writer = directory / "writer"
            if start.checkpoint is not None:
                assert number_in(start.model, start.optimizer) == start.step
            for step in range(start.step + 1, start.step + 4):
                ckpts.save(contents(step), slots(step), step=step, metrics={"loss": loss(step)})
                if step == start.step + 1:
                    os.close(os.open(writer, os.O_CREAT | os.O_EXCL))  # fails where there is a second writer
                counts["saved in the run"] += 1
            writer.unlink()
    except LockedError:
        counts["refused: another one writes"] += 1
        time.sleep(0.01)
    except RunError as error:
        assert "another process went on" in str(error) or "cannot follow" in str(error), error
        counts["refused: another one went on"] += 1


def load(name: str) -> Work:
    def work(directory: Path, counts: Counter[str]) -> None:
        try:
            start = polyckpt.load(directory / name, contents(1), slots(1))
        except NotACheckpointError:
            counts["not there (yet, or any more)"] += 1
            time.sleep(0.001)
            return
        assert number_in(start.model, start.optimizer) == start.step
        counts[f"loaded {name}"] += 1

    return work


def look(directory: Path, counts: Counter[str]) -> None:
    """What somebody sees who only reads: every record names what was measured there."""
    ckpts = polyckpt.CheckpointManager(directory / "run", monitor="loss")
    assert all(record.metrics["loss"] == loss(record.step or 0) for record in ckpts.records)
    counts["looked"] += 1


def replace(directory: Path, counts: Counter[str]) -> None:
    number = 1 + counts["replaced"] % 50
    polyckpt.save(directory / "shared", contents(number), slots(number), step=number, overwrite=True)
    counts["replaced"] += 1


WORKS: list[Work] = [train, load("run/last"), load("run/best"), look, replace, replace, load("shared"), load("shared")]
assert len(WORKS) == THREADS


def process(directory: Path, until: float) -> dict[str, Any]:
    """All threads of one process; what each counted, and what failed."""
    counts: list[Counter[str]] = [Counter() for _ in WORKS]
    failures: list[str] = []

    def run(work: Work, count: Counter[str]) -> None:
        try:
            while time.monotonic() < until and not failures:
                work(directory, count)
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=each) for each in zip(WORKS, counts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"counts": sum(counts, Counter()), "failures": failures}


def survey(directory: Path, seconds: float) -> Counter[str]:
    """What was counted by all; what is left has been verified."""
    with tempfile.TemporaryDirectory() as place:  # everything is imported by then
        for work in WORKS[:1] + WORKS[4:5]:
            work(Path(place), Counter())
        polyckpt.load(Path(place, "shared"), contents(1), slots(1))
    until, pipes = time.monotonic() + seconds, []
    for _ in range(PROCESSES):
        told, tells = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                warnings.simplefilter("ignore")  # that another one writes, and is therefore only read from
                os.write(tells, json.dumps(process(directory, until)).encode())
            finally:
                os._exit(0)
        os.close(tells)
        pipes.append((child, told))
    total: Counter[str] = Counter()
    for child, told in pipes:
        with os.fdopen(told, "rb") as file:
            found = json.loads(file.read())
        os.waitpid(child, 0)
        assert not found["failures"], "\n".join(found["failures"])
        total.update(found["counts"])
    with polyckpt.CheckpointManager(directory / "run", monitor="loss", keep_last=1, keep_best=1) as ckpts:
        ckpts.restore(contents(1), slots(1))
        for record in ckpts.checkpoints:
            polyckpt.inspect(directory / "run" / str(record.name)).verify()
        assert [record.step for record in ckpts.records] == list(range(1, total["saved in the run"] + 1))
    assert not temporaries(directory / "run")
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults.many", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    place = given.directory / "many"
    place.mkdir()
    json.dump(survey(place, given.seconds), sys.stdout)
    shutil.rmtree(place)
