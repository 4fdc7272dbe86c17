"""torch models that compute what they did, under other names and in another order of definition: what a matcher must not
fall for. A mutant never pairs wrongly in silence: right, or refused."""

from __future__ import annotations

import copy
import random
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Mutant(nn.Module):
    """The leaf modules of `model` under `names` (old path -> new path), registered in the order of that dict."""

    def __init__(self, model: nn.Module, names: dict[str, str]) -> None:
        super().__init__()
        self._hidden = [model]  # a list is not searched for modules: only the leaves below are registered
        for old, new in names.items():
            place: nn.Module = self
            *parents, last = f"net.{new}".split(".")  # no name of the original: by equal names torch itself would load
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place._modules[parent]  # type: ignore[assignment]
            place.add_module(last, model.get_submodule(old))

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self._hidden[0](*arguments, **keywords)

    def train(self, mode: bool = True) -> Mutant:
        self._hidden[0].train(mode)
        return super().train(mode)


def leaves(model: nn.Module) -> list[str]:
    """Paths of the modules that hold parameters or buffers of their own, outermost first."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not inside and (next(module.parameters(recurse=False), None) is not None or list(module.buffers(recurse=False))):
            found.append(path)
    return found


def twins(model: nn.Module) -> list[list[str]]:
    """Leaves whose tensors have the same shapes, in groups of two and more."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for path in leaves(model):
        module = model.get_submodule(path)
        groups[type(module), tuple(tuple(value.shape) for value in module.state_dict().values())].append(path)
    return [group for group in groups.values() if len(group) > 1]


def permuted_names(model: nn.Module, rng: random.Random) -> dict[str, str]:
    """Twins exchange their names; the order of definition stays."""
    names = {path: path for path in leaves(model)}
    for group in twins(model):
        names |= dict(zip(group, rng.sample(group, len(group)), strict=True))
    return names


def one_group(model: nn.Module, rng: random.Random) -> dict[str, str]:
    """The names of one group of twins are exchanged."""
    names = {path: path for path in leaves(model)}
    group = rng.choice(twins(model))
    return names | dict(zip(group, rng.sample(group, len(group)), strict=True))


def shuffled_order(model: nn.Module, rng: random.Random) -> dict[str, str]:
    """Every name stays, the order of definition is any."""
    paths = leaves(model)
    return {path: path for path in rng.sample(paths, len(paths))}


def swapped_twins(model: nn.Module, rng: random.Random) -> dict[str, str]:
    """Two twins exchange both name and place, so that names and order of definition agree with each other and both lie."""
    paths = leaves(model)
    one, other = rng.sample(rng.choice(twins(model)), 2)
    exchanged = {one: other, other: one}
    return {exchanged.get(path, path): path for path in paths}


def misleading_numbers(model: nn.Module, rng: random.Random) -> dict[str, str]:
    """Every number in every name is another one, as long as names stay different."""
    names: dict[str, str] = {}
    for path in leaves(model):
        while (new := re.sub(r"\d+", lambda _: str(rng.randint(0, 99)), path)) in names.values():
            if not re.search(r"\d", path):
                break
        names[path] = new
    return names


def renumbered(model: nn.Module, rng: random.Random) -> dict[str, str]:
    """Names say nothing but numbers, and these are at random."""
    paths = leaves(model)
    return {path: f"layer_{number}" for path, number in zip(paths, rng.sample(range(len(paths)), len(paths)), strict=True)}


KINDS: dict[str, Callable[[nn.Module, random.Random], dict[str, str]]] = {
    "names permuted among all twins": permuted_names,
    "names permuted among one group": one_group,
    "definition order shuffled": shuffled_order,
    "twins swapped in name and order": swapped_twins,
    "misleading numbers": misleading_numbers,
    "names of numbers alone": renumbered,
}


def mutant(model: nn.Module, kind: str, rng: random.Random) -> Mutant:
    """A copy of `model` with other weights, mutated."""
    fresh = copy.deepcopy(model)
    randomize(fresh, torch.Generator().manual_seed(rng.randint(0, 1 << 30)))
    return Mutant(fresh, KINDS[kind](fresh, rng))


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights, and random statistics of norms: ones and zeros hide errors."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
                # Positive around one for what scales; small and of both signs else, so that signals live through many layers.
                scales = name.endswith(("running_var", "norm.weight", "Norm.weight", "normalization.weight", "bn.weight"))
                fan = max(1, value[0].numel() if value.ndim > 1 else 4)
                value.copy_(0.5 + noise if scales else (noise - 0.5) * 3.4 / fan**0.5)
