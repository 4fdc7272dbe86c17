"""Wants the victim's memory: shapes of many terabytes over a few bytes of data, in the manifest and in the tensor file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

import polyckpt
from tests.sealing import edit, restate, save_small

REFUSED = r"weights\.safetensors: w: |weights\.safetensors: its tensors end at byte"
HUGE = [1 << 40, 1]


def attack(directory: Path) -> None:
    path = save_small(directory / "c")
    entry = {"dtype": "F32", "shape": HUGE, "data_offsets": [0, 4 << 40]}
    header = json.dumps({"w": entry}).encode()
    (path / "weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"data")
    restate(path, "weights.safetensors")

    def inflate(raw: dict) -> None:
        tensor = raw["tensors"]["weights"]["w"]
        tensor["shape"] = tensor["chunks"][0]["shape"] = HUGE
        raw["tensors"]["weights"] = {"w": tensor}

    edit(path, inflate)
    polyckpt.load(path, {"w": np.zeros((3, 2), np.float32)}, verify=False)
