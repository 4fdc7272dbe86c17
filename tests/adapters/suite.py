"""What every adapter must pass, over the cases of its module. A subclass names them and the environment they run in."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import polyckpt
from polyckpt import layers, optimizers
from tests.adapters import checks

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def run_python(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A new Python process in the repository; fails with its output where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class AdapterSuite:
    """Subclass as `class TestX(AdapterSuite): cases = "tests.adapters.cases.x"`; `env` is added to the environment."""

    cases: str
    env: dict[str, str] = {}

    def __init_subclass__(cls) -> None:
        # Names are listed without any framework; the cases run in processes of their own.
        # A function of its own: a mark would stay on a shared one, and the next subclass would have it too.
        def test_case(self: AdapterSuite, results: tuple[Path, Any, Any], name: str) -> None:
            _check_case(results, name)

        cls.test_case = pytest.mark.parametrize("name", list(importlib.import_module(cls.cases).CASES))(test_case)

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
        """Where the checkpoints are, and what the two processes found."""
        directory = tmp_path_factory.mktemp(cls.__name__)
        for mode in ("train", "resume"):
            run_python("-m", "tests.adapters.worker", cls.cases, mode, str(directory), env=cls.env)
        return directory, *(json.loads((directory / f"{mode}.json").read_text()) for mode in ("train", "resume"))


class BackendChecks:
    """The `check_...` of Keras modules of this folder, each module in a process of its own.

    Subclass as `class TestX(BackendChecks): modules = ("keras_x",); backend = "jax"`: classes run beside each other.
    """

    modules: tuple[str, ...]
    backend: str

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "backend"):
            return

        def test_check(self: BackendChecks, checked: dict[str, str], name: str) -> None:
            assert checked[name] == "", checked[name]

        names = [name for module in cls.modules for name in checks.names(HERE / f"{module}.py")]
        cls.test_check = pytest.mark.parametrize("name", names)(test_check)

    @pytest.fixture(scope="class")
    @classmethod
    def checked(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        """What each check raised, "" for nothing."""
        directory = tmp_path_factory.mktemp(cls.backend)
        env = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": cls.backend}
        found: dict[str, str] = {}
        for module in cls.modules:
            run_python("-m", f"tests.adapters.{module}", str(directory / module), env=env)
            found |= json.loads((directory / module).read_text())
        return found


def _check_case(results: tuple[Path, Any, Any], name: str) -> None:
    directory, trained, resumed = results[0], results[1][name], results[2][name]
    assert "error" not in trained, trained["error"]
    assert "error" not in resumed, resumed["error"]
    # The test can fail: the resumed run began from other values, and training changes them.
    assert resumed["start"] != trained["start"]
    assert trained["straight"] != trained["start"]
    assert trained["saved"] == trained["straight"], "saving changed training"
    assert resumed["resumed"] == trained["straight"], "the resumed run differs from the uninterrupted one"
    check_description(polyckpt.inspect(directory / name))
    check_other_tools(directory / name)


def check_description(checkpoint: polyckpt.Checkpoint) -> None:
    """Layers and optimizer speak the language of the core's tables, and every weight has a role."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights.stored.items()}
    found = [problem for layer in checkpoint.manifest.model.layers for problem in layers.problems(layer, shapes)]
    if checkpoint.manifest.optimizer:
        found += list(optimizers.problems(checkpoint.manifest.optimizer))
        grouped = {name for group in checkpoint.manifest.optimizer.groups for name in group.parameters}
        found += [f"group parameter {name} is no weight" for name in grouped - set(shapes)]
    if checkpoint.manifest.model.layers:
        described = {role.tensor for layer in checkpoint.manifest.model.layers for role in layer.roles.values()}
        aliases = checkpoint.manifest.model.aliases
        canonical = {aliases.get(name, name) for name in described}
        found += [f"{name} has no role" for name in shapes if aliases.get(name, name) not in canonical]
    assert not found, "\n".join(found)


def check_other_tools(directory: Path) -> None:
    """The weights can be read with the safetensors package alone, bit for bit."""
    checkpoint = polyckpt.inspect(directory)
    with safe_open(directory / "weights.safetensors", "np") as file:
        assert set(file.keys()) == set(checkpoint.manifest.tensors["weights"])
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if checkpoint.weights.stored[name].dtype in ("float32", "float64", "int32", "int64"):
                assert file.get_tensor(name).tobytes() == checkpoint.weights[name].tobytes()
