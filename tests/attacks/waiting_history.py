"""Wants the victim's process to wait for ever: the history of a run is a FIFO that nobody writes to."""

from __future__ import annotations

import os
from pathlib import Path

import polyckpt
from tests.managed import finished

REFUSED = r"history\.jsonl: not a regular file"


def attack(directory: Path) -> None:
    run = finished(directory / "run", 1)
    (run / "history.jsonl").unlink()
    os.mkfifo(run / "history.jsonl")
    _ = polyckpt.CheckpointManager(run).best
