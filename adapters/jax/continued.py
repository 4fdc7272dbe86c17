"""A transformation for optax that goes on by the formulas of another framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from polyckpt import updates
from polyckpt.updates import Form


class ContinuedState(NamedTuple):
    """The state: completed updates, and one tree of the parameters for each slot that the family has."""

    count: Any
    first_moment: Any = None
    second_moment: Any = None
    max_second_moment: Any = None
    infinity_norm: Any = None
    momentum: Any = None
    momentum_product: Any = None
    squared_sum: Any = None
    squared_update: Any = None
    row_second_moment: Any = None
    column_second_moment: Any = None


class Transformation(NamedTuple):
    """What optax calls a GradientTransformation."""

    init: Callable[[Any], ContinuedState]
    update: Callable[..., tuple[Any, ContinuedState]]


MAKER = "continued"


def continued(learning_rate: Any, form: Form) -> Transformation:
    """A transformation of any family and convention of polyckpt.optimizers, as a continuation needs it.

    learning_rate: a number, or a function of the completed updates; it is applied here, since some momenta hold it.
    form: family, conventions and hyperparameters. Its place is the last in an optax.chain; clipping goes
    before it. `update` takes the parameters too, and returns what is to be added to them.

    >>> tx = continued(0.5, Form("sgd", {}, {}))
    >>> tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})[0]["w"].tolist()
    [-0.5, -0.5]
    """

    def rate(count: Any) -> Any:
        return learning_rate(count) if callable(learning_rate) else learning_rate

    def init(params: Any) -> ContinuedState:
        leaves, treedef = _flat(params)
        slots: dict[str, list[Any]] = {}
        for index, leaf in enumerate(leaves):
            for meaning, (shape, first) in updates.slots_of(form, leaf.shape).items():
                # A parameter that has no such slot holds its place, as in optax.
                slots.setdefault(meaning, [jnp.zeros(1, each.dtype) for each in leaves])[index] = jnp.full(
                    shape, first, leaf.dtype
                )
        return ContinuedState(jnp.zeros([], jnp.int32), **{meaning: treedef.unflatten(each) for meaning, each in slots.items()})

    def update(gradients: Any, state: ContinuedState, params: Any = None) -> tuple[Any, ContinuedState]:
        if params is None:
            raise ValueError("a continued transformation needs the parameters: tx.update(gradients, state, params)")
        weights, treedef = _flat(params)
        trees = {name: tree for name, tree in state._asdict().items() if name != "count" and tree is not None}
        held = {name: treedef.flatten_up_to(tree) for name, tree in trees.items()}
        count, changes = state.count + 1, []
        for index, (g, w) in enumerate(zip(treedef.flatten_up_to(gradients), weights, strict=True)):
            slots = {name: held[name][index] for name in updates.slots_of(form, w.shape)}
            t, lr = jnp.asarray(count, w.dtype), jnp.asarray(rate(state.count), w.dtype)
            after, changed = updates.update(form, jnp, g, w, slots, t, lr)
            changes.append((after - w).astype(w.dtype))
            for name, slot in slots.items():
                held[name][index] = changed[name].astype(slot.dtype)
        trees = {name: treedef.unflatten(each) for name, each in held.items()}
        return treedef.unflatten(changes), ContinuedState(count, **trees)

    return Transformation(init, update)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)
