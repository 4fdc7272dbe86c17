"""What is seen of the calls of described layers: their outputs, and which of them call each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from polyckpt.adapters.jax import marks
from polyckpt.layers import RECURRENT

_CALLS: ContextVar[list[Any]] = ContextVar("calls")
"""The paths of the layers that are being called; for what runs a cell through a sequence, the set of cells it called."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A described layer as its calls need it. last: its output comes after a carry."""

    path: str
    kind: str
    last: bool = False


@contextmanager
def seen() -> Iterator[None]:
    """Calls here are those of one run of the model."""
    token = _CALLS.set([])
    try:
        yield
    finally:
        _CALLS.reset(token)


def call(layer: Seen, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Call a described layer."""
    calls = _CALLS.get()
    if layer.path in calls:  # the call of a base class
        return function(*arguments, **keywords)
    if layer.kind == "linear" and arguments:
        arguments = (marks.reads(jnp.asarray(arguments[0]), layer.path), *arguments[1:])
    output = _within(layer.path, function, arguments, keywords)
    sequence = next((each for each in reversed(calls) if isinstance(each, set)), None)
    if sequence is not None and layer.kind in RECURRENT:
        sequence.add(layer.path)
        return output
    return _told(output, layer.path, last=layer.last and layer.kind in RECURRENT)


def unroll(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Call what runs a cell through a sequence: the whole sequence is what the cell makes, not each step of it."""
    cells: set[str] = set()
    output = _within(cells, function, arguments, keywords)
    return _told(output, cells.pop(), last=True) if len(cells) == 1 else output


def is_array(leaf: Any) -> bool:
    """Whether a leaf of an output is an array of numbers."""
    return hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _within(call: Any, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    calls = _CALLS.get()
    calls.append(call)
    try:
        return function(*arguments, **keywords)
    finally:
        calls.pop()


def _told(output: Any, path: str, *, last: bool) -> Any:
    """`output` with its first tensor told as that of `path`; where it is the `last` of a pair, that of the second part."""
    if last and isinstance(output, tuple) and len(output) == 2:
        return (output[0], _told(output[1], path, last=False))
    leaves, structure = jax.tree.flatten(output)
    place = next((place for place, leaf in enumerate(leaves) if is_array(leaf)), None)
    if place is None:
        return output
    leaves[place] = marks.ran(jnp.asarray(leaves[place]), path)
    return jax.tree.unflatten(structure, leaves)
