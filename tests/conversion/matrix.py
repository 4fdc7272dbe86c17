"""Every case of the zoo from every framework to every other one, and back; prints what came of it as JSON.

Run as: python -m tests.conversion.matrix float32
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import warnings
from typing import Any

import jax
import keras
import numpy as np

import polyckpt
from polyckpt.moves import Exactness
from tests.conversion.zoo import CASES, FRAMEWORKS, Case, built


def main(dtype: str) -> None:
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
        keras.config.set_floatx("float64")
    results = {str(case): pairs(case, dtype) for case in CASES}
    sys.stdout.write(json.dumps(results))


def pairs(case: Case, dtype: str) -> dict[str, Any]:
    there = [name for name in FRAMEWORKS if built(name, case, dtype, 0) is not None]
    return {f"{one} -> {other}": outcome(case, one, other, dtype) for one, other in itertools.permutations(there, 2)}


def outcome(case: Case, one: str, other: str, dtype: str) -> dict[str, Any]:
    """error: of the other's output, relative. back: tensors that did not come back bit for bit. refused: why, if it was."""
    source, target, again = (built(name, case, dtype, seed) for seed, name in enumerate((one, other, one), 1))
    assert source and target and again
    batch = case.batch(np.random.default_rng(7), dtype)
    with tempfile.TemporaryDirectory() as directory:
        first = polyckpt.save(f"{directory}/first", source.model)
        unlike = relative(source.call(source.model, batch), target.call(target.model, batch))
        try:
            there = polyckpt.load(first, target.model)
        except polyckpt.MismatchError as error:
            return {"refused": str(error)}
        error = relative(source.call(source.model, batch), target.call(there.model, batch))
        if dtype != "float32":  # bits are bits in any type
            return {"error": error, "unlike": unlike}
        second = polyckpt.save(f"{directory}/second", there.model)
        third = polyckpt.save(f"{directory}/third", polyckpt.load(second, again.model).model)
        return {"error": error, "unlike": unlike, "back": changed(first, third, there.report)}


def changed(before: Any, after: Any, report: Any) -> list[str]:
    """What did not come back although it went over bit for bit."""
    rows = [(name, row.exactness is Exactness.EXACT) for row in report.rows for name in row.source.split(", ")]
    exact = {name for name, kept in rows if kept} - {name for name, kept in rows if not kept}
    one, other = polyckpt.inspect(before).weights, polyckpt.inspect(after).weights
    return [name for name in exact if one[name].tobytes() != other[name].tobytes()]


def relative(expected: np.ndarray, found: np.ndarray) -> float:
    assert expected.shape == found.shape and np.isfinite(found).all()
    return float(np.abs(expected - found).max() / np.abs(expected).max())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1])
