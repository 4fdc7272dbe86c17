"""Live JAX objects in a tree that lost its types: the contents of a file as if it had been saved from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyckpt.adapter import Contents, OptimizerCapture, StoredOptimizer
from polyckpt.adapters.jax import optimizers, trees
from polyckpt.errors import PolyckptError
from polyckpt.formats.described import Like
from polyckpt.formats.detyped import Tree, number
from polyckpt.formats.reading import ReadTensor
from polyckpt.leaves import Leaf
from polyckpt.residue import TensorRef


def contents_of(
    where: str, tree: Tree, weights: Mapping[str, Leaf], like: Like, left_out: list[str], more: Mapping[str, Any]
) -> Contents:
    """The contents of a tree that holds the model of `like`, with its optimizer and random states where they are there too."""
    described = like.captured
    kept = {name: dataclasses.replace(leaf, kind=described.weights[name].kind) for name, leaf in weights.items()}
    model = dataclasses.replace(described, weights=kept, rng=_filled(tree, described.rng, where))
    optimizer = None
    if like.optimizer is not None:
        try:
            optimizer = _optimizer(where, tree, like, left_out)
        except PolyckptError as error:
            left_out.append(f"optimizer: {error}")
    step = more.get("step")
    if step is None and optimizer is not None:
        step = optimizer.step
    return Contents(adapter="jax", model=model, optimizer=optimizer, left_out=left_out, **{**more, "step": step})


def _filled(tree: Tree, captured: Any, where: str) -> Any:
    """A captured tree with the leaves of a file in place of its own; None where they are not there."""
    if captured is None:
        return None
    names = {name: leaf.shape for name, leaf in captured["tensors"].items()} | dict.fromkeys(captured["values"], ())
    found = tree.find(names, where)
    if found is None:
        return None
    return {
        **captured,
        "tensors": {name: dataclasses.replace(found[name], kind=leaf.kind) for name, leaf in captured["tensors"].items()},
        "values": {name: type(value)(number(found[name])) for name, value in captured["values"].items()},
    }


def _optimizer(where: str, tree: Tree, like: Like, left_out: list[str]) -> OptimizerCapture | None:
    """The optimizer in the state of the file: a copy, filled and described, since the live one stays as it is."""
    copy = _copied(like.optimizer)
    captured = optimizers.capture(copy, like.captured)
    leaves = {
        (slot, parameter): optimizers.name_of(slot, parameter, captured)
        for slot, entries in captured.slots.items()
        for parameter in entries
    }
    wanted = {name: captured.slots[slot][parameter].shape for (slot, parameter), name in leaves.items()}
    found = tree.find(wanted, where)
    carried = captured.native["carried"]
    beside = _filled(tree, carried, where)
    if found is None or (carried is not None and beside is None):
        left_out.append("optimizer: the live one has another state than the file")
        return None
    slots: dict[str, dict[str, Any]] = {}
    for (slot, parameter), name in leaves.items():
        slots.setdefault(slot, {})[parameter] = ReadTensor(Path(where), name, found[name])
    if beside is not None:
        tensors = {name: ReadTensor(Path(where), name, leaf) for name, leaf in beside["tensors"].items()}
        beside = {**beside, "tensors": {name: TensorRef(tensor, tensor.numpy) for name, tensor in tensors.items()}}
    stored = StoredOptimizer(type=captured.type, slots=slots, native={**captured.native, "carried": beside})
    prepared = optimizers.prepare(copy, stored, lambda: like.captured, like.model)
    if prepared.problems:
        left_out.append(f"optimizer: {'; '.join(map(str, prepared.problems))}")
        return None
    return optimizers.capture(prepared.apply(), like.captured)


def _copied(optimizer: Any) -> Any:
    """An optimizer that can be written to: objects of nnx change in place, all else is made anew."""
    nnx = trees.nnx()
    return nnx.clone(optimizer) if nnx is not None and trees.is_graph(optimizer) else optimizer
