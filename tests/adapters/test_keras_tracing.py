"""Tracing Keras models and what their layers are described as, on each backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.adapters.checks import names
from tests.adapters.suite import run_python

HERE = Path(__file__).parent
MODULES = ("keras_tracing", "keras_layers")
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


class Tracing:
    """The checks on one backend, in two processes."""

    backend: str

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        directory = tmp_path_factory.mktemp(cls.backend)
        found: dict[str, str] = {}
        for module in MODULES:
            run_python("-m", f"tests.adapters.{module}", str(directory / module), env={**QUIET, "KERAS_BACKEND": cls.backend})
            found |= json.loads((directory / module).read_text())
        return found

    @pytest.mark.parametrize("name", [name for module in MODULES for name in names(HERE / f"{module}.py")])
    def test_check(self, results: dict[str, str], name: str) -> None:
        assert results[name] == "", results[name]


# Classes, so that they run beside each other.
class TestTensorFlow(Tracing):
    backend = "tensorflow"


class TestTorch(Tracing):
    backend = "torch"


class TestJax(Tracing):
    backend = "jax"
