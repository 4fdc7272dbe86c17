"""Seeing the calls of linen's and Haiku's modules, which exist only while a function runs, as those of dicts in a tree."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from polyckpt import names
from polyckpt.adapters.jax import calls
from polyckpt.adapters.jax.calls import Seen
from polyckpt.schema import Layer


def interceptors(described: Mapping[str, tuple[Any, Layer]]) -> Iterator[AbstractContextManager[Any]]:
    """Contexts in which calls of modules are seen, of the libraries that the program uses."""
    index = _Index()
    for path, (node, layer) in described.items():
        if isinstance(node, Mapping):
            index.add(path, node, layer.kind)
    if not index.entries:
        return
    if linen := sys.modules.get("flax.linen"):
        yield linen.intercept_methods(_linen(index, linen))
    if haiku := sys.modules.get("haiku"):
        yield haiku.intercept_methods(_haiku(index, haiku))


@dataclass(frozen=True)
class _Entry:
    """A described dict: the segments of its path; whole: whether its tensors are in dicts of its own."""

    segments: tuple[str, ...]
    kind: str
    path: str
    whole: bool


@dataclass
class _Index:
    """Described dicts by the identity of their arrays, or else by the ends of their paths."""

    entries: list[_Entry] = field(default_factory=list)
    _by_array: dict[int, list[_Entry]] = field(default_factory=lambda: defaultdict(list))

    def add(self, path: str, node: Mapping[Any, Any], kind: str) -> None:
        own, below = _arrays(node)
        entry = _Entry(tuple(names.split(path)), kind, path, whole=not own)
        self.entries.append(entry)
        for array in own or below:
            self._by_array[id(array)].append(entry)

    def find(self, tail: tuple[str, ...], own: Iterable[Any], below: Iterable[Any]) -> _Entry | None:
        """The dict of the module with the path `tail`, which holds `own` arrays, and others `below` in its parts.

        Arrays that the caller changed on their way (another type) are not those of the tree; then the path decides.
        """
        own = list(own)
        found = {entry for array in own or below for entry in self._by_array.get(id(array), ()) if entry.whole == (not own)}
        if len(found) != 1:
            found = {entry for entry in found or self.entries if tail and entry.segments[-len(tail) :] == tail}
            least = min((len(entry.segments) for entry in found), default=0)
            found = {entry for entry in found if len(entry.segments) == least}
        return found.pop() if len(found) == 1 else None


def _arrays(node: Mapping[Any, Any]) -> tuple[list[Any], list[Any]]:
    """The arrays of a dict, and those of the dicts in it."""
    own = [child for child in node.values() if hasattr(child, "shape")]
    dicts = [child for child in node.values() if isinstance(child, Mapping)]
    return own, [child for each in dicts for child in each.values() if hasattr(child, "shape")]


def _linen(index: _Index, linen: Any) -> Any:
    def intercept(function: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any], context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return function(*arguments, **keywords)
        if isinstance(module, linen.RNN):
            return calls.unroll(function, arguments, keywords)
        parts = [_arrays(collection) for collection in module.variables.values()]
        own, below = ([array for part in parts for array in part[place]] for place in (0, 1))
        entry = index.find(tuple(map(str, module.path)), own, below)
        if entry is None:
            return function(*arguments, **keywords)
        return calls.call(Seen(entry.path, entry.kind, last=True), function, arguments, keywords)

    return intercept


def _haiku(index: _Index, haiku: Any) -> Any:
    def intercept(function: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any], context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return function(*arguments, **keywords)
        key = module.module_name
        is_lstm = isinstance(module, haiku.LSTM)
        # What a tree shows of an LSTM is the linear layer in it; of a norm without parameters, its means.
        keys = [f"{key}/linear"] if is_lstm else [key, f"{key}/~/mean_ema"] if isinstance(module, haiku.BatchNorm) else [key]
        arrays = module.params_dict().items()
        found = (index.find((each,), [array for name, array in arrays if name.rpartition("/")[0] == each], ()) for each in keys)
        entry = next((each for each in found if each is not None), None)
        if entry is None or is_lstm != (entry.kind == "lstm"):
            return function(*arguments, **keywords)
        return calls.call(Seen(entry.path, entry.kind), function, arguments, keywords)

    return intercept
