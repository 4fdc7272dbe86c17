"""Tracing Keras models, on each backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.adapters.checks import names
from tests.adapters.suite import run_python

CHECKS = names(Path(__file__).parent / "keras_tracing.py")
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


class Tracing:
    """The checks on one backend, in a process of its own."""

    backend: str

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        path = tmp_path_factory.mktemp(cls.backend) / "results"
        run_python("-m", "tests.adapters.keras_tracing", str(path), env={**QUIET, "KERAS_BACKEND": cls.backend})
        found: dict[str, str] = json.loads(path.read_text())
        return found

    @pytest.mark.parametrize("name", CHECKS)
    def test_check(self, results: dict[str, str], name: str) -> None:
        assert results[name] == "", results[name]


# Classes, so that they run beside each other.
class TestTensorFlow(Tracing):
    backend = "tensorflow"


class TestTorch(Tracing):
    backend = "torch"


class TestJax(Tracing):
    backend = "jax"
