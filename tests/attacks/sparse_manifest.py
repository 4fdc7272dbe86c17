"""Wants the victim's memory: a manifest of many gigabytes that takes no space on disk, found while a run is looked through."""

from __future__ import annotations

import os
from pathlib import Path

import polyckpt
from tests.managed import finished, params

REFUSED = r"manifest\.json: 17179869184 bytes; a manifest has at most"


def attack(directory: Path) -> None:
    run = finished(directory / "run", 1)
    os.truncate(run / "step-00000010" / "manifest.json", 1 << 34)
    polyckpt.CheckpointManager(run).restore(params())
