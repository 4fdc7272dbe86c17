"""Tiny runs of a CheckpointManager: the model of epoch n is full of n."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from polyckpt import CheckpointManager


def params(value: float = 0.0) -> dict[str, np.ndarray]:
    return {"w": np.full((3, 2), float(value))}


def value(restored: Any) -> float:
    return float(restored.model["w"][0, 0])


def tell(ckpts: CheckpointManager, *losses: float, first: int = 1, **metrics: float) -> list[bool]:
    """One epoch of ten steps for each loss. Whether each was saved."""
    numbered = list(enumerate(losses, first))
    return [ckpts.save(params(n), epoch=n, step=10 * n, metrics={"loss": loss, **metrics}) is not None for n, loss in numbered]


def finished(directory: Path, *losses: float, **options: Any) -> Path:
    """A directory with a run that is over."""
    with CheckpointManager(directory, monitor="loss", **options) as ckpts:
        tell(ckpts, *losses)
    return directory


def epochs(ckpts: CheckpointManager) -> list[int | None]:
    return [record.epoch for record in ckpts.checkpoints]
