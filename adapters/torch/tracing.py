"""Running a torch module on a batch, and telling what each of its described layers made."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from polyckpt.adapter import Recorder, running, uncallable
from polyckpt.adapters.torch import layers, modules, rng
from polyckpt.schema import Layer

_RESHAPES = frozenset({"flatten", "reshape", "view", "reshape_as", "view_as"})

_ELEMENTWISE = """
relu relu6 elu selu celu gelu silu mish leaky_relu rrelu sigmoid logsigmoid hardsigmoid hardswish hardtanh tanh tanhshrink
softplus softsign softshrink hardshrink threshold prelu
dropout alpha_dropout feature_alpha_dropout feature_dropout dropout1d dropout2d dropout3d
abs neg exp expm1 log log1p log2 sqrt rsqrt square pow rpow sign sin cos erf clamp clip nan_to_num positive
add sub subtract rsub mul multiply div divide true_divide rdiv
to type float double half bfloat16 cpu cuda contiguous clone detach
"""
"""Functions that make each number of one number at its place; without the underscores around their names."""

_CARRIES = _RESHAPES | frozenset(_ELEMENTWISE.split())


def trace(model: Any, arguments: tuple[Any, ...], recorder: Recorder, apply: Callable[..., Any] | None) -> Sequence[np.ndarray]:
    """As Adapter.trace says. Floating inputs take the type of the model's parameters."""
    if not isinstance(model, nn.Module):
        if apply is None:
            raise uncallable(model)
        with _random_states_kept():
            return _run(apply, (model, *_inputs(arguments, "cpu", None)))
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        # The first batch gives them their shapes, here as in training; all else that it changes is no weight yet.
        with _random_states_kept():
            _run(model, _inputs(arguments, "cpu", None))
        tensors = [*model.parameters(), *model.buffers()]
    inputs = _inputs(
        arguments,
        tensors[0].device if tensors else "cpu",
        next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None),
    )
    described = layers.described(model, modules.Renamer(model))
    with _random_states_kept(), _for_inference(model), _state_kept(model), _eager(), _hooked(described, recorder):
        return _run(modules.unwrapped(model), inputs) if apply is None else _run(apply, (model, *inputs))


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[np.ndarray]:
    with torch.no_grad():
        with running():
            outputs = function(*arguments)
        return [_array(tensor) for tensor in _tensors(outputs)]


def _inputs(tree: Any, device: torch.device | str, floating: torch.dtype | None) -> Any:
    """A tree of arrays as one of tensors that share no memory with it."""
    if isinstance(tree, Mapping):
        return {key: _inputs(value, device, floating) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_inputs(value, device, floating) for value in tree)
    if not isinstance(tree, np.ndarray | np.generic):
        return tree
    # torch reads no element type that NumPy itself lacks; all of those have few bits.
    native = tree.dtype.newbyteorder("=")
    array = np.array(tree, native if native.type.__module__ == "numpy" else np.int32 if "int" in native.name else np.float32)
    tensor = torch.from_numpy(array)
    return tensor.to(device, floating if floating is not None and tensor.is_floating_point() else tensor.dtype)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of what a module returns. The keys of a plain dict are sorted: frameworks disagree about their order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        keys = sorted(tree, key=str) if type(tree) is dict else tree
        for key in keys:
            yield from _tensors(tree[key])
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from _tensors(getattr(tree, field.name))


def _array(tensor: torch.Tensor) -> np.ndarray:
    found = tensor.detach().resolve_conj().resolve_neg().cpu()
    if found.is_floating_point() and found.dtype not in (torch.float32, torch.float64):
        found = found.float()
    return np.array(found.numpy())


@contextlib.contextmanager
def _hooked(described: Sequence[tuple[nn.Module, Layer]], recorder: Recorder) -> Iterator[None]:
    """Hooks that tell the recorder of every call of a described module."""
    by_module: dict[nn.Module, list[Layer]] = {}
    for module, layer in described:
        if not isinstance(module, torch.jit.ScriptModule):  # those run by themselves and have no hooks
            by_module.setdefault(module, []).append(layer)
    marks = _Marks()
    with contextlib.ExitStack() as stack:
        for module, found in by_module.items():
            if found[0].kind == "linear":
                read = module.register_forward_pre_hook(_reader(found[0].path, recorder, marks), with_kwargs=True)
                stack.callback(read.remove)
            stack.callback(module.register_forward_hook(_teller(found, recorder)).remove)
        stack.enter_context(marks)
        yield


def _reader(path: str, recorder: Recorder, marks: _Marks) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        for value in (*arguments, *keywords.values()):
            if isinstance(value, torch.Tensor) and value in marks.shapes:
                recorder.flattened(path, marks.shapes[value])

    return hook


def _teller(found: Sequence[Layer], recorder: Recorder) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        first = next(_tensors(output), None)
        if first is None:
            return
        for layer, made in _made(module, found, first):
            recorder.ran(layer.path, _array(made))

    return hook


def _made(module: nn.Module, found: Sequence[Layer], output: torch.Tensor) -> list[tuple[Layer, torch.Tensor]]:
    """What each layer that a module is described as made of its output: a recurrent one gives that of its last depth alone."""
    if not isinstance(module, nn.RNNBase) or len(found) == 1:
        return [(found[0], output)]
    directions = 2 if module.bidirectional else 1
    return list(zip(found[-directions:], output.chunk(directions, dim=-1), strict=True))


class _Marks(TorchFunctionMode):
    """Remembers of which shape a tensor was before all of its axes but the first were merged, and what came of it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            shape = self._shape(str(getattr(function, "__name__", "")).strip("_"), (*args, *(kwargs or {}).values()), result)
            if shape is not None:
                self.shapes[result] = shape
        return result

    def _shape(self, name: str, arguments: tuple[Any, ...], result: torch.Tensor) -> tuple[int, ...] | None:
        # Numbers in a tensor of one element are the same for all places.
        read = [value for value in arguments if isinstance(value, torch.Tensor) and value.numel() != 1]
        if not read or name not in _CARRIES:
            return None
        source = read[0]
        if name in _RESHAPES and source.ndim >= 3 and tuple(result.shape) == (len(source), math.prod(source.shape[1:])):
            return tuple(source.shape[1:])
        if result.shape != source.shape:
            return None
        told = {self.shapes.get(value) for value in (read[:1] if name in _RESHAPES else read)}
        return told.pop() if len(told) == 1 else None


@contextlib.contextmanager
def _for_inference(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, without calling train() or eval(), which a class may have changed to do more."""
    training = [module for module in model.modules() if getattr(module, "training", False)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Put back every buffer, and every parameter that is not trained (torch refuses to write to the others)."""
    # Those of a scripted module are no dicts; it cannot replace them either.
    owners = [owner for module in model.modules() for owner in (module._parameters, module._buffers)]
    held: list[tuple[Any, dict[str, Any]]] = [(owner, dict(owner)) for owner in owners if isinstance(owner, dict)]
    before = {tensor: tensor.detach().clone() for tensor in [*model.buffers(), *model.parameters()] if not tensor.requires_grad}
    try:
        yield
    finally:
        for owner, named in held:
            owner.update(named)
        with torch.no_grad():
            for tensor, values in before.items():
                # A tensor that is written to, though with what it holds, can no longer be differentiated through.
                if not torch.equal(tensor, values):
                    tensor.copy_(values)


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    states = rng.capture()
    try:
        yield
    finally:
        rng.put_back(states)


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """What is compiled runs as it was written: hooks that come after compilation would not be called."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
