"""Runs the cases of one module in this process: ``python -m tests.adapters.worker MODULE train|resume DIRECTORY``.

train: every case runs 2k steps straight, and again k steps, a save, k steps. resume: every case is built with other random
parameters, loads what `train` saved and runs k steps. Prints nothing; writes DIRECTORY/<mode>.json with digests of all
states and losses by case, and the traceback of a case that failed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 3


def digest(run: Any, losses: list[float]) -> dict[str, str]:
    """Digests of the bits of a run's arrays and losses."""
    arrays = {name: np.asarray(value) for name, value in run.state().items()}
    arrays["losses"] = np.asarray(losses, np.float64)
    return {
        name: f"{array.dtype} {list(array.shape)} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]}"
        for name, array in arrays.items()
    }


def advance(run: Any) -> list[float]:
    """k steps and their losses."""
    return [float(run.step()) for _ in range(STEPS)]


def train(build: Any, directory: Path) -> dict[str, Any]:
    """The digest of a run that was never interrupted, and of one that was saved on its way."""
    straight = build(1)
    start = digest(straight, [])
    advance(straight)
    straight_digest = digest(straight, advance(straight))
    saved = build(1)
    advance(saved)
    saved.save(directory)
    return {"start": start, "straight": straight_digest, "saved": digest(saved, advance(saved))}


def resume(build: Any, directory: Path) -> dict[str, Any]:
    """The digest of a run that went on from the save."""
    run = build(2)
    start = digest(run, [])
    run.load(directory)
    return {"start": start, "resumed": digest(run, advance(run))}


def main(module: str, mode: str, directory: Path) -> None:
    results = {}
    for name, build in importlib.import_module(module).CASES.items():
        try:
            results[name] = {"train": train, "resume": resume}[mode](build, directory / name)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    (directory / f"{mode}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
