"""The adapter for Keras 3 on TensorFlow, torch and JAX: models, optimizers and seed generators, restored in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from typing import Any, ClassVar

import keras
import numpy as np

from polyckpt import residue
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
from polyckpt.adapters.keras import layers, optimizers, rng, tracing, variables
from polyckpt.adapters.keras.continued import Continued
from polyckpt.checkpoint import StoredTensor
from polyckpt.errors import Problem, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.names import type_name
from polyckpt.residue import Constant

_CALLBACKS = {
    "ModelCheckpoint": "model_checkpoint",
    "BackupAndRestore": "backup",
    "EarlyStopping": "early_stopping",
}

_BACKEND_PACKAGES = {"tensorflow": ("tensorflow", "tensorflow-cpu"), "torch": ("torch",), "jax": ("jax", "jaxlib")}


class KerasAdapter:
    """Keras 3. The optimizer is the one that a model was compiled with, unless another is given."""

    name: ClassVar[str] = "keras"

    def versions(self) -> dict[str, str]:
        found = {"keras": keras.__version__}
        for package in _BACKEND_PACKAGES.get(keras.backend.backend(), ()):
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return found

    def recognises(self, value: Any) -> bool:
        return False

    def parts(self, model: Any, optimizer: Any | None, tx: Any = None) -> Parts:
        if optimizer is NO_OPTIMIZER:
            return Parts(model=model, optimizer=None)
        main = getattr(model, "optimizer", None) if optimizer is None else optimizer
        whole = optimizers.whole(model, main)

        def join(model: Any, restored: Any) -> tuple[Any, Any]:
            if isinstance(restored, Continued) and getattr(model, "optimizer", None) is main is not restored:
                optimizers.use(model, restored)
            return model, (main if restored is whole else restored) if restored else None

        return Parts(model=model, optimizer=whole, join=join)

    def capture_model(self, model: Any) -> ModelCapture:
        _check_built(model)
        named = variables.weights(model)
        return ModelCapture(
            type=type_name(model),
            weights={name: variables.leaf(variable, f"model: {name}") for name, variable in named.items()},
            layers=layers.describe(model, named),
            order=layers.order(model),
            parameters=variables.parameters(model),
            native={"backend": keras.backend.backend(), "attributes": _attributes(model, named)},
            rng=rng.capture_states(variables.run_states(model)),
        )

    def capture_optimizer(self, optimizer: Any, model: ModelCapture) -> OptimizerCapture:
        return optimizers.capture(optimizer, model.parameters)

    def prepare_model(self, model: Any, stored: StoredModel, *, rng: bool) -> Restore:
        attributes = (stored.native or {}).get("attributes", {})
        return _prepare(model, stored.weights, attributes, stored.rng if rng else None, "weights")

    def parameters(self, model: Any) -> Sequence[tuple[str, Any]]:
        return variables.parameters(model)

    def prepare_optimizer(
        self, optimizer: Any, stored: StoredOptimizer, parameters: Sequence[tuple[str, Any]], model: Any
    ) -> Restore:
        return optimizers.prepare(optimizer, stored, parameters, "optimizer")

    def continue_optimizer(self, optimizer: Any, continuation: Continuation, captured: ModelCapture, model: Any) -> Restore:
        return optimizers.continue_(optimizer, continuation, captured, "optimizer")

    def schedule(self, value: Any) -> Schedule | None:
        return None

    def capture_object(self, value: Any) -> tuple[str, Any] | None:
        return next(((kind, capture(value)) for kind, (cls, capture, _) in _OBJECTS.items() if isinstance(value, cls)), None)

    def prepare_object(self, value: Any, kind: str, tree: Any, *, path: str) -> Restore:
        if kind not in _OBJECTS or not isinstance(value, _OBJECTS[kind][0]):
            return another_kind(value, kind, path)
        return _OBJECTS[kind][2](value, tree, path)

    def capture_rng(self) -> Any:
        return rng.capture()

    def prepare_rng(self, tree: Any) -> Restore:
        return rng.prepare(tree)

    def trace(
        self, model: Any, arguments: tuple[Any, ...], recorder: Recorder, apply: Callable[..., Any] | None
    ) -> Sequence[np.ndarray]:
        if isinstance(model, keras.layers.Layer):
            _check_built(model)
        return tracing.trace(model, arguments, recorder, apply)

    def leaf(self, value: Any) -> Leaf | Constant | None:
        return variables.leaf(value, "a tensor") if isinstance(value, keras.Variable) or keras.ops.is_tensor(value) else None

    def tensor(self, stored: StoredTensor, kind: str) -> Any:
        return variables.tensor(stored)

    def constant(self, value: Any, kind: str) -> Any:
        raise ValueError(f"{kind!r} is no constant of Keras")


def _check_built(model: Any) -> None:
    # Inside fit on JAX the live values are in the trainer; this brings them into the variables.
    if sync := getattr(model, "jax_state_sync", None):
        sync()
    for layer in [*variables.sublayers(model), model]:
        if not layer.built and not isinstance(layer, keras.layers.InputLayer):
            raise UnsupportedError(
                f"model: the layer {layer.path or layer.name} is not built, so it has no weights yet: "
                "call the model once or build(input_shape), with training=True where it runs only then"
            )
        if callable(getattr(layer, "get_vocabulary", None)):
            raise UnsupportedError(
                f"model: the layer {layer.path or layer.name} is a {type(layer).__name__}, whose vocabulary is not made of "
                "tensors: keep it outside the model, and save layer.get_vocabulary() in `extra`"
            )
        if callable(getattr(layer, "save_assets", None)):
            raise UnsupportedError(
                f"model: the layer {layer.path or layer.name} is a {type(layer).__name__}, which saves assets that are "
                "no tensors: keep it outside the model, or hold its state in weights"
            )
        if isinstance(layer, keras.layers.Discretization) and layer.num_bins is not None:
            raise UnsupportedError(
                f"model: the layer {layer.path or layer.name} is a Discretization, whose adapted bin_boundaries are no "
                "tensors: keep it outside the model and save layer.bin_boundaries in `extra`, or make it with these"
            )


def _attributes(model: Any, named: Mapping[str, Any]) -> dict[str, str]:
    """The attributes that lead to each weight, by its name: what tells apart layers with automatic names."""
    places = variables.places(model)
    return {name: places[id(variable)] for name, variable in named.items() if id(variable) in places}


def _prepare(
    model: Any, weights: Mapping[str, StoredTensor], attributes: Mapping[str, str], states: Any, section: str
) -> Restore:
    _check_built(model)
    live = variables.weights(model)
    pairs = variables.paired(model, live, weights)
    live = {pairs.get(name, name): variable for name, variable in live.items()}
    found = {name: variables.compare(section, name, weights.get(name), live.get(name)) for name in {**live, **weights}}
    for name, place in _attributes(model, live).items():
        if name in weights and attributes.get(name, place) != place:
            stored = f"the attribute {attributes[name]}"
            found[name] = Problem("value", section, name, stored=stored, live=f"the attribute {place}")
    seeds = rng.prepare_states(variables.run_states(model), states, "rng") if states is not None else None

    def apply() -> Any:
        for name, problem in found.items():
            if problem is None:
                variables.assign(live[name], variables.tensor(weights[name]))
        variables.refresh(model)
        if seeds:
            seeds.apply()
        return model

    return Restore(
        apply=apply,
        problems=[*(problem for problem in found.values() if problem), *(seeds.problems if seeds else ())],
        tensors=[*weights.values(), *residue.tensors(states)],
        names=pairs,
    )


def _capture_layer(layer: Any) -> dict[str, Any]:
    _check_built(layer)
    named = variables.weights(layer)
    optimizer = optimizers.whole(layer, getattr(layer, "optimizer", None))
    return {
        "weights": {name: variables.leaf(variable, name) for name, variable in named.items()},
        "attributes": _attributes(layer, named),
        "rng": rng.capture_states(variables.run_states(layer)),
        "optimizer": None if optimizer is None else optimizers.capture_tree(optimizer, variables.parameters(layer)),
    }


def _prepare_layer(layer: Any, tree: Mapping[str, Any], path: str) -> Restore:
    weights = {name: ref.stored for name, ref in tree["weights"].items()}
    prepared = _prepare(layer, weights, tree.get("attributes", {}), tree["rng"], path)
    optimizer, stored = optimizers.whole(layer, getattr(layer, "optimizer", None)), tree.get("optimizer")
    if optimizer is None:
        return prepared
    if stored is None:
        problem = Problem("missing", path, "optimizer", live=type_name(optimizer))
        return dataclasses.replace(prepared, problems=[*prepared.problems, problem])
    parameters = prepared.renamed(variables.parameters(layer))
    optimized = optimizers.prepare_tree(optimizer, stored, f"{path} optimizer", parameters)

    def apply() -> Any:
        optimized.apply()
        return prepared.apply()

    return Restore(
        apply=apply,
        problems=[*prepared.problems, *optimized.problems],
        tensors=[*prepared.tensors, *optimized.tensors],
    )


_OBJECTS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any, Any, str], Restore]]] = {
    "layer": (keras.layers.Layer, _capture_layer, _prepare_layer),
    "optimizer": (keras.optimizers.Optimizer, optimizers.capture_tree, optimizers.prepare_tree),
    "variable": (
        keras.Variable,
        lambda variable: rng.capture_states([variable]),
        lambda variable, tree, path: rng.prepare_states([variable], tree, path, variable),
    ),
    "seed_generator": (
        keras.random.SeedGenerator,
        lambda generator: rng.capture_states([generator.state]),
        lambda generator, tree, path: rng.prepare_states([generator.state], tree, path, generator),
    ),
    "metric": (
        keras.metrics.Metric,
        lambda metric: rng.capture_states(metric.variables),
        lambda metric, tree, path: rng.prepare_states(metric.variables, tree, path, metric),
    ),
}
"""Kind of a stateful object -> class, reading it as a tree, preparing its restore."""


def __getattr__(name: str) -> Any:
    # They use the whole library, which uses this module.
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_CALLBACKS[name]}"), name)
