"""Model checkpoints that outlive their framework: one save and one load for PyTorch, Keras 3 and JAX.

Names are imported when they are first used, so that `import polyckpt` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyckpt import parity
    from polyckpt.api import Restored, export, inspect, load, open, plan, save
    from polyckpt.checkpoint import Checkpoint
    from polyckpt.conversion import Report
    from polyckpt.errors import (
        AdapterError,
        AmbiguityError,
        CheckpointError,
        CheckpointExistsError,
        CorruptError,
        LockedError,
        MismatchError,
        NotACheckpointError,
        ParityError,
        PlanError,
        PolicyError,
        PolyckptError,
        Problem,
        RunError,
        StorageError,
        UnsupportedError,
        VersionError,
    )
    from polyckpt.manager import CheckpointManager, Start
    from polyckpt.plans import Plan
    from polyckpt.policy import BestBy, EarlyStopping, Every, KeepEvery, KeepLast, OnImprovement, Record

_MODULES = {
    "polyckpt.api": ("Restored", "export", "inspect", "load", "open", "plan", "save"),
    "polyckpt.checkpoint": ("Checkpoint",),
    "polyckpt.conversion": ("Report",),
    "polyckpt.errors": (
        "AdapterError",
        "AmbiguityError",
        "CheckpointError",
        "CheckpointExistsError",
        "CorruptError",
        "LockedError",
        "MismatchError",
        "NotACheckpointError",
        "ParityError",
        "PlanError",
        "PolicyError",
        "PolyckptError",
        "Problem",
        "RunError",
        "StorageError",
        "UnsupportedError",
        "VersionError",
    ),
    "polyckpt.manager": ("CheckpointManager", "Start"),
    "polyckpt.plans": ("Plan",),
    "polyckpt.policy": ("BestBy", "EarlyStopping", "Every", "KeepEvery", "KeepLast", "OnImprovement", "Record"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "AmbiguityError",
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
    "ParityError",
    "Plan",
    "PlanError",
    "PolicyError",
    "PolyckptError",
    "Problem",
    "Record",
    "Report",
    "Restored",
    "RunError",
    "Start",
    "StorageError",
    "UnsupportedError",
    "VersionError",
    "export",
    "inspect",
    "load",
    "open",
    "parity",
    "plan",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "parity":
        return import_module("polyckpt.parity")
    if name not in _HOME:
        raise AttributeError(f"module 'polyckpt' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
