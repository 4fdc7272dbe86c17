"""The long forms one after the other: ``python -m tests.faults``. Writes what was counted as JSON; fails where a check does."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults import many, reordered, rot, single
from tests.faults.verdicts import CHECKS


def single_faults(directory: Path) -> Counter[str]:
    """Every call of every work, struck in every way."""
    counts: Counter[str] = Counter()
    for work, check in CHECKS.items():
        (directory / work).mkdir()
        for action, findings in single.survey(directory / work, work, single.ACTIONS).items():
            for finding in findings:
                check(work, action, finding)
            counts[action] += len(findings)
    return counts


def bits(directory: Path) -> dict[str, Counter[str]]:
    return rot.survey(directory, every=1, at_random=10_000, seed=0)


def losses_of_power(directory: Path) -> dict[str, int]:
    return reordered.survey(directory, samples=20, every=1, seed=0)


def at_once(directory: Path) -> Counter[str]:
    return many.survey(directory, seconds=60)


WORKS = {"single faults": single_faults, "losses of power": losses_of_power, "changed bits": bits, "at once": at_once}


def main() -> None:
    found: dict[str, Any] = {}
    for name, work in WORKS.items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
            found[name] = {**work(Path(directory)), "seconds": round(time.monotonic() - started)}
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
