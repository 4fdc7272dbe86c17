"""A bit that changed on disk is found by the next load, which says where, and is never loaded as a value."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import polyckpt
from tests.faults.rot import small, survey


def test_no_changed_bit_is_ever_loaded(disk: Path) -> None:
    counts = survey(disk, every=37, at_random=200, seed=0)
    assert counts["small"]["bits"] > 1500 and counts["large"]["bits"] == 200
    for found in counts.values():
        assert found["refused"] == found["bits"], found


def test_a_load_that_verifies_nothing_is_seen_to_give_a_wrong_value(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotting = small(disk / "c")
    monkeypatch.setattr(polyckpt, "load", functools.partial(polyckpt.load, verify=False))
    with pytest.raises(AssertionError, match="a wrong value was loaded"):
        rotting.flip("weights.safetensors", 8 * rotting.sizes["weights.safetensors"] - 1)
    monkeypatch.undo()
    assert rotting.load() == rotting.values
