"""Wants the victim's memory: a manifest is a symbolic link to a device that never ends."""

from __future__ import annotations

from pathlib import Path

import polyckpt
from tests.managed import finished, params

REFUSED = r"none of its checkpoints can be loaded.*(?s:.*)manifest\.json: not a regular file"


def attack(directory: Path) -> None:
    run = finished(directory / "run", 1)
    manifest = run / "step-00000010" / "manifest.json"
    manifest.unlink()
    manifest.symlink_to("/dev/zero")
    polyckpt.CheckpointManager(run).restore(params())
