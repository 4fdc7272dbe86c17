"""A torch optimizer that goes on by the formulas of another framework: a hook that computes each update in its stead.

The optimizer stays what it is: its groups hold the hyperparameters, so that schedulers and hand-set rates work, and its state
holds the slots. The hook takes the gradients away before `step` (torch skips parameters without) and gives them back after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyckpt import updates
from polyckpt.errors import UnsupportedError
from polyckpt.updates import Form


class _Torch:
    """polyckpt.updates.Math in torch, which wants tensors where others take numbers."""

    abs, sqrt, sign = staticmethod(torch.abs), staticmethod(torch.sqrt), staticmethod(torch.sign)

    @staticmethod
    def maximum(x1: Any, x2: Any) -> Any:
        return torch.clamp(x1, min=x2) if isinstance(x1, torch.Tensor) else max(x1, x2)

    @staticmethod
    def minimum(x1: Any, x2: Any) -> Any:
        return torch.clamp(x1, max=x2) if isinstance(x1, torch.Tensor) else min(x1, x2)

    @staticmethod
    def where(condition: Any, x1: Any, x2: Any) -> Any:
        if isinstance(condition, bool):
            return x1 if condition else x2
        return torch.where(condition, x1, x2)

    @staticmethod
    def transpose(x: Any) -> Any:
        return x.T

    @staticmethod
    def sum(x: Any, axis: int | None = None, keepdims: bool = False) -> Any:
        return torch.sum(x) if axis is None else torch.sum(x, dim=axis, keepdim=keepdims)


Read = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From a parameter group to its hyperparameters under neutral names."""


@dataclass
class Continued:
    """The two hooks. of: the forms of the parameter groups, without hyperparameters, the last for those added later. slots:
    meaning -> key in the state. read: gives the hyperparameters of a group.
    """

    of: Sequence[Form]
    slots: Mapping[str, str]
    read: Read

    def form_of(self, index: int) -> Form:
        """The form of a group, without hyperparameters."""
        return self.of[min(index, len(self.of) - 1)]

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every further step of `optimizer` be computed here."""
        check(optimizer)
        remove(optimizer)
        self._gradients: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # torch hands over what `step` was called with, the optimizer first.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args, kwargs = args[:1], {"closure": lambda: loss}
        with torch.no_grad():
            for index, group in enumerate(optimizer.param_groups):
                form = replace(self.form_of(index), hyperparameters=self.read(group))
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(form, parameter, optimizer.state[parameter], group["lr"])
                        self._gradients.append((parameter, parameter.grad))
                        parameter.grad = None
        return args, kwargs

    def _update(self, form: Form, parameter: torch.Tensor, state: dict[str, Any], rate: Any) -> None:
        if parameter.grad is None or parameter.grad.is_sparse:
            raise UnsupportedError("a continued optimizer takes dense gradients: make the embedding with sparse=False")
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            for meaning, (shape, first) in updates.slots_of(form, tuple(parameter.shape)).items():
                state[self.slots[meaning]] = torch.full(shape, first, dtype=parameter.dtype, device=parameter.device)
        state["step"] += 1
        held = {meaning: state[key] for meaning, key in self.slots.items() if key in state}
        rate = float(rate)
        weight, new = updates.update(form, _Torch(), parameter.grad, parameter, held, int(state["step"]), rate)
        parameter.copy_(weight)
        for meaning, value in new.items():
            held[meaning].copy_(value)

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients.clear()


def check(optimizer: torch.optim.Optimizer) -> None:
    """Raises UnsupportedError for an optimizer whose step a hook cannot replace."""
    for key in ("fused", "capturable", "differentiable"):
        if any(group.get(key) for group in optimizer.param_groups):
            raise UnsupportedError(f"optimizer: {key}=True leaves no place for another formula: make it with {key}=False")


def of(optimizer: torch.optim.Optimizer) -> Continued | None:
    """The hook of an optimizer that has been continued, if it has."""
    return next(iter(_all(optimizer)), None)


def remove(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer follow its own formula again."""
    for each in _all(optimizer):
        for handle in each._handles:
            handle.remove()


def _all(optimizer: torch.optim.Optimizer) -> Iterator[Continued]:
    for hook in list(optimizer._optimizer_step_pre_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Continued):
            yield owner
