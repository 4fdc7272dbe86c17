"""Whole models of other people convert with no rules, and compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.sealing import REPOSITORY


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_models_of_transformers_become_those_of_keras_applications(backend: str) -> None:
    env = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.conversion.applications"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 4
    for name, found in results.items():
        assert found["error"] <= 1e-5 < found["unlike"], (name, found)
        assert found["report"].startswith("max |diff|"), (name, found)
