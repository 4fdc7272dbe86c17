"""What the cases of JAX share: the arrays of any pytree by name, and a run made of one jitted function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt


def leaves(**trees: Any) -> dict[str, Any]:
    """Every array and number of the trees, keys as their data."""
    import jax

    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            found[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


class Functional:
    """model, optimizer state and key through `update(model, optimizer, key) -> (model, optimizer, key, loss)`."""

    def __init__(self, model: Any, optimizer: Any, key: Any, update: Callable[..., Any]) -> None:
        self.model, self.optimizer, self.key, self.update = model, optimizer, key, update

    def step(self) -> float:
        self.model, self.optimizer, self.key, loss = self.update(self.model, self.optimizer, self.key)
        return float(loss)

    def save(self, path: Path) -> None:
        polyckpt.save(path, self.model, self.optimizer, extra={"key": self.key})

    def load(self, path: Path) -> None:
        restored = polyckpt.load(path, self.model, self.optimizer, extra={"key": self.key})
        self.model, self.optimizer, self.key = restored.model, restored.optimizer, restored.extra["key"]

    def state(self) -> dict[str, Any]:
        return leaves(model=self.model, optimizer=self.optimizer, key=self.key)
