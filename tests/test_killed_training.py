"""Trainings that save in the background, killed at any call on the file system, end as those that were never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from tests.killed_training import OPTIONS, STEPS
from tests.sealing import REPOSITORY

QUIET = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
KILLS = {"numpy": 60, "torch": 15}


class Trainer:
    def __init__(self, kind: str, directory: Path) -> None:
        directory.mkdir()
        command = [sys.executable, "-m", "tests.killed_training", kind, str(directory)]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=QUIET, stdin=-1, stdout=-1, stderr=-1, text=True)

    def run(self, at: int = 0) -> tuple[int, int | None]:
        """Exit code of one process that is killed at its `at`-th call, and the step that it was resumed from."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{at}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.end()
        code, resumed = json.loads(line)
        assert code in (0, -signal.SIGKILL), self.end()
        return code, resumed

    def end(self) -> str:
        return self.process.communicate()[1]


def newest(run: Path) -> int:
    """The step of the newest checkpoint that there is, by the directories alone."""
    return max((int(path.name.split("-")[1]) for path in run.glob("step-*")), default=0)


def finished(directory: Path, kind: str) -> dict[str, Any]:
    ckpts = polyckpt.CheckpointManager(directory / "run", monitor="loss", **OPTIONS[kind])
    for record in ckpts.checkpoints:
        polyckpt.inspect(directory / "run" / (record.name or "")).verify()
    return {
        "weights": np.load(directory / "final.npy").tobytes(),
        "records": [replace(record, time=0) for record in ckpts.records],
        "best": ckpts.best and (ckpts.best.step, ckpts.best.name),
        "stopped": ckpts.should_stop,
        "links": [os.readlink(directory / "run" / link) for link in ("best", "last")],
    }


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_training_killed_at_any_call_ends_as_one_that_was_not(tmp_path: Path, kind: str) -> None:
    straight = Trainer(kind, tmp_path / "straight")
    assert straight.run() == (0, 0)
    assert straight.end() == ""

    rng = random.Random(kind)
    killed, run = Trainer(kind, tmp_path / "killed"), tmp_path / "killed" / "run"
    kills, resumes, last = 0, 0, None
    while True:
        there = newest(run)
        # Now and then already while it is restored; most often somewhere in the saves of many steps.
        at = rng.randint(1, 30) if rng.random() < 0.15 else rng.randint(30, 700)
        code, resumed = killed.run(at if kills < KILLS[kind] else 0)
        if resumed is not None:
            assert resumed == there, "not resumed from the newest checkpoint"
            resumes += resumed > 0
            last = resumed
        if code == 0:
            break
        kills += 1
        left = list(run.glob(".polyckpt-tmp-*"))
        assert len(left) <= 3, left
        assert newest(run) >= int((tmp_path / "killed" / "committed").read_text() or 0), "what was committed is gone"
    assert killed.end() == ""
    assert kills == KILLS[kind], f"it came to its end after {kills} kills"
    assert resumes > kills / 2

    one, two = finished(tmp_path / "straight", kind), finished(tmp_path / "killed", kind)
    assert one == two
    assert ((one["records"][-1].step or 0) < STEPS[kind] - 5) == (kind == "numpy"), "patience decides where it is asked to"
    kept, kept_killed = ({path.name for path in (tmp_path / name / "run").glob("step-*")} for name in ("straight", "killed"))
    assert kept <= kept_killed <= kept | {f"step-{last:08d}"}
    assert {path.name for path in run.iterdir()} - kept_killed == {"best", "last", "history.jsonl", ".polyckpt-lock"}
