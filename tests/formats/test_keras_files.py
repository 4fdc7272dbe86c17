"""Files of Keras 3 on each of its backends: read, converted, continued as Keras continues them, and written for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.sealing import REPOSITORY

QUIET = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
WRITE = """
import sys, numpy as np
from tests.formats.keras_nets import make, train, values
model = make("sequential", "adam")
train(model, "sequential", range(2))
model.save(sys.argv[1] + "/m.keras")
np.savez(sys.argv[1] + "/values.npz", *values(model))
"""


def run(*arguments: object, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, **QUIET, **env}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def written_on_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("torch")
    done = run("-c", WRITE, directory, env={"KERAS_BACKEND": "torch"})
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_keras(backend: str, written_on_torch: Path, tmp_path: Path) -> None:
    quick = {
        # Programs for XLA are compiled once, and quickly.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    module = REPOSITORY / "tests" / "formats" / "keras_files_child.py"
    env = {"KERAS_BACKEND": backend, "WRITTEN_ON_TORCH": str(written_on_torch), **quick}
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=8", module, env=env)
    assert done.returncode == 0, done.stdout[-20_000:]
