"""Disks that change bits: ``python -m tests.faults.rot [--every N] [--random N]``.

Every N-th bit (by default each) of every file of a small checkpoint, and N bits at random (by default 10,000) of one of some
megabytes, are changed one at a time, and the checkpoint is loaded. Writes JSON: how often it was refused. Fails where a load
gives another value, or an error does not say where.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import polyckpt
from polyckpt.errors import CorruptError, NotACheckpointError, VersionError


class Rotting:
    """A checkpoint whose bits change one at a time. model, optimizer, extra: what it holds."""

    def __init__(self, path: Path, model: Any, optimizer: Any, extra: dict[str, Any]) -> None:
        self.live = {"model": model, "optimizer": optimizer, "extra": extra}
        self.path = polyckpt.save(path, **self.live, epoch=2, step=7, metrics={"loss": 0.5}, lr=0.1)
        self.sizes = {file.name: file.stat().st_size for file in sorted(self.path.iterdir())}
        self.values = self.load()
        self.tensors = list(self._tensors())

    def load(self) -> str:
        """All that a load gives, as text that differs where any of it does."""
        restored = polyckpt.load(self.path, **self.live, rng=True)
        states = (np.random.get_state()[1].tobytes(), random.getstate())
        progress = (restored.epoch, restored.step, restored.metrics, restored.lr)
        return repr((flat(restored.model), flat(restored.optimizer), flat(restored.extra), states, progress))

    def _tensors(self) -> Iterator[tuple[str, int, int, str]]:
        checkpoint = polyckpt.inspect(self.path)
        for section in ("weights", "optimizer", "state"):
            for name, tensor in getattr(checkpoint, section).stored.items():
                for chunk in tensor._tensor.chunks:
                    start, end = checkpoint._files.reader(chunk.file).span(chunk.key)
                    yield chunk.file, start, end, name

    def flip(self, file: str, bit: int) -> str:
        """What a load says where that bit is another: "refused", or "the same values"."""
        descriptor = os.open(self.path / file, os.O_RDWR)
        try:
            byte = os.pread(descriptor, 1, bit // 8)
            os.pwrite(descriptor, bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
            try:
                values = self.load()
            except (CorruptError, VersionError, NotACheckpointError) as error:
                self.check(str(error), file, bit // 8)
                return "refused"
            finally:
                os.pwrite(descriptor, byte, bit // 8)
        finally:
            os.close(descriptor)
        assert values == self.values, f"{file}: bit {bit}: a wrong value was loaded"
        return "the same values"

    def check(self, message: str, file: str, byte: int) -> None:
        """An error names the file, and for a byte of a tensor the tensor and its place."""
        assert str(self.path / file) in message, (file, byte, message)
        names = [name for where, start, end, name in self.tensors if where == file and start <= byte < end]
        if names:
            place = re.search(r"bytes ([0-9]+) to ([0-9]+) have", message)
            assert place and int(place[1]) <= byte < int(place[2]), (file, byte, message)
            assert any(f"{file}: {name}: " in message for name in names), (file, byte, names, message)

    def bits(self) -> list[tuple[str, int]]:
        return [(file, bit) for file, size_bytes in self.sizes.items() for bit in range(8 * size_bytes)]


def flat(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: flat(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [flat(value) for value in tree]
    if isinstance(tree, np.ndarray):
        return (tree.dtype.name, tree.shape, tree.tobytes())
    return tree


def small(path: Path) -> Rotting:
    """All sections, tied tensors, types of every size, one without elements, values in the manifest."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(3, 2))
    model = {
        "tied": shared,
        "again": shared,
        "half": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "quarter": np.arange(5).astype(ml_dtypes.int4),
        "complex": rng.normal(size=2) + 1j,
        "flags": np.array([True, False, True]),
        "none": np.zeros((0, 4), np.float32),
        "number": np.float32(3),
    }
    optimizer = {"m": rng.normal(size=(3, 2)).astype(np.float32), "count": np.int64(7)}
    extra = {"epochs": [1, 2.5, None, "text"], "ema": {"w": rng.normal(size=4)}, "seen": {3: (1, b"bytes")}}
    return Rotting(path, model, optimizer, extra)


def large(path: Path) -> Rotting:
    rng = np.random.default_rng(1)
    model = {f"layer{index}": rng.normal(size=(100 + index, 300)).astype(np.float32) for index in range(20)}
    return Rotting(path, model, {"m": rng.normal(size=(211, 307))}, {})


def count(rotting: Rotting, bits: Iterable[tuple[str, int]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for file, bit in bits:
        found["bits"] += 1
        found[rotting.flip(file, bit)] += 1
    return found


def survey(directory: Path, every: int, at_random: int, seed: int) -> dict[str, Counter[str]]:
    """What came of the bits of a small and of a large checkpoint."""
    rng = random.Random(seed)
    one, other = small(directory / "small"), large(directory / "large")
    bits = one.bits()[rng.randrange(every) :: every]
    total = sum(other.sizes.values())
    starts = np.cumsum([0, *other.sizes.values()])
    files = list(other.sizes)
    chosen = []
    for byte in (rng.randrange(total) for _ in range(at_random)):
        index = int(np.searchsorted(starts, byte, side="right")) - 1
        chosen.append((files[index], 8 * (byte - int(starts[index])) + rng.randrange(8)))
    return {"small": count(one, bits), "large": count(other, chosen)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults.rot", description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--random", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        json.dump(survey(Path(directory), given.every, given.random, given.seed), sys.stdout)
    sys.stdout.write("\n")
