"""Models that are written in another framework as people there write them convert with no rules, there and back."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from tests.sealing import REPOSITORY

TWINS = {
    "keras": ["U-Net", "BERT", "GPT-2", "BiLSTM tagger"],
    "nnx": ["U-Net", "BERT", "GPT-2", "BiLSTM tagger"],
    "linen": ["U-Net", "BERT", "GPT-2"],
    "equinox": ["U-Net", "BERT", "GPT-2", "BiLSTM tagger"],
    "haiku": ["U-Net", "BERT", "GPT-2"],
}
PAIRS = [(framework, model) for framework, models in TWINS.items() for model in models]


@functools.cache
def run() -> subprocess.CompletedProcess[str]:
    # Nearly all the time goes into compiling functions that run once, many of them the same.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    command = [sys.executable, "-m", "tests.conversion.twins"]
    with tempfile.TemporaryDirectory() as cache:
        env |= {"JAX_COMPILATION_CACHE_DIR": cache}
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)


def results() -> dict[str, dict[str, dict[str, Any]]]:
    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("framework", "model"), PAIRS)
def test_outputs_agree_there_and_back(framework: str, model: str) -> None:
    found = results()[framework][model]
    assert found["agrees"]
    assert found["there"] <= 1e-5 < found["unlike"]
    assert found["back"] <= 1e-5


def test_every_twin_is_there() -> None:
    assert {name: list(models) for name, models in results().items()} == TWINS
