"""Write golden checkpoints of the current format version: python tests/golden/make.py [NAME ...]

One tiny run per framework, in a process of its own, into tests/golden/<format version>/<name>, and `run`, the directory of a
manager (since 1.1). A minor version needs those that show what it added. Checkpoints of a released version are never written
again: later versions of the library must load them as they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

GOLDEN = Path(__file__).parent
REPOSITORY = GOLDEN.parents[1]
NAMES = ("numpy", "torch", "keras-tensorflow", "keras-torch", "keras-jax", "nnx", "linen", "equinox", "haiku", "run")


def main(version: str, names: Sequence[str]) -> None:
    for name in names:
        path = GOLDEN / version / name
        shutil.rmtree(path, ignore_errors=True)
        run("save", name, path)


def run(mode: str, name: str, path: Path) -> None:
    """`save` or `check` one golden run in a new process; raises CalledProcessError with its output where that fails."""
    framework, _, backend = name.partition("-")
    environment = {**os.environ, **({"KERAS_BACKEND": backend} if backend else {})}
    command = [sys.executable, "-m", "tests.golden.runs", mode, framework, str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{mode} {name}\n{done.stdout}\n{done.stderr}"


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    from polyckpt.heads import VERSION

    main(VERSION, sys.argv[1:] or NAMES)
