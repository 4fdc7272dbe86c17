"""Layers whose weight is computed of other tensors: weight norm and spectral norm, as parametrizations and as hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from polyckpt.layers import axes

Roles = dict[str, tuple[str, str]]


def keys(module: nn.Module) -> list[str]:
    """Keys of the tensors that a parametrization of these kinds holds for a module, relative to it."""
    if not parametrize.is_parametrized(module) or is_another(module):
        return []
    lists: Any = module.parametrizations
    tensors = [*lists.named_parameters(), *lists.named_buffers()]
    return [f"parametrizations.{key}" for key, _ in tensors]


def is_another(module: nn.Module) -> bool:
    """Whether a module is parametrized otherwise than by one of these at its weight, and nothing else."""
    if not parametrize.is_parametrized(module):
        return False
    lists: Any = module.parametrizations
    return not (list(lists) == ["weight"] and len(lists.weight) == 1 and type(lists.weight[0]) in _PARAMETRIZATIONS)


def roles(module: nn.Module, weight: tuple[str, str] | None) -> Roles:
    """The tensors that a kernel is made of, as key -> (role, axes). weight: role and axes of the weight by itself."""
    if weight is None or weight[0] != "kernel":
        return {}
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        (parametrization,) = lists.weight
        return _PARAMETRIZATIONS[type(parametrization)](parametrization, weight[1], "parametrizations.weight.")
    for hook in module._forward_pre_hooks.values():
        if type(hook) in _HOOKS and hook.name == "weight":  # type: ignore[attr-defined]
            return _HOOKS[type(hook)](hook, weight[1], "weight_")
    return {}


def _kept(named: str, dim: int | None, *, whole: bool) -> str:
    """The axes of what is left of a kernel where only the axis `dim` is kept; the others have size one, or are gone."""
    names = named.split()
    if dim is None or dim == -1:  # the norm of all elements
        return ""
    return " ".join(name if place == dim % len(names) else "1" for place, name in enumerate(names)) if whole else names[dim]


def _normed(found: Any, named: str, prefix: str, norm: str, direction: str) -> Roles:
    kept = _kept(named, found.dim, whole=True)
    return {f"{prefix}{norm}": ("kernel_norm", kept), f"{prefix}{direction}": ("kernel_direction", named)}


def _spectral(found: Any, named: str, prefix: str, raw: str, left: str, right: str) -> Roles:
    kept = _kept(named, found.dim % len(axes(named)), whole=False)
    return {
        f"{prefix}{raw}": ("kernel_raw", named),
        f"{prefix}{left}": ("kernel_u", kept),
        f"{prefix}{right}": ("kernel_v", "rest"),
    }


_PARAMETRIZATIONS: dict[type, Callable[[Any, str, str], Roles]] = {
    parametrizations._WeightNorm: lambda found, named, prefix: _normed(found, named, prefix, "original0", "original1"),
    parametrizations._SpectralNorm: lambda found, named, prefix: _spectral(found, named, prefix, "original", "0._u", "0._v"),
}
_HOOKS: dict[type, Callable[[Any, str, str], Roles]] = {
    WeightNorm: lambda found, named, prefix: _normed(found, named, prefix, "g", "v"),
    SpectralNorm: lambda found, named, prefix: _spectral(found, named, prefix, "orig", "u", "v"),
}
"""Class of a parametrization or hook -> the roles of what it holds."""
