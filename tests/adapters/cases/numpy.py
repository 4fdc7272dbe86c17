"""Training without any framework: dicts of NumPy arrays, updated in place."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt


class _Momentum:
    def __init__(self, seed: int, dtype: str) -> None:
        random.seed(seed)
        np.random.seed(seed)
        self.generator = np.random.Generator(np.random.Philox(seed))
        self.params = {
            "dense": {"w": np.random.randn(5, 3).astype(dtype), "b": np.random.randn(3).astype(dtype)},
            "scales": [np.asarray(np.random.rand(), dtype), np.random.randn(2, 0).astype(dtype)],
        }
        self.slots = {"m": {"w": np.zeros((5, 3), dtype), "b": np.zeros(3, dtype)}, "t": 0}

    def step(self) -> float:
        x = np.random.randn(7, 5).astype(self.params["dense"]["w"].dtype)
        x *= random.random() + self.generator.random()
        y = x @ self.params["dense"]["w"] + self.params["dense"]["b"]
        gradient = {"w": x.T @ y, "b": y.sum(0)}
        self.slots["t"] += 1
        for name, g in gradient.items():
            self.slots["m"][name] = 0.9 * self.slots["m"][name] + g
            self.params["dense"][name] -= 1e-3 / self.slots["t"] * self.slots["m"][name]
        return float((y * y).sum())

    def save(self, path: Path) -> None:
        polyckpt.save(path, self.params, self.slots, extra={"generator": self.generator})

    def load(self, path: Path) -> None:
        restored = polyckpt.load(path, self.params, self.slots, extra={"generator": self.generator})
        self.params, self.slots = restored.model, restored.optimizer

    def state(self) -> dict[str, Any]:
        return {
            **self.params["dense"],
            "scale": self.params["scales"][0],
            **{f"m_{name}": m for name, m in self.slots["m"].items()},
            "t": np.asarray(self.slots["t"]),
            "numpy": np.random.get_state()[1],
            "python": np.asarray(random.getstate()[1]),
            "generator": self.generator.bit_generator.state["state"]["counter"],
        }


CASES = {
    "float32": lambda seed: _Momentum(seed, "float32"),
    "float64": lambda seed: _Momentum(seed, "float64"),
}
