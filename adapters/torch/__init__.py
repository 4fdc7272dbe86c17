"""The adapter for PyTorch: modules, optimizers, generators and tensors, restored in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

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
from polyckpt.adapters.torch import modules, optimizers, rng, schedulers, several, tensors, tracing
from polyckpt.checkpoint import StoredTensor
from polyckpt.errors import UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.residue import Constant

_OBJECTS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any, Any, str], Restore]]] = {
    "module": (nn.Module, modules.capture_tree, modules.prepare_tree),
    "optimizer": (torch.optim.Optimizer, optimizers.capture_tree, optimizers.prepare_tree),
    "generator": (torch.Generator, rng.capture_generator, rng.prepare_generator),
}
"""Kind of a stateful object -> class, reading it as a tree, preparing its restore. Others go by state_dict()."""


class TorchAdapter:
    """PyTorch. Models are modules (wrapped ones too), state dicts, or other containers of tensors."""

    name: ClassVar[str] = "torch"

    def versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__)}

    def recognises(self, value: Any) -> bool:
        return False

    def parts(self, model: Any, optimizer: Any | None, tx: Any = None) -> Parts:
        return Parts(model=model, optimizer=None if optimizer is NO_OPTIMIZER else optimizer)

    def capture_model(self, model: Any) -> ModelCapture:
        return modules.capture(model)

    def capture_optimizer(self, optimizer: Any, model: ModelCapture) -> OptimizerCapture:
        if _are_several(optimizer):
            return several.capture(optimizer, model.parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UnsupportedError(
                f"optimizer: a {type(optimizer).__qualname__} is no torch.optim.Optimizer, nor several; pass it in `extra`"
            )
        return optimizers.capture(optimizer, model.parameters)

    def prepare_model(self, model: Any, stored: StoredModel, *, rng: bool) -> Restore:
        return modules.prepare(model, stored, "weights")

    def parameters(self, model: Any) -> Sequence[tuple[str, Any]]:
        return modules.parameters(model)

    def prepare_optimizer(
        self, optimizer: Any, stored: StoredOptimizer, parameters: Sequence[tuple[str, Any]], model: Any
    ) -> Restore:
        if _are_several(optimizer):
            return several.prepare(optimizer, stored, parameters, "optimizer")
        refused = several.refuse(optimizer, stored, "optimizer")
        return refused or optimizers.prepare(optimizer, stored, parameters, "optimizer", in_place=True)

    def continue_optimizer(self, optimizer: Any, continuation: Continuation, captured: ModelCapture, model: Any) -> Restore:
        go_on = several.continue_ if _are_several(optimizer) else optimizers.continue_
        return go_on(optimizer, continuation, captured.parameters, "optimizer")

    def schedule(self, value: Any) -> Schedule | None:
        return schedulers.schedule(value)

    def capture_object(self, value: Any) -> tuple[str, Any] | None:
        for kind, (cls, capture, _) in _OBJECTS.items():
            if isinstance(value, cls):
                return kind, capture(value)
        return None

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
        return tracing.trace(model, arguments, recorder, apply)

    def leaf(self, value: Any) -> Leaf | Constant | None:
        if isinstance(value, torch.Tensor):
            return tensors.leaf(value, "a tensor")
        if isinstance(value, torch.dtype | torch.device):
            return Constant(f"torch.{type(value).__name__}", str(value))
        if isinstance(value, torch.Size):
            return Constant("torch.Size", list(value))
        return None

    def tensor(self, stored: StoredTensor, kind: str) -> Any:
        return tensors.copied(stored, kind)

    def constant(self, value: Any, kind: str) -> Any:
        if kind == "torch.Size":
            return torch.Size(value)
        if kind == "torch.device":
            return torch.device(value)
        found = getattr(torch, str(value).removeprefix("torch."), None)
        if kind != "torch.dtype" or not isinstance(found, torch.dtype):
            raise ValueError(f"{value!r} is no {kind}")
        return found


def _are_several(optimizer: Any) -> bool:
    if not isinstance(optimizer, list | tuple):
        return False
    return bool(optimizer) and all(isinstance(each, torch.optim.Optimizer) for each in optimizer)
