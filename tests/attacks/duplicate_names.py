"""Wants to show a reviewer one checkpoint and load another: a name stands twice in the manifest, and which counts differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import polyckpt
from polyckpt.checksums import checksum
from tests.sealing import save_small

REFUSED = r"manifest\.json: the name 'learning_rate' occurs twice in one object"


def attack(directory: Path) -> None:
    path = save_small(directory / "c")
    text = (path / "manifest.json").read_bytes()
    body = text[: text.rindex(b',\n  "checksum"')].replace(
        b'\n  "learning_rate"', b'\n  "learning_rate": 9,\n  "learning_rate"'
    )
    (path / "manifest.json").write_bytes(body + b',\n  "checksum": "' + checksum(body).encode() + b'"\n}\n')
    polyckpt.load(path, {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2)}, {"m": np.zeros(3)})
