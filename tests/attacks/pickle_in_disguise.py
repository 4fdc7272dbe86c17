"""Wants code to run: every file of a checkpoint in turn is a pickle, or holds one where a value stands."""

from __future__ import annotations

import base64
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt
from tests.sealing import edit, restate, save_small

REFUSED = r"every file of it was refused"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def attack(directory: Path) -> None:
    code = pickle.dumps(Payload(directory / "ran"))
    live = {"model": {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2)}, "optimizer": {"m": np.zeros(3)}, "extra": {"k": []}}
    refused = []
    for file in ("manifest.json", "weights.safetensors", "optimizer.safetensors", "state.safetensors"):
        path = save_small(directory / file)
        (path / file).write_bytes(code)
        if file != "manifest.json":
            restate(path, file)
        refused.append(_refused(path, live))
    path = save_small(directory / "constant")
    constants = [{"$constant": "O", "kind": "numpy.dtype"}, {"$constant": ["os.mkdir", "ran"], "kind": "numpy.object"}]
    for constant in constants:
        edit(path, lambda raw, constant=constant: raw["native"]["extra"]["k"].update(state=constant))
        refused.append(_refused(path, live))
    # As bytes it is a value like any other, which comes back as bytes.
    edit(path, lambda raw: raw["native"]["extra"]["k"].update(state={"$bytes": base64.b64encode(code).decode()}))
    assert polyckpt.load(path, **live).extra["k"] == code
    if all(refused):
        raise polyckpt.CorruptError("every file of it was refused")


def _refused(path: Path, live: dict[str, Any]) -> bool:
    try:
        polyckpt.load(path, **live)
    except polyckpt.PolyckptError:
        return True
    return False


def harm(directory: Path) -> str | None:
    return "code was run" if (directory / "ran").exists() else None
