"""Going on in Keras, on each of its backends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.sealing import REPOSITORY


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_keras(backend: str) -> None:
    environment = {**os.environ, "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    module = REPOSITORY / "tests" / "continuation" / "keras_going_on.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(module)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-20_000:]
    assert "21 passed" in done.stdout
