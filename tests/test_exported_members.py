from __future__ import annotations

import pytest

import polyckpt
from polyckpt import errors

PUBLIC = """
AdapterError AmbiguityError BestBy Checkpoint CheckpointError CheckpointExistsError CheckpointManager CorruptError EarlyStopping
Every KeepEvery KeepLast LockedError MismatchError NotACheckpointError OnImprovement ParityError Plan PlanError PolicyError
PolyckptError Problem Record Report Restored RunError Start StorageError UnsupportedError VersionError export inspect load open
parity plan save
"""


def test_public_names_are_these() -> None:
    assert polyckpt.__all__ == sorted(PUBLIC.split())
    assert set(PUBLIC.split()) <= set(dir(polyckpt))
    for name in polyckpt.__all__:
        assert getattr(polyckpt, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        polyckpt.absent  # noqa: B018


def test_every_error_is_public_and_drawn() -> None:
    named = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert named <= set(polyckpt.__all__)
    for name in named:
        assert name in errors.__doc__
        assert issubclass(getattr(errors, name), polyckpt.PolyckptError)
    assert issubclass(errors.NotACheckpointError, FileNotFoundError)
    assert issubclass(errors.CheckpointExistsError, FileExistsError)
    assert issubclass(errors.StorageError, OSError)
    assert errors.StorageError(28, "full").errno == 28
