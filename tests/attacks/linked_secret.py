"""Wants bytes that only the victim may read, where what is converted goes back to the attacker: a tensor file is a link."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import polyckpt
from tests.sealing import save_small

REFUSED = r"weights\.safetensors: its header claims [0-9]+ bytes"


def attack(directory: Path) -> None:
    path = save_small(directory / "c")
    file = path / "weights.safetensors"
    secret = directory / "secret"  # of the size that the manifest states: the attacker may know that
    secret.write_bytes(b"-----BEGIN PRIVATE KEY-----".ljust(file.stat().st_size, b"x"))
    file.unlink()
    file.symlink_to(secret)
    polyckpt.load(path, {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2)}, verify=False)
