"""Running a model of any JAX library on a batch, and telling what each of its described layers made.

Modules of nnx and Equinox are copied, and the described ones of the copy become instances of a subclass whose calls are
seen. Those of linen and Haiku are intercepted.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polyckpt import names
from polyckpt.adapter import Recorder, running, uncallable
from polyckpt.adapters.jax import calls, intercepting, layers, marks, trees
from polyckpt.adapters.jax.calls import Seen
from polyckpt.schema import Layer

Described = Mapping[str, tuple[Any, Layer]]


def trace(
    model: Any, tree: Any, arguments: tuple[Any, ...], recorder: Recorder, apply: Callable[..., Any] | None
) -> Sequence[np.ndarray]:
    """As Adapter.trace says. tree: what of `model` is described (a train state holds an optimizer too)."""
    arrays = jax.tree.map(jnp.asarray, arguments)

    def run(*arrays: Any) -> list[Any]:
        return _run(model, tree, arrays, apply)

    with running():
        with marks.watching(recorder):
            outputs = run(*arrays)
        for path, shape in _flattened(run, arrays).items():
            recorder.flattened(path, shape)
    return [marks.host(leaf) for leaf in outputs if calls.is_array(leaf)]


def _flattened(run: Callable[..., Any], arrays: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    try:
        return marks.flattened(run, arrays)
    except Exception:
        # A model that decides by values can be run, but its operations cannot be written down beforehand.
        return {}


def _run(model: Any, tree: Any, arrays: tuple[Any, ...], apply: Callable[..., Any] | None) -> list[Any]:
    """The outputs of a fresh copy of the model whose layers are seen."""
    copied, described = _copy(model, tree)
    with ExitStack() as stack:
        stack.enter_context(calls.seen())
        for interceptor in intercepting.interceptors(described):
            stack.enter_context(interceptor)
        outputs = _call(copied, arrays) if apply is None else apply(copied, *arrays)
    # The running statistics that Equinox hands back are no outputs.
    return [leaf for leaf in jax.tree.leaves(outputs, is_leaf=trees.is_state) if not trees.is_state(leaf)]


def _call(model: Any, arrays: tuple[Any, ...]) -> Any:
    """A model that is called by itself. Those of Equinox are written for one example, and mapped over the leading axis."""
    if trees.is_graph(model) and callable(model):
        return model(*arrays)
    state = None
    if isinstance(model, tuple) and len(model) == 2 and trees.is_state(model[1]):
        model, state = model
    if not callable(model):
        raise uncallable(model)
    parameters = inspect.signature(model).parameters
    given: dict[str, Any] = {} if state is None else {"state": state}
    if "key" in parameters and parameters["key"].default is inspect.Parameter.empty:
        given["key"] = None

    def one(*example: Any) -> Any:
        outputs = model(*example, **given)
        # In inference a state stays as it is.
        return outputs if state is None else outputs[0]

    return jax.vmap(one)(*arrays)


# Copies of modules


def _copy(model: Any, tree: Any) -> tuple[Any, Described]:
    """A copy for inference, which shares nothing that can change with the model, and what is described of it."""
    described = layers.nodes(tree)
    if trees.graphs(model):
        copied = trees.nnx().clone(model)
        _watch_graphs(model, copied, described)
        return copied, described
    copied = jax.tree.map(lambda leaf: leaf, model)
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return copied, described
    modules = {path: layer for path, (node, layer) in described.items() if isinstance(node, equinox.Module)}
    return (_watched_modules(equinox.nn.inference_mode(copied), (), modules) if modules else copied), described


def _watch_graphs(model: Any, copied: Any, described: Described) -> None:
    nnx = trees.nnx()
    seen = {id(node): Seen(layer.path, layer.kind, last=True) for node, layer in described.values()}
    # Both are walked in one order, which is not that of definition.
    for (_, node), (_, copy) in list(zip(nnx.iter_graph(model), nnx.iter_graph(copied), strict=True)):
        if not isinstance(node, nnx.Module):
            continue
        copy.eval()
        if isinstance(node, nnx.RNN) or (id(node) in seen and callable(node)):
            _become_watched(copy, seen.get(id(node)))


def _become_watched(node: Any, layer: Seen | None) -> None:
    kind: Any = type(node)
    node.__class__ = _watched(kind)
    node.polyckpt_layer = layer


def _watched_modules(node: Any, path: tuple[Any, ...], modules: Mapping[str, Layer]) -> Any:
    """The tree with the modules at the paths in `modules` as watched ones."""
    if not trees.is_node(node) or trees.is_state(node):
        return node
    structure = jax.tree_util.tree_structure(node, is_leaf=lambda value: value is not node)
    below = [_watched_modules(child, (*path, segment), modules) for segment, child in trees.children(node)]
    made = jax.tree.unflatten(structure, below)
    if (layer := modules.get(names.join(path))) is not None and callable(made):
        object.__setattr__(made, "polyckpt_layer", Seen(layer.path, layer.kind))
        kind: Any = type(made)
        object.__setattr__(made, "__class__", _watched_equinox(kind))
    return made


def _members(kind: Any) -> dict[str, Any]:
    """Those of a subclass of `kind` that looks like it, and whose calls are seen."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        function = functools.partial(kind.__call__, self)
        if self.polyckpt_layer is None:
            return calls.unroll(function, arguments, keywords)
        return calls.call(self.polyckpt_layer, function, arguments, keywords)

    return {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}


@functools.cache
def _watched(kind: Any) -> Any:
    return type(kind)(kind.__name__, (kind,), _members(kind))


@functools.cache
def _watched_equinox(kind: Any) -> Any:
    # A static field goes along wherever JAX takes a module apart.
    field = sys.modules["equinox"].field(static=True, default=None)
    members = {**_members(kind), "__annotations__": {"polyckpt_layer": Any}, "polyckpt_layer": field}
    return type(kind)(kind.__name__, (kind,), members)
