"""The demo, the training loops and the README do what they say."""

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


def test_a_run_that_moves_is_the_run_that_stays(tmp_path: Path) -> None:
    picture = tmp_path / "moved.png"
    command = [sys.executable, str(REPOSITORY / "examples" / "move.py"), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, env={**QUIET, "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.findall(r"largest difference (\S+),", done.stdout)[0]) < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


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


# What a process does after another was interrupted: it goes on, and then trains the same anew without interruption. A signal
# comes as the manager's `save` is called for the n-th time, the same moment in every run.
RUNNER = """
import itertools, os, runpy, signal, sys
import polyckpt

script, epochs, name, number, *directories = sys.argv[1:]
calls, save = itertools.count(1), polyckpt.CheckpointManager.save

def signalled(*args, **options):
    if next(calls) == int(number):
        signal.raise_signal(signal.Signals[name])
    return save(*args, **options)

polyckpt.CheckpointManager.save = signalled
sys.path.insert(0, os.path.dirname(script))
main = runpy.run_path(script)["main"]
for directory in directories:
    print("in", directory, flush=True)
    main(directory, int(epochs))
"""


def run(*command: str | Path, place: Path, code: int = 0) -> str:
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(place / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**QUIET, **compiled, "KERAS_BACKEND": "tensorflow", "TF_DETERMINISTIC_OPS": "1"}
    done = subprocess.run([sys.executable, "-u", *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def epochs_told(output: str) -> dict[int, str]:
    """What was printed of each epoch, by a loop or by `fit`."""
    told = re.findall(r"^epoch (\d+): (.*)|^Epoch (\d+)/.*\n\S+ - \S+ - \S+ - (.*)", output, re.MULTILINE)
    return {int(ours or keras): line or keras_line for ours, line, keras, keras_line in told}


@pytest.mark.parametrize(
    ("name", "interruption"),
    [
        pytest.param("torch_loop", ("SIGTERM", 2), id="torch"),
        pytest.param("keras_loop", 2, id="keras-loop"),
        pytest.param("keras_fit", ("SIGKILL", 4), id="keras-fit"),
        pytest.param("nnx_loop", ("SIGTERM", 34), id="nnx"),
        pytest.param("linen_loop", 1, id="linen"),
    ],
)
def test_a_loop_goes_on_where_it_was(name: str, interruption: Any, demo: ModuleType, tmp_path: Path) -> None:
    script, straight, again = REPOSITORY / "examples" / f"{name}.py", tmp_path / "straight", tmp_path / "again"
    if isinstance(interruption, int):
        interrupted = run(script, again, "--epochs", str(interruption), place=tmp_path)
    else:
        signal_name, call = interruption
        code = {"SIGTERM": 143, "SIGKILL": -9}[signal_name]
        interrupted = run("-c", RUNNER, script, "3", signal_name, str(call), again, place=tmp_path, code=code)
    resumed, whole = run("-c", RUNNER, script, "3", "none", "0", again, straight, place=tmp_path).split(f"in {straight}\n")

    before, after, expected = map(epochs_told, (interrupted, resumed, whole))
    assert before and after and [*before, *after] == [*expected] == [1, 2, 3]
    assert before | after == expected
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
    assert float(whole.split()[-1]) > 0.9
    last = "backup/last" if name == "keras_fit" else "last"
    compared = demo.differences(straight / last, again / last)
    for section in ("weights", "optimizer", "metrics"):
        assert not compared[section][1], compared


@pytest.mark.parametrize("block", README_BLOCKS, ids=lambda block: re.findall(r"import (\w+)", block)[0])
def test_readme_example_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, env=QUIET)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/*/*/manifest.json"))
