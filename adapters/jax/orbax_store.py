"""Tensors of a checkpoint written by Orbax, sharded ones shard by shard, as an item that Orbax alone restores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from polyckpt import names
from polyckpt.adapters.jax import trees
from polyckpt.dtypes import lookup
from polyckpt.errors import UnsupportedError
from polyckpt.formats.safetensors import leaf_of
from polyckpt.formats.writing import Source
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


def export(source: Source, target: Path) -> None:
    """Write live objects as an item: what `StandardCheckpointer().restore(target, template)` gives back to ones like them.

    Without them the weights of a checkpoint, as a nested dict. Raises UnsupportedError for what Orbax cannot hold.
    """
    if source.model is None:
        stored = source.checkpoint.weights.stored
        write(target, {tuple(names.split(name)): leaf_of(tensor) for name, tensor in stored.items()})
        return
    live = source.model if source.optimizer is None else {"model": source.model, "optimizer": source.optimizer}
    tree = jax.tree.map(_pure, live, is_leaf=trees.is_graph)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, tree)
    except (ValueError, TypeError) as error:
        raise UnsupportedError(f"Orbax cannot write these objects: {error}") from error


def _pure(value: Any) -> Any:
    """Objects of nnx as the state that they hold."""
    return trees.nnx().state(value) if trees.is_graph(value) else value


def _dtype(path: tuple[str, ...], leaf: Leaf) -> Any:
    return lookup(leaf.dtype, ".".join(path)).numpy
