"""Running a Keras model on a batch, and telling what each of its described layers made."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras.src import backend

from polyckpt.adapter import Recorder, running, uncallable
from polyckpt.adapters.keras import layers, rng, variables
from polyckpt.schema import Layer

_NN = """
relu relu6 sigmoid hard_sigmoid log_sigmoid sparse_sigmoid silu hard_silu gelu elu selu celu leaky_relu softplus softsign
squareplus sparse_plus tanh_shrink soft_shrink hard_shrink hard_tanh threshold
"""

_NUMPY = """
abs absolute negative add subtract multiply divide true_divide power square sqrt exp expm1 log log1p log2 sin cos tanh sign
clip maximum minimum copy
"""

_CARRIES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (backend, ("cast",)),
    (backend.core, ("cast",)),
    (backend.nn, tuple(_NN.split())),
    (backend.numpy, ("reshape", *_NUMPY.split())),
)
"""Functions of the backend, which all layers and keras.ops come down to, that leave each number at its place."""

_ITERATING = (keras.layers.RNN, keras.layers.TimeDistributed)


def trace(model: Any, arguments: tuple[Any, ...], recorder: Recorder, apply: Callable[..., Any] | None) -> Sequence[np.ndarray]:
    """As Adapter.trace says. Several arguments are the several inputs of a functional model."""
    if not isinstance(model, keras.layers.Layer):
        if apply is None:
            raise uncallable(model)
        with rng.kept():
            return _run(functools.partial(apply, model), _inputs(arguments))
    inputs = _inputs(arguments)
    if apply is not None:
        call = functools.partial(apply, model)
    else:
        call = functools.partial(model, training=False)
        if len(inputs) > 1 and len(getattr(model, "inputs", None) or ()) == len(inputs):
            inputs = (list(inputs),)
    described = layers.described(model, variables.weights(model))
    with rng.kept(), _state_kept(model), _Watch(recorder).of(model, described):
        return _run(call, inputs)


def _run(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[np.ndarray]:
    with _without_gradients():
        with running():
            outputs = call(*arguments)
        return [_array(value) for value in keras.tree.flatten(outputs) if keras.ops.is_tensor(value)]


def _without_gradients() -> contextlib.AbstractContextManager[Any]:
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def _inputs(tree: Any) -> Any:
    """A tree of arrays as one of the backend's tensors, which share no memory with it."""
    if isinstance(tree, Mapping):
        return {key: _inputs(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_inputs(value) for value in tree)
    return keras.ops.convert_to_tensor(np.array(tree)) if isinstance(tree, np.ndarray | np.generic) else tree


def _array(tensor: Any) -> np.ndarray:
    array = np.asarray(keras.ops.convert_to_numpy(tensor))
    narrow = keras.backend.is_float_dtype(array.dtype.name) and array.dtype.name not in ("float32", "float64")
    return np.array(array, np.float32 if narrow else array.dtype)


class _Watch:
    """Tells a recorder of every call of a described layer, from functions that stand in for `call` while the model runs."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        # Tensor by identity -> the tensor, so that it lives and keeps its identity, and the shape that was merged in it.
        self._marks: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self._iterating = 0

    @contextlib.contextmanager
    def of(self, model: Any, described: Sequence[tuple[Any, Layer]]) -> Iterator[None]:
        watched: dict[int, tuple[Any, Layer | None]] = {
            id(layer): (layer, None) for layer in variables.with_sublayers(model) if isinstance(layer, _ITERATING)
        }
        owners = _owners(model)
        for layer, entry in described:
            while id(layer) in owners:
                layer = owners[id(layer)]
            watched[id(layer)] = (layer, entry)
        with contextlib.ExitStack() as stack:
            for layer, told in watched.values():
                # A quantized layer has another.
                name = "quantized_call" if getattr(layer, "quantization_mode", None) else "call"
                stack.enter_context(_replaced(vars(layer), name, self._watched(layer, getattr(layer, name), told)))
            for module, names in _CARRIES:
                for name in names:
                    if function := vars(module).get(name):
                        stack.enter_context(_replaced(vars(module), name, self._carrying(function, name == "reshape")))
            yield

    def _watched(self, layer: Any, call: Callable[..., Any], entry: Layer | None) -> Callable[..., Any]:
        iterates = isinstance(layer, _ITERATING)

        @functools.wraps(call)
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            outside = not self._iterating
            if outside and entry is not None and entry.kind == "linear":
                for value in (*arguments, *keywords.values()):
                    if (shape := self._shape_of(value)) is not None:
                        self._recorder.flattened(entry.path, shape)
            self._iterating += iterates
            try:
                outputs = call(*arguments, **keywords)
            finally:
                self._iterating -= iterates
            if outside and entry is not None:
                self._tell(entry.path, outputs)
            return outputs

        return wrapped

    def _tell(self, path: str, outputs: Any) -> None:
        first = next((value for value in keras.tree.flatten(outputs) if keras.ops.is_tensor(value)), None)
        if first is None:
            return
        try:
            array = _array(first)
        except Exception:  # a tensor of a function being compiled or mapped, each backend's own kind, has no numbers
            return
        self._recorder.ran(path, array)

    def _carrying(self, function: Callable[..., Any], reshapes: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            result = function(*arguments, **keywords)
            read = [value for value in (*arguments, *keywords.values()) if _size(value) != 1]
            if keras.ops.is_tensor(result) and read:
                shape = self._merged(read[0], result) if reshapes else None
                if shape is None and tuple(result.shape) == tuple(read[0].shape):
                    told = {self._shape_of(value) for value in (read[:1] if reshapes else read)}
                    shape = told.pop() if len(told) == 1 else None
                if shape is not None:
                    self._marks[id(result)] = (result, shape)
            return result

        return wrapped

    @staticmethod
    def _merged(source: Any, result: Any) -> tuple[int, ...] | None:
        shape = tuple(source.shape)
        known = all(isinstance(size, int) for size in (*shape, *result.shape))
        if known and len(shape) >= 3 and tuple(result.shape) == (shape[0], math.prod(shape[1:])):
            return shape[1:]
        return None

    def _shape_of(self, value: Any) -> tuple[int, ...] | None:
        return self._marks.get(id(value), (None, None))[1]


def _size(value: Any) -> int | None:
    """How many numbers a value is: one where it is no array."""
    shape = getattr(value, "shape", ())
    return math.prod(shape) if all(isinstance(size, int) for size in shape) else None


def _owners(model: Any) -> dict[int, Any]:
    """What is called once for every step of a sequence, by identity -> the layer that calls it, whose outputs are its own."""
    owners = {}
    for layer in variables.with_sublayers(model):
        if isinstance(layer, keras.layers.RNN):
            owners[id(layers.cells(layer)[-1])] = layer
        elif isinstance(layer, keras.layers.TimeDistributed):
            owners[id(layer.layer)] = layer
    return owners


@contextlib.contextmanager
def _replaced(namespace: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """`value` under `name` in the namespace of a module or an object, past everything that setting an attribute does."""
    missing = object()
    before = namespace.get(name, missing)
    namespace[name] = value
    try:
        yield
    finally:
        if before is missing:
            del namespace[name]
        else:
            namespace[name] = before


@contextlib.contextmanager
def _state_kept(model: Any) -> Iterator[None]:
    """Put back what a call may write: weights that are not trained, states, losses, modes of wrapped torch modules."""
    everything = list(variables.with_sublayers(model))
    live = [value for value in variables.weights(model).values() if not getattr(value, "trainable", False)]
    before = [(value, _copy(value)) for value in (*live, *variables.run_states(model))]
    losses = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in everything]
    modules = list(model.modules()) if keras.backend.backend() == "torch" else []
    training = [module.training for module in modules]
    try:
        yield
    finally:
        for value, array in before:
            if _copy(value).tobytes() != array.tobytes():
                variables.assign(value, keras.ops.convert_to_tensor(array))
        for layer, made, identities in losses:
            layer._losses[:] = made
            layer._loss_ids.clear()
            layer._loss_ids.update(identities)
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def _copy(value: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(value))
