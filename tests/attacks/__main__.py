"""Runs each attack in a process of its own, whose memory and time are limited; writes what came of it as JSON."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import polyckpt
from tests import attacks

NAMES = sorted(name for _, name, _ in pkgutil.iter_modules(attacks.__path__) if not name.startswith(("_", "test_")))
SECONDS = 60
MEMORY_BYTES = 1 << 30
"""Beyond what a process has that has loaded a checkpoint."""


def module(name: str) -> ModuleType:
    return importlib.import_module(f"tests.attacks.{name}")


def carried_out(name: str) -> dict[str, Any]:
    """The error that the victim got, or None; what harm was done; how long it took."""
    with tempfile.TemporaryDirectory() as place:
        directory, started = Path(place), time.monotonic()
        error = None
        try:
            module(name).attack(directory)
        except Exception as caught:
            error = caught
        seconds = time.monotonic() - started
        harm = getattr(module(name), "harm", lambda _: None)(directory)
    ours = isinstance(error, polyckpt.PolyckptError)
    return {"error": type(error).__name__, "ours": ours, "message": str(error), "harm": harm, "seconds": seconds}


def limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    signal.alarm(SECONDS)


def apart(name: str) -> dict[str, Any]:
    """`carried_out` in a forked process; an attack that kills it has succeeded."""
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            warnings.simplefilter("ignore")
            limit()
            os.write(tells, json.dumps(carried_out(name)).encode())
        finally:
            os._exit(0)
    os.close(tells)
    with os.fdopen(told, "rb") as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (
        json.loads(said) if said else {"error": None, "ours": False, "message": "", "harm": f"the process ended with {status}"}
    )


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:  # imports what a load needs, before memory is limited
        saved = polyckpt.save(Path(place, "c"), {"w": np.ones(3)})
        polyckpt.load(saved, {"w": np.ones(3)})
        polyckpt.CheckpointManager(place).close()
    json.dump({name: apart(name) for name in names}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1:] or NAMES)
