"""Wants the victim's process to wait for ever: a manifest is a FIFO that nobody writes to."""

from __future__ import annotations

import os
from pathlib import Path

import polyckpt
from tests.managed import finished, params

REFUSED = r"none of its checkpoints can be loaded.*(?s:.*)manifest\.json: not a regular file"


def attack(directory: Path) -> None:
    run = finished(directory / "run", 1)
    manifest = run / "step-00000010" / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    polyckpt.CheckpointManager(run).restore(params())
