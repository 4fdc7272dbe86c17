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

MODELS = ["U-Net", "BERT", "GPT-2", "BiLSTM tagger"]
TWINS = [(framework, model) for framework in ("keras", "nnx", "linen") for model in MODELS]


@functools.cache
def results(framework: str) -> dict[str, dict[str, Any]]:
    # Nearly all the time goes into compiling functions that run once.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    command = [sys.executable, "-m", "tests.conversion.twins", framework]
    with tempfile.TemporaryDirectory() as cache:
        env |= {"JAX_COMPILATION_CACHE_DIR": cache}
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("framework", "model"), TWINS)
def test_outputs_agree_there_and_back(framework: str, model: str) -> None:
    found = results(framework)[model]
    assert found["agrees"]
    assert found["there"] <= 1e-5 < found["unlike"]
    assert found["back"] <= 1e-5


@pytest.mark.parametrize("framework", dict.fromkeys(framework for framework, _ in TWINS))
def test_every_twin_is_there(framework: str) -> None:
    assert sorted(results(framework)) == sorted(model for name, model in TWINS if name == framework)
