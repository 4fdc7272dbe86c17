"""The matrix run in a process of its own, and the document that shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tests.sealing import REPOSITORY

Outcome = dict[str, Any]

PAIRS = [f"{one} -> {other}" for one in ("torch", "keras", "optax") for other in ("torch", "keras", "optax") if one != other]
NONE = "-"


def measured(dtype: str, backend: str) -> list[Outcome]:
    """Every outcome of the matrix in one type, with Keras on one backend."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "tests.continuation.matrix", dtype, backend]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: list[Outcome] = json.loads(done.stdout)
    return found


def verdicts(outcomes: Sequence[Outcome], continuation: str) -> dict[tuple[str, str], str]:
    """Case and pair -> the verdict at the constant rate; of a changing one where that is another."""
    found: dict[tuple[str, str], str] = {}
    for each in outcomes:
        if each["continuation"] == continuation and each["rate"] == "constant":
            verdict = SHORT[each["verdict"]]
            before = found.setdefault((each["case"], each["pair"]), verdict)
            if before != verdict:  # a small epsilon may show in small gradients alone
                found[each["case"], each["pair"]] = SHORT["approximate"]
    return found


SHORT = {
    "exact": "exact",
    "exact with changed hyperparameter": "exact*",
    "exact while the learning rate stays": "exact+",
    "default": "slots anew",
    "approximate": "approximate",
    "refused": "refused",
}
"""Verdict of a report -> how the document has it."""


def document(outcomes: Sequence[Outcome]) -> str:
    """The tables in Markdown."""
    return "\n".join([_HEAD, *_table(outcomes, "stock"), _BETWEEN, *_table(outcomes, "exact"), ""])


def _table(outcomes: Sequence[Outcome], continuation: str) -> Iterator[str]:
    found = verdicts(outcomes, continuation)
    yield "| optimizer | " + " | ".join(PAIRS) + " |"
    yield "|---" * (len(PAIRS) + 1) + "|"
    for case in dict.fromkeys(each["case"] for each in outcomes):
        cells = []
        for pair in PAIRS:
            verdict = found.get((case, pair))
            cells.append(NONE if verdict is None else f"{verdict} {_sizes(outcomes, case, pair, continuation)}".strip())
        yield f"| {case} | " + " | ".join(cells) + " |"


def _sizes(outcomes: Sequence[Outcome], case: str, pair: str, continuation: str) -> str:
    """What was measured with gradients of 1 and 1e-3, relative to the way, where something differs."""
    sizes = [
        each["way"]
        for each in outcomes
        if (each["case"], each["pair"], each["continuation"], each["rate"]) == (case, pair, continuation, "constant")
    ]
    return " / ".join(f"{size:.0e}" for size in sizes) if max(sizes) > 1e-10 else ""


def read(text: str) -> list[dict[tuple[str, str], str]]:
    """The verdicts of the tables of a document, one mapping for each table."""
    tables: list[dict[tuple[str, str], str]] = []
    for line in text.splitlines():
        if not line.startswith("| ") or line.startswith("|---"):
            continue
        case, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if case == "optimizer":
            tables.append({})
            continue
        for pair, cell in zip(PAIRS, cells, strict=True):
            if cell != NONE:
                name = next(short for short in sorted(SHORT.values(), key=len, reverse=True) if cell.startswith(short))
                tables[-1][case, pair] = name
    return tables


_HEAD = """# How exactly training goes on in another framework

Written by `python benchmarks/continuation.py`. A small network is trained for 7 updates in one framework, saved, loaded into
another with a fresh optimizer of the same family, and trained there for 7 more on the same data; the weights are compared with
those of the run that stayed. All in float64 (Keras on JAX), with gradients of the size of 1 and of 1e-3.

* **exact**: the slots as they are, and the same hyperparameters.
* **exact\\***: exact with a changed hyperparameter or rescaled slots, which `load` sees to.
* **exact+**: exact while the learning rate stays; where it changes afterwards, `continuation="exact"` is.
* **approximate**: the optimizer of the other framework computes something else. The two numbers are the difference from the run
  that stayed, relative to the way that the weights went since the switch, with gradients of 1 / of 1e-3. The report
  predicts it.
* **-**: one of the two frameworks has no such optimizer.

Adafactor and Muon are exact up to what Keras and optax compute in float32 even here (1e-8 of the way). torch's Muon multiplies
matrices in bfloat16, so that what comes from it is approximate on any terms. Ftrl is Keras's alone, and not converted.

## With the stock optimizer, the default
"""

_BETWEEN = """
## With continuation="exact"
"""
