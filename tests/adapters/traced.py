"""Tracing a model with an adapter, and all that was told."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyckpt.adapter import Adapter


class Log:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.outputs: list[tuple[str, np.ndarray]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def ran(self, path: str, output: np.ndarray) -> None:
        self.outputs.append((path, output))

    def flattened(self, path: str, shape: tuple[int, ...]) -> None:
        self.shapes[path] = shape

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.outputs]


def traced_by(adapter: Adapter, model: Any, *arguments: Any, apply: Any = None) -> tuple[list[np.ndarray], Log]:
    log = Log()
    return list(adapter.trace(model, arguments, log, apply)), log


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
