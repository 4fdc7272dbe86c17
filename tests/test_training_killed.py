"""A real training that saves in the background, killed at random moments and started again each time."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import polyckpt
from tests.sealing import REPOSITORY

KILLS, STEPS = 60, 1500
QUIET = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Trainer:
    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        command = [sys.executable, "-m", "tests.training_child", str(directory / "run"), str(STEPS)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=QUIET, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.wait_for("ready")

    def wait_for(self, word: str) -> int:
        """Read to the line that begins with `word`; returns its number."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word):
                return int(line.removeprefix(word).strip() or 0)
        raise AssertionError(self.end())

    def run(self, kill_after: float | None = None, *, trained: bool = False) -> int:
        """The exit code of one process, killed after so many seconds, which count from when it trains or from its beginning."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        child = self.wait_for("pid")
        if kill_after is not None:
            if trained:
                self.wait_for("training")
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it came to its end
                os.kill(child, signal.SIGKILL)
        return self.wait_for("exit")

    def end(self) -> str:
        _, errors = self.process.communicate()
        return errors


def finished(directory: Path) -> tuple[bytes, list[tuple[int | None, str | None]], list[str], str]:
    """Final weights, every metric, the checkpoints kept, and which is best."""
    ckpts = polyckpt.CheckpointManager(directory / "run", monitor="loss")
    for record in ckpts.checkpoints:
        polyckpt.inspect(directory / "run" / (record.name or "")).verify()
    told = [(record.step, repr(record.metrics)) for record in ckpts.records]
    names = [record.name or "" for record in ckpts.checkpoints]
    return np.load(directory / "final.npy").tobytes(), told, names, os.readlink(directory / "run" / "best")


def test_a_killed_training_loses_only_what_came_after_its_last_checkpoint(tmp_path: Path) -> None:
    straight = Trainer(tmp_path / "straight")
    assert straight.run() == 0, straight.end()
    straight.end()

    rng = random.Random(0)
    killed = Trainer(tmp_path / "killed")
    kills = resumes = 0
    lasts: list[int] = []
    while kills < KILLS:
        code = killed.run(rng.uniform(0, 0.08), trained=rng.random() < 0.8)
        assert code in (0, -signal.SIGKILL), killed.end()
        kills += code != 0
        there = polyckpt.CheckpointManager(tmp_path / "killed" / "run", monitor="loss").checkpoints
        lasts.append(there[-1].step or 0 if there else 0)
        resumes += bool(there)
        if code == 0:
            break
    assert killed.run() == 0, killed.end()
    assert killed.end() == ""
    assert kills >= 50, f"the training ended after {kills} kills at {lasts}"
    assert lasts == sorted(lasts) and resumes > kills / 2 and len(set(lasts)) > 10, lasts

    one, two = finished(tmp_path / "straight"), finished(tmp_path / "killed")
    assert two[0] == one[0], "the weights differ"
    assert two[1] == one[1] and two[3] == one[3]
    # What the last process was resumed from stays too.
    assert set(one[2]) <= set(two[2]) and len(two[2]) <= len(one[2]) + 1
    left = {path.name for path in (tmp_path / "killed" / "run").iterdir()} - set(two[2])
    assert left == {"best", "last", "history.jsonl", ".polyckpt-lock"}
