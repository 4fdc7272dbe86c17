"""Names permuted, definitions shuffled, twins swapped, numbers that mislead: right or refused, never wrong in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conversion.mutants import KINDS
from tests.conversion.torch_models import MODELS
from tests.conversion.trials import outcomes

SEEDS = 8
"""Of each kind and model, with a probe and without: 576 mutants."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_mutant_gets_the_right_weights_by_a_probe(name: str, kind: str, tmp_path: Path) -> None:
    assert outcomes(name, kind, range(SEEDS), tmp_path, probe=True) == {"right": SEEDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_mutant_is_refused_without_a_probe(name: str, kind: str, tmp_path: Path) -> None:
    assert outcomes(name, kind, range(SEEDS), tmp_path, probe=False) == {"refused": SEEDS}
