"""Keras variables and backend tensors to leaves and back, and names that hold in every process."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import keras
import numpy as np
from msgspec import structs

from polyckpt import names, registry
from polyckpt.checkpoint import StoredTensor
from polyckpt.dtypes import DTYPES
from polyckpt.errors import Problem, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.names import type_name

KIND = "keras"
SEED_STATE = "seed_generator_state"


def backend_adapter() -> Any:
    """The adapter that owns the backend's tensors; None on TensorFlow, whose tensors this one handles."""
    name = keras.backend.backend()
    return None if name == "tensorflow" else registry.named(name)


def leaf(variable: Any, what: str) -> Leaf:
    """The leaf of a Keras variable or a tensor of the backend. Raises UnsupportedError, naming `what`."""
    tensor = variable.value if isinstance(variable, keras.Variable) else variable
    if owner := backend_adapter():
        try:
            found = owner.leaf(tensor)
        except UnsupportedError as error:
            raise UnsupportedError(f"{what}: {error}") from error
        if isinstance(found, Leaf):
            return structs.replace(found, kind=KIND)
    elif _is_composite(tensor):
        raise UnsupportedError(f"{what}: a {type_name(tensor)} cannot be stored, only dense tensors can: store its parts")
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype not in DTYPES:
        raise UnsupportedError(f"{what}: element type {dtype} is not part of the format")
    return Leaf(
        dtype=dtype,
        shape=tuple(tensor.shape),
        read=lambda: np.ascontiguousarray(keras.ops.convert_to_numpy(tensor)),
        kind=KIND,
    )


def _is_composite(tensor: Any) -> bool:
    import tensorflow as tf

    return isinstance(tensor, tf.RaggedTensor | tf.SparseTensor | tf.IndexedSlices)


def tensor(stored: StoredTensor) -> Any:
    """A stored tensor as a new tensor of the backend, which shares memory with nothing."""
    if owner := backend_adapter():
        return owner.tensor(stored, owner.name)
    return keras.ops.convert_to_tensor(stored.numpy().copy())


def show(variable: Any) -> str:
    """A live variable as errors show it: `float32[2, 3]`."""
    return f"{keras.backend.standardize_dtype(variable.dtype)}{list(variable.shape)}"


def compare(section: str, name: str, stored: StoredTensor | None, live: Any | None) -> Problem | None:
    """What keeps `stored` from being assigned to the variable `live`, if anything does."""
    if stored is None or live is None:
        kind = "missing" if stored is None else "unexpected"
        return Problem(
            kind,  # type: ignore[arg-type]
            section,
            name,
            **({"stored": str(stored)} if stored is not None else {}),
            **({"live": show(live)} if live is not None else {}),
        )
    if stored.shape != tuple(live.shape):
        return Problem("shape", section, name, stored=str(stored), live=show(live))
    if stored.dtype != keras.backend.standardize_dtype(live.dtype):
        return Problem("dtype", section, name, stored=str(stored), live=show(live))
    return None


class Namer:
    """Canonical names of a model's variables.

    Keras numbers automatic layer names process-wide: the same code gives `dense_1` here and `dense_7` there. So a segment of
    a variable's path that looks automatic (the snake-case name of a layer's class, or "variable", with or without a number)
    is numbered anew, below each parent, in the order of first appearance; all other segments, which the user chose, stay as
    they are.
    """

    def __init__(self, model: Any) -> None:
        layers = [model, *sublayers(model)]
        self._automatic: dict[str, str] = {}
        for layer in layers:
            # Bidirectional derives the names of its two layers from that of the one it was given.
            pattern = rf"((?:forward_|backward_)?{re.escape(_snake(type(layer).__name__))})(?:_\d+)?"
            if automatic := re.fullmatch(pattern, layer.name):
                self._automatic[layer.name] = automatic[1]
        self._canonical: dict[tuple[str, ...], str] = {}
        self._counts: dict[tuple[str, ...], int] = {}
        for variable in model.weights:
            if re.fullmatch(r"variable(_\d+)?", variable.name):
                self._automatic[variable.name] = "variable"
        for variable in model.weights:
            self(variable.path)

    @property
    def bases(self) -> frozenset[str]:
        """The automatic names in use, without their numbers."""
        return frozenset(self._automatic.values())

    def __call__(self, path: str) -> str:
        canonical: list[str] = []
        raw: tuple[str, ...] = ()
        for segment in path.split("/"):
            raw = (*raw, segment)
            if raw not in self._canonical:
                base = self._automatic.get(segment, segment)
                count = self._counts.get((*canonical, base), 0)
                self._counts[(*canonical, base)] = count + 1
                self._canonical[raw] = f"{base}_{count}" if count else base
            canonical.append(self._canonical[raw])
        return "/".join(canonical)


def paired(model: Any, live: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Names of a model -> those in a checkpoint of the same model made in the other way; nothing where they are no such pair.

    What Keras makes of a configuration (load_model) lacks the names of the models around a layer in the paths of its variables.
    Both list them in the same order. Names that the user chose, shapes and types must agree.
    """
    if live.keys() == stored.keys() or len(live) != len(stored):
        return {}
    automatic = Namer(model).bases
    pairs = dict(zip(live, stored, strict=True))
    fit = all(
        _is_tail(name, other, automatic) and compare("", name, stored[other], live[name]) is None
        for name, other in pairs.items()
    )
    return pairs if fit else {}


def _is_tail(one: str, other: str, automatic: AbstractSet[str]) -> bool:
    """Whether one path is the end of the other, but for the numbers of automatic segments."""
    segments = zip(reversed(one.split("/")), reversed(other.split("/")), strict=False)
    return all(a == b or (_numberless(a) == _numberless(b) and _numberless(a) in automatic) for a, b in segments)


def _numberless(segment: str) -> str:
    return re.sub(r"_\d+$", "", segment)


def weights(model: Any) -> dict[str, Any]:
    """A model's weights, without random states and metrics, by canonical name; a name that recurs is numbered "...:1"."""
    namer = Namer(model)
    found: dict[str, Any] = {}
    named = [(namer(variable.path), variable) for variable in model.weights]
    named += [
        (f"{namer(layer.path or layer.name)}/{key}", buffer) for layer in sublayers(model) for key, buffer in buffers(layer)
    ]
    for name, variable in named:
        recurrence = 0
        while (unique := f"{name}:{recurrence}" if recurrence else name) in found:
            recurrence += 1
        found[unique] = variable
    return found


def parameters(model: Any) -> list[tuple[str, Any]]:
    """What an optimizer may hold of a model, as (name of the weight, variable or torch parameter)."""
    named = {name: value for name, value in weights(model).items() if isinstance(value, keras.Variable)}
    name_of = {id(variable): name for name, variable in named.items()}
    found = [(name_of[id(variable)], variable) for variable in model.trainable_variables]
    # An optimizer keeps what it was built for, although it may have been frozen since.
    found += [(name, variable) for name, variable in named.items() if not variable.trainable]
    if keras.backend.backend() == "torch":
        # There a torch optimizer may hold the torch parameters behind the variables.
        found += [(name, variable.value) for name, variable in named.items()]
    return found


def places(model: Any) -> dict[int, str]:
    """Weights by identity -> the attributes of the user's own classes that lead to them, where some do.

    Automatic names follow the order in which a class makes its layers; its attributes say which layer is meant. Of several
    ways to a shared weight the first in sorting order is taken, so that the order of the class's lines does not matter.
    """
    found: dict[int, str] = {}
    seen: set[int] = set()

    def walk(layer: Any, prefix: tuple[str, ...]) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        if _orders_layers(layer):
            for weight in layer.weights if prefix and not children(layer) else ():
                found.setdefault(id(weight), names.join(prefix))
            for child in children(layer):
                walk(child, prefix)
            return
        for path, item in sorted(_attributes(layer), key=lambda entry: entry[0]):
            if isinstance(item, keras.Variable):
                found.setdefault(id(item), names.join((*prefix, *path)))
            else:
                walk(item, (*prefix, *path))

    walk(model, ())
    return found


def _orders_layers(layer: Any) -> bool:
    """Whether the order of a layer's layers is Keras's own or that of a graph, and not that of a user's lines."""
    graph = isinstance(layer, keras.Sequential) or hasattr(layer, "operations")
    return graph or type(layer).__module__.startswith("keras.")


_TRACKING = re.compile("_layers|_modules|_tracked|_self_.*|_(non_)?trainable_variables|_metrics|_seed_generators")
"""Attributes in which Keras and its backends keep lists of everything that a layer holds."""


def _attributes(layer: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The layers and variables that a layer holds, alone or in lists and dicts, by attribute and place."""
    # On the torch backend a layer is a module, which keeps modules apart.
    for attribute, value in {**vars(layer), **vars(layer).get("_modules", {})}.items():
        if not _TRACKING.fullmatch(attribute):
            yield from _inside(value, (attribute,))


def _inside(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, keras.layers.Layer | keras.Variable):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _inside(item, (*path, str(key)))


def run_states(model: Any) -> list[Any]:
    """The states of a model's seed generators and of its stateful recurrent layers: they belong to a run, not to weights."""
    seeds = [variable for variable in model.variables if variable.path.rpartition("/")[2] == SEED_STATE]
    recurrent = [layer for layer in [model, *sublayers(model)] if isinstance(layer, keras.layers.RNN) and layer.stateful]
    found = [state for layer in recurrent for state in keras.tree.flatten(layer.states) if isinstance(state, keras.Variable)]
    # Bidirectional lists the states of both its layers once more.
    return [*seeds, *{id(state): state for state in found}.values()]


def buffers(layer: Any) -> list[tuple[str, Any]]:
    """The buffers of a torch module that a layer wraps, which Keras itself does not track."""
    return list(layer.module.named_buffers()) if isinstance(layer, keras.layers.TorchModuleWrapper) else []


def assign(live: Any, value: Any) -> None:
    """Write a tensor of the backend into a variable or a buffer."""
    live.assign(value) if isinstance(live, keras.Variable) else live.detach().copy_(value)


def refresh(model: Any) -> None:
    """Have layers that keep a copy of their weights make it anew."""
    for layer in [model, *sublayers(model)]:
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def sublayers(layer: Any) -> Iterator[Any]:
    """Every layer inside `layer`, each once, in the order of a functional graph or of definition."""
    seen = {id(layer)}

    def walk(parent: Any) -> Iterator[Any]:
        for child in children(parent):
            if id(child) not in seen:
                seen.add(id(child))
                yield child
                yield from walk(child)

    yield from walk(layer)


def with_sublayers(layer: Any) -> list[Any]:
    """`layer` and every layer inside it."""
    return [layer, *sublayers(layer)]


def children(layer: Any) -> Sequence[Any]:
    """The layers directly inside `layer`."""
    own: Iterable[Any] = layer.layers if isinstance(layer, keras.Model) else layer._flatten_layers(False, False)
    return list(own)


def _snake(name: str) -> str:
    """The base of Keras's automatic names for a class."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
