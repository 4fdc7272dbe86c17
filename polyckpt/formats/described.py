"""What the tensors of a file mean, told by a live model that has the very same ones.

Most formats hold names and values, and not what a layer is. A model whose tensors have those names and shapes says it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from polyckpt import names, registry
from polyckpt.adapter import Contents, ModelCapture
from polyckpt.errors import MismatchError, Problem
from polyckpt.leaves import Leaf


@dataclass(frozen=True)
class Like:
    """A live model, and optimizer, whose names those of a file may be.

    required: whether the caller said that it is so; otherwise it is one into which something is to be loaded.
    """

    adapter: str
    model: Any
    optimizer: Any
    captured: ModelCapture
    required: bool

    @classmethod
    def of(cls, model: Any, optimizer: Any = None, tx: Any = None, *, required: bool) -> Like:
        """Of live objects as `load` takes them."""
        adapter = registry.adapter_for(model, "like" if required else "model")
        parts = adapter.parts(model, optimizer, tx)
        return cls(adapter.name, parts.model, parts.optimizer, adapter.capture_model(parts.model), required)


def contents_of(weights: Mapping[str, Leaf], like: Like | None, *, adapter: str, type: str, **more: Any) -> Contents:
    """The contents of a file that holds names and values alone.

    adapter, type: where no `like` says them. more: further members of it.
    """
    if like is not None and (model := fitted(weights, like)) is not None:
        return Contents(adapter=like.adapter, model=model, **more)
    named = aligned(weights, like) if like is not None and like.adapter == adapter else weights
    return Contents(adapter=adapter, model=ModelCapture(type=type, weights=named, order="definition"), **more)


def fitted(weights: Mapping[str, Leaf], like: Like | None) -> ModelCapture | None:
    """The capture of `like` with the tensors of a file in place of its own, where it has their names and shapes.

    The names of the file may all begin with something more (the attribute of a trainer that holds the model), or all with
    something less. Tied tensors may be there once. None where there is no `like` or it is another model; raises MismatchError,
    naming each difference, where the caller requires it.
    """
    if like is None:
        return None
    live = like.captured.weights
    weights = _undotted(weights, live)
    for more, less in _prefixes(weights, live):
        renamed = {less + name.removeprefix(more): leaf for name, leaf in weights.items()}
        tied = {name: renamed[first] for name, first in _tied(live).items() if name not in renamed and first in renamed}
        named = {name: renamed[name] if name in renamed else tied[name] for name in live if name in renamed or name in tied}
        if renamed.keys() <= live.keys() == named.keys() and not list(_misshapen(named, live)):
            return dataclasses.replace(like.captured, weights=named, rng=None)
    if like.required:
        raise MismatchError("the tensors of the file are not those of `like`:", list(problems_of(weights, like)))
    return None


def _undotted(weights: Mapping[str, Leaf], live: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
    """The tensors under the names of a model, where the file joins with dots what is joined with slashes there."""
    dotted = {".".join(names.split(name)): name for name in live}
    return {dotted[name]: leaf for name, leaf in weights.items()} if dotted.keys() == weights.keys() else weights


def aligned(weights: Mapping[str, Leaf], like: Like | None) -> Mapping[str, Leaf]:
    """The tensors of a file that holds more than those of `like`, or less, under the names that `like` has for them.

    That is where all of one are in the other, below one prefix; so what is left over can be told, or left alone.
    """
    if like is None or not weights or not like.captured.weights:
        return weights
    live = like.captured.weights
    tied = _tied(live)
    shared = {name for name in live if name not in tied} or set(live)
    inside = {prefix for prefix in _below(weights, shared) if _all_fit(weights, live, shared, prefix)}
    if len(inside) == 1:
        prefix = inside.pop()
        renamed = {name.removeprefix(prefix): leaf for name, leaf in weights.items()}
        return renamed if len(renamed) == len(weights) else weights
    around = {prefix for prefix in _below(live, set(weights)) if _all_fit(live, weights, set(weights), prefix)}
    if len(around) != 1:
        return weights
    prefix = around.pop()
    return {prefix + name: leaf for name, leaf in weights.items()}


def _below(longer: Mapping[str, Leaf], shorter: set[str]) -> set[str]:
    """The prefixes below which a name of `shorter` is among `longer`."""
    one = max(shorter, key=len)
    return {name.removesuffix(one) for name in longer if name.endswith(f".{one}")}


def _all_fit(longer: Mapping[str, Leaf], shorter: Mapping[str, Leaf], names: set[str], prefix: str) -> bool:
    return all(prefix + name in longer and longer[prefix + name].shape == shorter[name].shape for name in names)


def _prefixes(weights: Mapping[str, Leaf], live: Mapping[str, Leaf]) -> Iterator[tuple[str, str]]:
    """What all names of a file may have more or less than those of a model: at most one of the two is not empty."""
    yield "", ""
    for longer, shorter, file_is_longer in ((weights, live, True), (live, weights, False)):
        if longer and shorter:
            one = min(longer, key=len)
            for name in shorter:
                if one.endswith(name) and len(one) > len(name):
                    prefix = one.removesuffix(name)
                    if all(each.startswith(prefix) for each in longer):
                        yield (prefix, "") if file_is_longer else ("", prefix)


def _tied(live: Mapping[str, Leaf]) -> dict[str, str]:
    """Each further name of a tensor -> another one of the same."""
    groups: dict[Any, list[str]] = {}
    for name, leaf in live.items():
        if leaf.identity is not None:
            groups.setdefault((leaf.dtype, leaf.identity), []).append(name)
    return {name: other for names in groups.values() for name in names for other in names if other != name}


def _misshapen(weights: Mapping[str, Leaf], live: Mapping[str, Leaf]) -> Iterator[Problem]:
    for name in weights.keys() & live.keys():
        if weights[name].shape != live[name].shape:
            yield Problem("shape", "weights", name, stored=_shown(weights[name]), live=_shown(live[name]))


def problems_of(weights: Mapping[str, Leaf], like: Like) -> Iterator[Problem]:
    """In what the tensors of a file differ from those of `like`, by name."""
    live = like.captured.weights
    for name in live:
        if name not in weights:
            yield Problem("missing", "weights", name, live=_shown(live[name]))
    for name in weights:
        if name not in live:
            yield Problem("unexpected", "weights", name, stored=_shown(weights[name]))
    yield from _misshapen(weights, live)


def _shown(leaf: Leaf) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
