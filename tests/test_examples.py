"""The demo and the README do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import polyckpt

REPOSITORY = Path(__file__).parents[1]
QUIET = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
README_BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("framework", ["torch", "keras", "nnx"])
def test_a_killed_run_ends_bit_identical(framework: str) -> None:
    command = [sys.executable, str(REPOSITORY / "examples" / "demo.py"), framework]
    done = subprocess.run(command, capture_output=True, text=True, env=QUIET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed in epoch" in done.stdout and "bit-identical" in done.stdout


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    spec = importlib.util.spec_from_file_location("demo", REPOSITORY / "examples" / "demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    return module


def test_the_demo_sees_a_single_bit(demo: ModuleType, tmp_path: Path) -> None:
    w = np.random.rand(3, 2)
    flipped = w.copy()
    flipped.view(np.uint64)[1, 1] ^= 1

    def save(name: str, weights: Any, slots: Any, loss: float) -> Path:
        np.random.seed(0)
        return polyckpt.save(tmp_path / name, {"w": weights}, {"m": slots}, metrics={"loss": loss})

    first = save("first", w, w, 0.5)
    changed = {
        "weights": save("weights", flipped, w, 0.5),
        "optimizer": save("optimizer", w, flipped, 0.5),
        "metrics": save("metrics", w, w, 0.5 + 2**-53),
    }
    assert not any(names for _, names in demo.differences(first, save("same", w, w, 0.5)).values())
    for section, other in changed.items():
        found = demo.differences(first, other)
        assert [name for name, (_, names) in found.items() if names] == [section]


@pytest.mark.parametrize("block", README_BLOCKS, ids=lambda block: re.findall(r"import (\w+)", block)[0])
def test_readme_example_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, env=QUIET)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/*/*/manifest.json"))
