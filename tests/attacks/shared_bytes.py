"""Wants one tensor to change where another is written: two tensors of the manifest name the same bytes of a file."""

from __future__ import annotations

import copy
from pathlib import Path

import polyckpt
from tests.sealing import edit, save_small

REFUSED = r"copy: w of weights\.safetensors is the chunk of another one too"


def attack(directory: Path) -> None:
    path = save_small(directory / "c")
    edit(path, lambda raw: raw["tensors"]["weights"].update(copy=copy.deepcopy(raw["tensors"]["weights"]["w"])))
    polyckpt.inspect(path).verify()
