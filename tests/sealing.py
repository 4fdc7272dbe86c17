"""Manifests made and unmade by hand: a checkpoint's JSON changed and sealed again, as an attacker would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt
from polyckpt.checksums import checksum
from polyckpt.schema import TensorFile
from polyckpt.storage import tensor_file

REPOSITORY = Path(__file__).parents[1]


def seal(members: dict[str, Any]) -> bytes:
    """The sealed bytes of any JSON object, valid manifest or not."""
    members = {key: value for key, value in members.items() if key != "checksum"}
    body = json.dumps(members, indent=2, ensure_ascii=False).removesuffix("\n}").encode("utf-8", "surrogatepass")
    return body + b',\n  "checksum": "' + checksum(body).encode() + b'"\n}\n'


def members(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint as plain JSON."""
    return json.loads((path / "manifest.json").read_bytes())


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's manifest and seal it again."""
    raw = members(path)
    change(raw)
    (path / "manifest.json").write_bytes(seal(raw))


def restate(path: Path, file: str) -> None:
    """Make the manifest agree with the bytes of a tensor file, whatever they are."""
    data = (path / file).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    edit(path, lambda raw: raw["files"].update({file: {"size_bytes": len(data), "header_checksum": checksum(data[:length])}}))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> tuple[TensorFile, dict[str, str]]:
    """A tensor file of NumPy arrays: its entry and the checksums."""
    from polyckpt.leaves import array_leaf

    written = tensor_file.write(path, {name: array_leaf(array) for name, array in arrays.items()}, {})
    return written.entry, written.checksums


def run_python(code: str, *arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """A new Python process that runs `code`; the caller judges how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def save_small(path: Path, value: float = 1.0, **more: Any) -> Path:
    """A checkpoint with every section filled; `value` fills its arrays."""
    model = {"w": np.full((3, 2), value, np.float32), "b": np.full(2, value, np.float64)}
    return polyckpt.save(path, model, {"m": np.full(3, value)}, step=7, metrics={"loss": value}, extra={"k": [value]}, **more)
