"""Wants the victim's memory: a history of many gigabytes that takes no space on disk."""

from __future__ import annotations

import os
from pathlib import Path

import polyckpt
from tests.managed import finished

REFUSED = r"history\.jsonl: 17179869184 bytes; a history has at most"


def attack(directory: Path) -> None:
    run = finished(directory / "run", 1)
    os.truncate(run / "history.jsonl", 1 << 34)
    _ = polyckpt.CheckpointManager(run).records
