"""The short form of ``python -m tests.crash``: in each way of saving some processes are killed at random instants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.harness import retained
from tests.crash.savers import MODES, contents, number_in, slots
from tests.sealing import REPOSITORY

KILLS = 49


def test_nothing_committed_is_lost_and_no_decision_is_wrong_wherever_a_saver_is_killed(tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # a kill loses nothing that the system was given, wherever that lies
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else tmp_path
    command = [sys.executable, "-m", "tests.crash", "--kills", str(KILLS), "--directory", str(place)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert {name: counts[name]["kills"] for name in MODES} == dict.fromkeys(MODES, KILLS // len(MODES))
    total = counts["total"]
    assert total["kills"] == KILLS
    assert total["during a save"] > KILLS / 2, "the kills fell beside what they were to hit"
    assert total["saves that were committed"] > KILLS / 2 and total["checkpoints verified"] > KILLS


def test_the_comparison_sees_a_value_of_another_save() -> None:
    mixed = contents(3)
    mixed["w"][50, 100] = contents(4)["w"][50, 100]
    assert number_in(contents(3), slots(3)) == 3
    for model, optimizer in ((mixed, slots(3)), (contents(3), slots(4))):
        with pytest.raises(AssertionError):
            number_in(model, optimizer)


def test_what_is_kept_is_the_last_two_the_two_best_and_what_was_resumed_from() -> None:
    losses = {1: 5.2, 2: 0.1, 3: 0.4, 4: 0.4, 5: 9.0, 6: 8.0}
    assert retained(set(losses), {1}, losses.__getitem__) == {1, 2, 3, 5, 6}
