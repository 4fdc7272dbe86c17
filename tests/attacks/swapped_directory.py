"""Wants a mixture loaded: after the manifest was read the directory is another one, and before it is looked at again the first.

The files of both have the same names, sizes and headers, so that only the checksums of the values differ.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt
from polyckpt import checkpoint
from tests.sealing import save_small

REFUSED = r"\w+\.safetensors: \S+: the manifest says .* they changed after they were written"


def attack(directory: Path) -> None:
    path, other = save_small(directory / "c", 1.0), save_small(directory / "other", 2.0)
    real = checkpoint.TensorFileReader

    def swapped(*arguments: Any) -> Any:
        before = os.stat(path)
        os.rename(path, directory / "first")
        os.rename(other, path)
        opened = real(*arguments)
        os.rename(path, other)
        os.rename(directory / "first", path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return opened

    checkpoint.TensorFileReader = swapped  # type: ignore[misc, assignment]
    polyckpt.load(path, {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2)}, {"m": np.zeros(3)})
