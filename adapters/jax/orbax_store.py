"""Tensors of a checkpoint written by Orbax, sharded ones shard by shard, as an item that Orbax alone restores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from polyckpt.dtypes import lookup
from polyckpt.errors import UnsupportedError
from polyckpt.leaves import Leaf


def write(target: Path, tensors: Mapping[tuple[str, ...], Leaf]) -> None:
    """Write tensors by path as the item `target`, a nested dict: `StandardCheckpointer().restore(target)` gives it back.

    Raises UnsupportedError for what Orbax cannot hold.
    """
    tree: dict[str, Any] = {}
    for path, leaf in tensors.items():
        node = tree
        for segment in path[:-1]:
            node = node.setdefault(segment, {})
        node[path[-1]] = leaf.live if leaf.live is not None else leaf.read().view(_dtype(path, leaf)).reshape(leaf.shape)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, tree)
    except (ValueError, TypeError) as error:
        raise UnsupportedError(f"Orbax cannot write these tensors: {error}") from error


def _dtype(path: tuple[str, ...], leaf: Leaf) -> Any:
    return lookup(leaf.dtype, ".".join(path)).numpy
