"""Every call of a save fails once, in every way: nothing committed is lost, the error is clear, the next save succeeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.single import ACTIONS, NEW, OLD
from tests.faults.verdicts import CHECKS, MISSING
from tests.sealing import REPOSITORY


def survey(directory: Path, work: str, *actions: str, every: int = 1) -> dict[str, list[dict[str, Any]]]:
    """What was found, each finding checked."""
    command = [sys.executable, "-m", "tests.faults.single", str(directory), work, *actions, "--every", str(every)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    found = json.loads(done.stdout)
    for action, findings in found.items():
        for finding in findings:
            CHECKS[work](work, action, finding)
    return found


@pytest.mark.parametrize(
    ("work", "actions"), [("save", ACTIONS), ("overwrite", ("ENOSPC", "EINTR", "kill")), ("plain", ("EIO", "kill"))]
)
def test_a_save_of_which_one_call_fails_is_whole_or_not_there(work: str, actions: tuple[str, ...], disk: Path) -> None:
    for action, findings in survey(disk, work, *actions).items():
        assert len(findings) >= 4
        outcomes = [finding["target"] for finding in findings]
        before = MISSING if work == "save" else OLD
        assert NEW in outcomes and (action == "short" or before in outcomes), "calls before and after the commit were struck"


def test_a_manager_of_which_one_call_fails_loses_no_checkpoint_and_goes_on(disk: Path) -> None:
    for findings in survey(disk, "manager", "EIO", "ENOSPC", "short", "kill", every=3).values():
        assert len(findings) > 8
        assert any(5.0 in finding["steps"] for finding in findings)


def test_a_load_of_which_one_call_fails_changes_nothing(disk: Path) -> None:
    for action, findings in survey(disk, "load", "EIO", "EACCES", "short").items():
        assert len(findings) >= 5
        refused = sum(finding["outcomes"][0] == "refused" for finding in findings)
        assert (refused >= 4) == (action != "short")
