"""Model checkpoints that outlive their framework: one save and one load for PyTorch, Keras 3 and JAX.

Names are imported when they are first used, so that `import polyckpt` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyckpt.api import Restored, inspect, load, save
    from polyckpt.checkpoint import Checkpoint
    from polyckpt.errors import (
        AdapterError,
        CheckpointError,
        CheckpointExistsError,
        CorruptError,
        LockedError,
        MismatchError,
        NotACheckpointError,
        PolicyError,
        PolyckptError,
        Problem,
        RunError,
        StorageError,
        UnsupportedError,
        VersionError,
    )
    from polyckpt.manager import CheckpointManager, Start
    from polyckpt.policy import BestBy, EarlyStopping, Every, KeepEvery, KeepLast, OnImprovement, Record

_MODULES = {
    "polyckpt.api": ("Restored", "inspect", "load", "save"),
    "polyckpt.checkpoint": ("Checkpoint",),
    "polyckpt.errors": (
        "AdapterError",
        "CheckpointError",
        "CheckpointExistsError",
        "CorruptError",
        "LockedError",
        "MismatchError",
        "NotACheckpointError",
        "PolicyError",
        "PolyckptError",
        "Problem",
        "RunError",
        "StorageError",
        "UnsupportedError",
        "VersionError",
    ),
    "polyckpt.manager": ("CheckpointManager", "Start"),
    "polyckpt.policy": ("BestBy", "EarlyStopping", "Every", "KeepEvery", "KeepLast", "OnImprovement", "Record"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "BestBy",
    "Checkpoint",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointManager",
    "CorruptError",
    "EarlyStopping",
    "Every",
    "KeepEvery",
    "KeepLast",
    "LockedError",
    "MismatchError",
    "NotACheckpointError",
    "OnImprovement",
    "PolicyError",
    "PolyckptError",
    "Problem",
    "Record",
    "Restored",
    "RunError",
    "Start",
    "StorageError",
    "UnsupportedError",
    "VersionError",
    "inspect",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polyckpt' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
