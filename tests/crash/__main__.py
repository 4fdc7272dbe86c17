"""The long form: ``python -m tests.crash --kills 1000``. Prints what was counted as JSON; exits with 1 where a check failed."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.crash.harness import crash
from tests.crash.savers import MODES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="in all modes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to save; by default a temporary directory")
    given = parser.parse_args()
    started = time.monotonic()
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        for index, name in enumerate(MODES):
            kills = given.kills // len(MODES) + (index < given.kills % len(MODES))
            found[name] = crash(Path(directory, str(index)), name, kills, random.Random(f"{given.seed} {name}"))
    total = sum(found.values(), Counter())
    json.dump({**found, "total": total, "seconds": round(time.monotonic() - started)}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
