"""Live JAX objects in a tree that lost its types: the contents of a file as if it had been saved from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from polyckpt.adapter import Contents, ModelCapture, OptimizerCapture, StoredOptimizer
from polyckpt.adapters.jax import optimizers, trees
from polyckpt.dtypes import lookup
from polyckpt.errors import PolyckptError
from polyckpt.formats.described import Like
from polyckpt.formats.detyped import Found, Tree, number
from polyckpt.formats.reading import ReadTensor
from polyckpt.leaves import Leaf
from polyckpt.residue import TensorRef


def contents_of(
    where: str,
    tree: Tree,
    weights: Found,
    like: Like,
    left_out: list[str],
    more: Mapping[str, Any],
    counted: int | None,
) -> Contents:
    """The contents of a tree that holds the model of `like`, with its optimizer and random states where they are there too.

    counted: how many updates there were, for the step of a train state that was saved without it.
    """
    model = _filled_model(tree, weights, like.captured)
    model = dataclasses.replace(model, rng=_filled(tree, like.captured.rng, where))
    optimizer = None
    if like.optimizer is not None:
        try:
            optimizer = _optimizer(where, tree, like, left_out, counted)
        except PolyckptError as error:
            left_out.append(f"optimizer: {error}")
    step = more.get("step")
    if step is None and optimizer is not None:
        step = optimizer.step
    return Contents(adapter="jax", model=model, optimizer=optimizer, left_out=left_out, **{**more, "step": step})


def _filled_model(tree: Tree, weights: Found, described: ModelCapture) -> ModelCapture:
    """The capture of a live model with what a file holds in place of its own."""
    kept = {
        name: _leaf_for(described.weights[name], leaf) if name in described.weights else leaf
        for name, leaf in weights.leaves.items()
    }
    values: dict[str, Any] = {}
    for name, value in described.native["values"].items():
        if name in kept and (found := value_like(value, kept[name])) is not None:
            values[name] = found
            del kept[name]  # one of another type stays a tensor, which does not fit
        elif isinstance(value, str) and (text := tree.texts.get(weights.prefix + name)) is not None:
            values[name] = text
    return dataclasses.replace(described, weights=kept, native={**described.native, "values": values})


_WIDEST = frozenset({"int64", "float64"})


def _leaf_for(live: Leaf, leaf: Leaf) -> Leaf:
    """A leaf of a file for the place of a live one.

    A number of Python is written with 64 bits, and is an array of fewer where a jitted step or jax.eval_shape made the live
    one; it is narrowed where it stays the same number.
    """
    if not leaf.shape and leaf.dtype in _WIDEST and live.dtype != leaf.dtype:
        value, dtype = leaf.read().reshape(()), lookup(live.dtype, "").numpy
        if dtype.kind == value.dtype.kind and (narrow := value.astype(dtype)) == value:
            return Leaf(dtype=live.dtype, shape=(), read=lambda: narrow, kind=live.kind, frozen=True)
    return structs.replace(leaf, kind=live.kind)


def value_like(value: Any, leaf: Leaf) -> Any:
    """The number in a leaf as one of the Python type that `value` has; None where it is not of that kind."""
    kind = _KINDS.get(type(value))
    found = number(leaf) if kind and not leaf.shape and np.issubdtype(lookup(leaf.dtype, "").numpy, kind) else None
    return None if found is None else type(value)(found)


_STEP = "step"
_KINDS: dict[type, Any] = {bool: np.bool_, int: np.integer, float: np.floating, complex: np.complexfloating}


def _filled(tree: Tree, captured: Any, where: str) -> Any:
    """A captured tree with the leaves of a file in place of its own; None where they are not there."""
    if captured is None:
        return None
    names = {name: leaf.shape for name, leaf in captured["tensors"].items()} | dict.fromkeys(captured["values"], ())
    found = tree.find(names, where)
    if found is None:
        return None
    leaves = found.leaves
    return {
        **captured,
        "tensors": {name: _leaf_for(leaf, leaves[name]) for name, leaf in captured["tensors"].items()},
        "values": {name: type(value)(number(leaves[name])) for name, value in captured["values"].items()},
    }


def _optimizer(where: str, tree: Tree, like: Like, left_out: list[str], counted: int | None) -> OptimizerCapture | None:
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
    beside = _filled(tree, carried, where) or _counted(carried, counted)
    if found is None or (carried is not None and beside is None):
        absent = [name for name in wanted if not any(each.endswith(name) for each in tree.leaves)]
        told = f"no {', '.join(absent[:3])}" if absent else "other shapes or steps"
        left_out.append(f"optimizer: {told} in its state, unlike the live one")
        return None
    slots: dict[str, dict[str, Any]] = {}
    for (slot, parameter), name in leaves.items():
        leaf = _leaf_for(captured.slots[slot][parameter], found.leaves[name])
        slots.setdefault(slot, {})[parameter] = ReadTensor(Path(where), name, leaf)
    if beside is not None:
        tensors = {name: ReadTensor(Path(where), name, leaf) for name, leaf in beside["tensors"].items()}
        beside = {**beside, "tensors": {name: TensorRef(tensor, tensor.numpy) for name, tensor in tensors.items()}}
    stored = StoredOptimizer(type=captured.type, slots=slots, native={**captured.native, "carried": beside})
    prepared = optimizers.prepare(copy, stored, lambda: like.captured, like.model)
    if prepared.problems:
        left_out.append(f"optimizer: {'; '.join(map(str, prepared.problems))}")
        return None
    return optimizers.capture(prepared.apply(), like.captured)


def _counted(carried: Any, step: int | None) -> Any:
    """What a train state has beside the state of its optimizer, where that is its step alone and the file lacks it."""
    if carried is None or step is None or {*carried["tensors"], *carried["values"]} != {_STEP}:
        return None
    if _STEP in carried["values"]:
        return {**carried, "values": {_STEP: step}}
    live = carried["tensors"][_STEP]
    array = np.full(live.shape, step, lookup(live.dtype, _STEP).numpy)
    return {**carried, "tensors": {_STEP: Leaf(live.dtype, live.shape, lambda: array, kind=live.kind, frozen=True)}}


def _copied(optimizer: Any) -> Any:
    """An optimizer that can be written to: objects of nnx change in place, all else is made anew."""
    nnx = trees.nnx()
    return nnx.clone(optimizer) if nnx is not None and trees.is_graph(optimizer) else optimizer
