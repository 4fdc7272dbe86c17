"""Every attack is refused with an error that says why, does no harm, and takes neither memory nor time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.attacks.__main__ import NAMES, module
from tests.sealing import REPOSITORY


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.attacks"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes[name]
    assert outcome["harm"] is None
    assert outcome["ours"], outcome
    assert re.search(module(name).REFUSED, outcome["message"]), outcome["message"]
    assert outcome["seconds"] < 30


def test_all_are_run(outcomes: dict[str, dict[str, Any]]) -> None:
    assert len(outcomes) == len(NAMES) >= 15
