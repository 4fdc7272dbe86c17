"""Every kind of layer, between every two frameworks that have it: outputs agree, and what went over exactly comes back so."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.sealing import REPOSITORY

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
_NORMS = {"batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"}
FLOAT32_INSIDE = {"nnx": {"attention"}, "keras": {"attention", "lstm", "gru"} | _NORMS}
"""Layers that compute in float32 in part (an epsilon, a softmax, an activation), whatever the type of their weights."""

PAIRS = 620
"""How many pairs of a layer and two frameworks there are in float32."""


@functools.cache
def results(dtype: str) -> dict[str, dict[str, Any]]:
    # Nearly all the time goes into compiling functions that run once.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick}
    command = [sys.executable, "-m", "tests.conversion.matrix", dtype]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_agree(dtype: str) -> None:
    wrong = []
    for case, pairs in results(dtype).items():
        for pair, found in pairs.items():
            if "refused" in found:
                # Its cell has no bias in the recurrent part of the candidate gate, and one that is not zero would be lost.
                assert case == "gru" and pair.endswith("-> nnx"), (case, pair, found)
                assert "not all 0, live object has no place for it" in found["refused"]
                continue
            assert found["unlike"] > 1e-2, f"{case} {pair}: the two were alike before: nothing would be seen"
            inside = any(case.partition(" ")[0] in FLOAT32_INSIDE.get(name, ()) for name in pair.split(" -> "))
            if not found["error"] <= (1e-6 if inside and dtype == "float64" else TOLERANCE[dtype]):
                wrong.append((case, pair, found["error"]))
    assert not wrong


def test_what_went_over_exactly_comes_back_bit_for_bit() -> None:
    found = [(case, pair, each) for case, pairs in results("float32").items() for pair, each in pairs.items()]
    assert not [(case, pair, each["back"]) for case, pair, each in found if each.get("back")]
    assert sum("back" in each for _, _, each in found) == PAIRS - 4


def test_all_pairs_are_there() -> None:
    assert sum(map(len, results("float32").values())) == PAIRS
