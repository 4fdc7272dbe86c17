"""Checkpoints of every released format version go on loading, in every framework."""

from pathlib import Path

import pytest

import polyckpt
from tests.golden.make import GOLDEN, NAMES, run

CHECKPOINTS = [path.parent for path in sorted(GOLDEN.glob("*/*/expected.json"))]


def test_every_framework_has_one() -> None:
    assert {path.name for path in CHECKPOINTS} == set(NAMES)


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_checkpoint_loads(path: Path) -> None:
    for manifest in path.rglob("manifest.json"):
        polyckpt.inspect(manifest.parent).verify()
    run("check", path.name, path)
