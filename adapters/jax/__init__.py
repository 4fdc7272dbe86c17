"""The adapter for JAX: pytrees (Flax linen, Equinox, Haiku, plain), nnx objects, train states and optax states.

Pytrees come back as new values in the structure of a template; nnx objects are updated in place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jaxlib.version
import numpy as np

from polyckpt.adapter import (
    NO_OPTIMIZER,
    Continuation,
    ModelCapture,
    OptimizerCapture,
    Parts,
    Recorder,
    Restore,
    Schedule,
    StoredModel,
    StoredOptimizer,
    another_kind,
)
from polyckpt.adapters.jax import arrays, layers, optimizers, tracing, trees
from polyckpt.adapters.jax.optimizers import Carried
from polyckpt.checkpoint import StoredTensor
from polyckpt.errors import MismatchError, Problem, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.names import type_name
from polyckpt.residue import Constant

_PYTREE = "pytree"
_NNX = "nnx"
_BUILTIN = (dict, list, tuple)


class JaxAdapter:
    """JAX and the libraries on it. Only JAX is imported; the others are used where one of their objects arrives."""

    name: ClassVar[str] = "jax"

    def versions(self) -> dict[str, str]:
        libraries = {name: sys.modules.get(name) for name in ("flax", "optax", "equinox", "haiku")}
        return {
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            **{name: module.__version__ for name, module in libraries.items() if module},
        }

    def recognises(self, value: Any) -> bool:
        return trees.is_node(value)

    def parts(self, model: Any, optimizer: Any | None, tx: Any = None) -> Parts:
        if _is_train_state(model):
            return _train_state_parts(model, optimizer)
        if optimizer is None or optimizer is NO_OPTIMIZER:
            return Parts(model=model, optimizer=None)
        if tx is None:
            return Parts(model=model, optimizer=optimizer)
        return Parts(
            model=model,
            optimizer=Carried(optimizer, None, lambda: tx),
            join=lambda model, restored: (model, restored and restored.opt_state),
            tx=lambda restored: restored.tx(),
        )

    def capture_model(self, model: Any) -> ModelCapture:
        found = trees.entries(model, "model")
        random = {name: entry for name, entry in found.items() if trees.is_random(entry)}
        weights, native = trees.capture({name: entry for name, entry in found.items() if name not in random}, "model")
        described, order = layers.describe(model, weights)
        return ModelCapture(
            type=type_name(model),
            weights=weights,
            layers=described,
            order=order,
            parameters=[(name, found[name].value) for name in weights if _is_parameter(found[name])],
            native=native,
            rng=trees.as_tree(random, "model") if random else None,
        )

    def capture_optimizer(self, optimizer: Any, model: ModelCapture) -> OptimizerCapture:
        return optimizers.capture(optimizer, model)

    def prepare_model(self, model: Any, stored: StoredModel, *, rng: bool) -> Restore:
        found = trees.entries(model, "model")
        random = {name: entry for name, entry in found.items() if trees.is_random(entry)}
        others = {name: entry for name, entry in found.items() if name not in random}
        native = arrays.NOTHING_BESIDE if stored.native is None else stored.native
        comparisons = [trees.compare(others, arrays.stored_leaves(stored.weights, native, "weights"), "weights")]
        # An abstract random state has nothing to go on with.
        if rng or any(isinstance(entry.value, jax.ShapeDtypeStruct) for entry in random.values()):
            comparisons.append(trees.compare(random, trees.from_tree(stored.rng, "rng"), "rng"))
        return trees.restore(model, comparisons)

    def parameters(self, model: Any) -> Sequence[tuple[str, Any]]:
        return [(name, entry.value) for name, entry in trees.entries(model, "model").items() if _is_parameter(entry)]

    def prepare_optimizer(
        self, optimizer: Any, stored: StoredOptimizer, parameters: Sequence[tuple[str, Any]], model: Any
    ) -> Restore:
        return optimizers.prepare(optimizer, stored, lambda: self.capture_model(model), model)

    def continue_optimizer(self, optimizer: Any, continuation: Continuation, captured: ModelCapture, model: Any) -> Restore:
        return optimizers.continue_(optimizer, continuation, captured, model)

    def schedule(self, value: Any) -> Schedule | None:
        return None

    def capture_object(self, value: Any) -> tuple[str, Any] | None:
        trees.check_depth(value, "extra")
        if trees.is_graph(value):
            return _NNX, trees.as_tree(trees.entries(value, "extra"), "extra")
        return (_PYTREE, trees.as_tree(trees.entries(value, "extra"), "extra")) if _has_structure(value) else None

    def prepare_object(self, value: Any, kind: str, tree: Any, *, path: str) -> Restore:
        live = _NNX if trees.is_graph(value) else _PYTREE
        if live != kind:
            return another_kind(value, kind, path)
        return trees.restore(value, [trees.compare(trees.entries(value, path), trees.from_tree(tree, path), path)])

    def capture_rng(self) -> Any:
        return None

    def prepare_rng(self, tree: Any) -> Restore:
        return Restore(apply=lambda: None)

    def trace(
        self, model: Any, arguments: tuple[Any, ...], recorder: Recorder, apply: Callable[..., Any] | None
    ) -> Sequence[np.ndarray]:
        return tracing.trace(model, self.parts(model, NO_OPTIMIZER).model, arguments, recorder, apply)

    def leaf(self, value: Any) -> Leaf | Constant | None:
        if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            return arrays.leaf(value, "an array")
        return None

    def tensor(self, stored: StoredTensor, kind: str) -> Any:
        if arrays.narrows(stored):
            problem = Problem("dtype", "state", stored.name, stored=str(stored), live="32 bits (jax_enable_x64 is off)")
            raise MismatchError("JAX would truncate a stored array. Set jax_enable_x64 to load it:", [problem])
        impl = kind.removeprefix("jax.key:") if kind.startswith("jax.key:") else None
        try:
            return arrays.placed(stored.numpy(), impl=impl, weak=kind == "jax.weak")
        except (TypeError, ValueError) as error:
            raise UnsupportedError(f"{stored.name}: JAX cannot make a {kind} of {stored}: {error}") from error

    def constant(self, value: Any, kind: str) -> Any:
        raise ValueError(f"{kind!r} is no constant of JAX")


def _train_state_parts(state: Any, optimizer: Any | None) -> Parts:
    """The optimizer of a train state is its opt_state and step; what else it holds is the model."""
    carried = None
    if optimizer is not NO_OPTIMIZER:
        carried = Carried(state.opt_state if optimizer is None else optimizer, state.step, lambda: state.tx)

    def join(model: Any, restored: Carried | None) -> tuple[Any, Any]:
        if restored is None:
            return model.replace(opt_state=state.opt_state, step=state.step), None
        whole = model.replace(opt_state=restored.opt_state, step=restored.step, tx=restored.tx())
        return whole, restored.opt_state

    return Parts(model=state.replace(opt_state=None, step=None), optimizer=carried, join=join)


def _is_train_state(value: Any) -> bool:
    """Whether `value` is a TrainState of flax.training or of nnx."""
    modules = (sys.modules.get("flax.training.train_state"), trees.nnx())
    return isinstance(value, tuple(module.TrainState for module in modules if module is not None))


def _is_parameter(entry: trees.Entry) -> bool:
    """Whether a leaf can be trained: an nnx Param, or else any array of real or complex numbers."""
    if entry.variable is not None:
        return issubclass(entry.variable, trees.nnx().Param)
    dtype = getattr(entry.value, "dtype", None)
    return dtype is not None and arrays.is_inexact(dtype)


def _has_structure(value: Any) -> bool:
    """Whether a tree has containers that only a template can give back."""
    if type(value) in _BUILTIN:
        return any(_has_structure(child) for child in (value.values() if isinstance(value, dict) else value))
    return value is not None and trees.is_node(value)
