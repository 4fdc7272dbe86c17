"""Native residue: Python values as JSON with tags for what JSON lacks, and tensors by reference.

==================  =============================================================
Python              JSON
==================  =============================================================
None, bool, int,    themselves (integers to 4300 digits)
str, finite float
nan, inf, -inf      {"$float": "nan"}
complex             {"$complex": [real, imaginary]}
bytes               {"$bytes": "base64"}
list                [...]
dict with str keys  {...}, where no key begins with "$"
any other dict      {"$dict": [[key, value], ...]}
tuple               {"$tuple": [...]}
OrderedDict         {"$ordered": [[key, value], ...]}
Counter             {"$counter": [[key, count], ...]}
deque               {"$deque": [...], "maxlen": n or null}
set, frozenset      {"$set": [...]}, {"$frozenset": [...]}
a tensor            {"$tensor": name in the section `state`, "kind": who can rebuild it}
a constant          {"$constant": value, "kind": who can rebuild it}
==================  =============================================================

Nothing is pickled, and no tag can name code. What an adapter's leaf function does not turn into a `Leaf` or a `Constant`
is refused by its path.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyckpt.errors import CorruptError, UnsupportedError
from polyckpt.leaves import Leaf

if TYPE_CHECKING:
    from polyckpt.checkpoint import StoredTensor

MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Constant:
    """A framework's small value (a dtype, a device) as a JSON string, number or list; `kind` names who rebuilds it."""

    kind: str
    value: Any


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor in a decoded tree, not read yet; `make()` reads it, once, into a new tensor of its framework."""

    stored: StoredTensor
    make: Callable[[], Any]


LeafEncoder = Callable[[Any], "Leaf | Constant | None"]
"""Turns a value that JSON cannot hold into a leaf or a constant, or returns None."""


def _key_sort(value: Any) -> tuple[str, str]:
    return type(value).__name__, repr(value)


_SEQUENCES: dict[type, tuple[str, Callable[[Any], list[Any]]]] = {
    tuple: ("$tuple", list),
    # Sets have no order of their own: a sorted one makes equal states equal bytes.
    set: ("$set", lambda value: sorted(value, key=_key_sort)),
    frozenset: ("$frozenset", lambda value: sorted(value, key=_key_sort)),
}
_MAPPINGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}


def encode(
    value: Any, *, leaf: LeafEncoder, add_tensor: Callable[[tuple[Any, ...], Leaf], str], path: tuple[Any, ...] = ()
) -> Any:
    """`value` as JSON-ready builtins; `add_tensor(path, leaf)` stores a tensor and returns its name.

    Raises UnsupportedError naming the path of a value that has no form here.
    """
    if len(path) > MAX_DEPTH:
        raise UnsupportedError(f"{show(path[:6])}...: nested deeper than {MAX_DEPTH} levels, or contains itself")

    def inner(child: Any, key: Any) -> Any:
        return encode(child, leaf=leaf, add_tensor=add_tensor, path=(*path, key))

    kind = type(value)
    if kind in (int, str):
        return _plain(value, path)
    if value is None or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is complex:
        return {"$complex": [inner(value.real, "real"), inner(value.imag, "imag")]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is list:
        return [inner(child, index) for index, child in enumerate(value)]
    if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {_plain(key, path): inner(child, key) for key, child in value.items()}
    if kind in _MAPPINGS:
        return {_MAPPINGS[kind]: [[inner(key, "key"), inner(child, key)] for key, child in value.items()]}
    if kind in _SEQUENCES:
        tag, ordered = _SEQUENCES[kind]
        return {tag: [inner(child, index) for index, child in enumerate(ordered(value))]}
    if kind is deque:
        return {"$deque": [inner(child, index) for index, child in enumerate(value)], "maxlen": value.maxlen}
    try:
        converted = value if isinstance(value, Leaf | Constant) else leaf(value)
    except UnsupportedError as error:
        raise UnsupportedError(f"{show(path)}: {error}") from error
    if isinstance(converted, Leaf):
        return {"$tensor": add_tensor(path, converted), "kind": converted.kind}
    if isinstance(converted, Constant):
        return {"$constant": converted.value, "kind": converted.kind}
    raise UnsupportedError(
        f"{show(path)}: a {kind.__module__}.{kind.__qualname__} cannot be stored. Storable are numbers, strings, None, bytes, "
        "lists, tuples, dicts, sets, arrays, and objects with state_dict() and load_state_dict()"
    )


def _plain(value: int | str, path: tuple[Any, ...]) -> int | str:
    """`value`, which must have a JSON form."""
    if isinstance(value, int):
        try:
            str(value)
        except ValueError as error:  # the interpreter's limit on digits, which the reader has too
            raise UnsupportedError(f"{show(path)}: an integer of {value.bit_length()} bits is too large") from error
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"{show(path)}: {value!r} is not valid Unicode") from error
    return value


@dataclass(frozen=True, slots=True)
class Decoders:
    """What turns references back into values: `tensor(name, kind)` and `constant(value, kind)`."""

    tensor: Callable[[str, str], Any]
    constant: Callable[[Any, str], Any]


def decode(data: Any, decoders: Decoders) -> Any:
    """The value that `encode` was given. Raises CorruptError for a tag or a shape of one that the format lacks."""
    if isinstance(data, list):
        return [decode(child, decoders) for child in data]
    if not isinstance(data, dict):
        return data
    tags = [key for key in data if key.startswith("$")]
    if not tags:
        return {key: decode(child, decoders) for key, child in data.items()}
    try:
        (tag,) = tags
        return _TAGS[tag](data, decoders)
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CorruptError(f"native residue holds {_clip(data)}, which is not of the format: {error!r}") from error


def live(tree: Any) -> Any:
    """A decoded `tree` with every TensorRef read into a tensor of its own."""
    kind = type(tree)
    if kind is TensorRef:
        return tree.make()
    if kind in (list, tuple, set, frozenset):
        return kind(live(child) for child in tree)
    if kind in _MAPPINGS:
        return kind({live(key): live(child) for key, child in tree.items()})
    if kind is deque:
        return deque((live(child) for child in tree), tree.maxlen)
    return tree


def tensors(tree: Any) -> list[StoredTensor]:
    """Every stored tensor that a decoded `tree` refers to."""
    if type(tree) is TensorRef:
        return [tree.stored]
    children = [*tree.keys(), *tree.values()] if isinstance(tree, dict) else tree
    if isinstance(children, list | tuple | set | frozenset | deque):
        return [stored for child in children for stored in tensors(child)]
    return []


def tensor_names(data: Any) -> Iterator[str]:
    """The names of all tensors that encoded `data` refers to."""
    if isinstance(data, dict):
        if isinstance(name := data.get("$tensor"), str):
            yield name
        for child in data.values():
            yield from tensor_names(child)
    elif isinstance(data, list):
        for child in data:
            yield from tensor_names(child)


def _items(data: Any, decoders: Decoders) -> list[Any]:
    if not isinstance(data, list):
        raise TypeError(f"{data!r:.80} is no list")
    return [decode(child, decoders) for child in data]


def _pairs(data: Any, decoders: Decoders) -> list[tuple[Any, Any]]:
    pairs = _items(data, decoders)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise TypeError("its items are not pairs")
    return [(key, child) for key, child in pairs]


def _complex(parts: list[Any]) -> complex:
    if [type(part) for part in parts] != [float, float]:
        raise TypeError("its parts are not two floats")
    return complex(*parts)


def _float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"{text!r} is none of nan, inf, -inf")
    return float(text)


_TAGS: dict[str, Callable[[dict[str, Any], Decoders], Any]] = {
    "$float": lambda data, _: _float(data["$float"]),
    "$complex": lambda data, decoders: _complex(_items(data["$complex"], decoders)),
    "$bytes": lambda data, _: base64.b64decode(data["$bytes"], validate=True),
    "$dict": lambda data, decoders: dict(_pairs(data["$dict"], decoders)),
    "$ordered": lambda data, decoders: OrderedDict(_pairs(data["$ordered"], decoders)),
    "$counter": lambda data, decoders: Counter(dict(_pairs(data["$counter"], decoders))),
    "$tuple": lambda data, decoders: tuple(_items(data["$tuple"], decoders)),
    "$set": lambda data, decoders: set(_items(data["$set"], decoders)),
    "$frozenset": lambda data, decoders: frozenset(_items(data["$frozenset"], decoders)),
    "$deque": lambda data, decoders: deque(_items(data["$deque"], decoders), data["maxlen"]),
    "$tensor": lambda data, decoders: decoders.tensor(data["$tensor"], data["kind"]),
    "$constant": lambda data, decoders: decoders.constant(data["$constant"], data["kind"]),
}


def show(path: tuple[Any, ...]) -> str:
    """A path for people: `extra['ema']['decay'][0]`."""
    head, *rest = path or ("value",)
    return str(head) + "".join(f"[{key!r}]" for key in rest)


def _clip(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 80 else text[:77] + "..."


_CONTAINERS = (list, tuple, Mapping)


def walk(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf of nested dicts, lists and tuples with its path."""
    if not isinstance(tree, _CONTAINERS):
        yield path, tree
        return
    if tree and len(path) == MAX_DEPTH:
        raise UnsupportedError(f"{show(path[:6])}...: nested deeper than {MAX_DEPTH} levels, or contains itself")
    for key, child in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(child, _CONTAINERS):
            yield from walk(child, (*path, key))
        else:  # as nearly all are: it needs no generator of its own
            yield (*path, key), child
