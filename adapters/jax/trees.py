"""Pytrees and nnx module graphs as named leaves, and building them again with other leaves.

A leaf's name joins the keys, indices and field names on its path. An nnx Variable adds no segment. What is no array and no
Python value (functions, classes, `None`, empty states) is structure: the template has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import msgspec

from polyckpt import names
from polyckpt.adapter import Restore
from polyckpt.adapters.jax import arrays
from polyckpt.adapters.jax.arrays import Stored
from polyckpt.errors import CorruptError, Problem, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.residue import MAX_DEPTH, TensorRef


class Entry(msgspec.Struct, frozen=True):
    """One leaf: `path` in segments, `name` as they are joined, and the class of the nnx Variable that holds it, if any."""

    path: tuple[Any, ...]
    name: str
    value: Any
    variable: type | None


def nnx() -> Any:
    """The module flax.nnx where the program uses it."""
    return sys.modules.get("flax.nnx")


def opaque() -> Callable[[Any], bool] | None:
    """What tells Variables and nnx objects, which are leaves here; None where the program has none."""
    if (module := nnx()) is None:
        return None
    classes = (module.Variable, module.Pytree)
    return lambda value: isinstance(value, classes)


def is_variable(value: Any) -> bool:
    """Whether `value` is an nnx Variable."""
    return (module := nnx()) is not None and isinstance(value, module.Variable)


def is_graph(value: Any) -> bool:
    """Whether `value` is an nnx object (Module, Optimizer, Rngs, Metric), which is updated in place."""
    return (module := nnx()) is not None and isinstance(value, module.Pytree)


def is_state(value: Any) -> bool:
    """Whether `value` is a State of Equinox: what the stateful layers of a model keep, beside the model."""
    module = sys.modules.get("equinox")
    return module is not None and isinstance(value, module.nn.State)


def is_random(entry: Entry) -> bool:
    """Whether a leaf is a random state of an nnx module."""
    return entry.variable is not None and issubclass(entry.variable, nnx().RngState)


def graphs(tree: Any) -> list[Any]:
    """The nnx objects in a tree, without those that they hold."""
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=opaque()) if is_graph(leaf)] if nnx() else []


def is_node(value: Any) -> bool:
    """Whether JAX takes `value` for a container, not for a leaf."""
    return not jax.tree_util.treedef_is_leaf(jax.tree_util.tree_structure(value))


def children(node: Any) -> list[tuple[Any, Any]]:
    """The segments and values one level below a container."""
    pairs = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda value: value is not node)[0]
    return [(segment(keys[0]), child) for keys, child in pairs if keys]


_CONTAINERS = (dict, list, tuple, Mapping)


def check_depth(tree: Any, where: str, depth: int = 0) -> None:
    """Raises UnsupportedError for what contains itself: JAX would not only fail, but break Python's recursion limit."""
    if not isinstance(tree, _CONTAINERS):
        return
    below = tree.values() if isinstance(tree, Mapping) else tree
    if below and depth == MAX_DEPTH:
        raise UnsupportedError(f"{where}: nested deeper than {MAX_DEPTH} levels, or contains itself")
    for child in below:
        if not arrays.is_array(child):
            check_depth(child, where, depth + 1)


def entries(tree: Any, where: str) -> dict[str, Entry]:
    """Every leaf that has a value, by name. Raises UnsupportedError for what cannot be named or stored."""
    check_depth(tree, where)
    found: dict[str, Entry] = {}
    for path, value, variable in _walk(tree, (), None, where):
        if arrays.is_static(value):
            continue
        name = names.join(path)
        if not arrays.is_array(value) and type(value) not in arrays.PYTHON:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise UnsupportedError(
                f"{where}: {name}: a {kind} cannot be stored. Leaves are arrays, numbers, strings and functions; mark the "
                "field static where it is structure (equinox.field(static=True), flax.struct.field(pytree_node=False))"
            )
        if name in found:
            raise UnsupportedError(f"{where}: two leaves are named {name!r}: keys that differ only in type")
        found[name] = Entry(path, name, value, variable)
    return found


def variable_paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every nnx Variable with its path; a shared one has one path."""
    for at, leaf in _flatten(tree, "model", path)[0]:
        if is_variable(leaf):
            yield leaf, at
        elif is_graph(leaf):
            yield from variable_paths(nnx().state(leaf), at)


def rebuild(tree: Any, values: Mapping[str, Any], path: tuple[Any, ...] = ()) -> Any:
    """The tree with `values` by name in the places of its leaves. nnx objects are updated in place, all else is new."""
    leaves, treedef = _flatten(tree, "model", path)
    is_opaque = opaque()
    return treedef.unflatten(
        [
            _updated(leaf, values, at) if is_opaque and is_opaque(leaf) else values.get(names.join(at), leaf)
            for at, leaf in leaves
        ]
    )


def capture(found: Mapping[str, Entry], where: str) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """The tensors among `found` by the names given, and all else about them, as a tree for polyckpt.residue."""
    tensors: dict[str, Leaf] = {}
    values: dict[str, Any] = {}
    for name, entry in found.items():
        if arrays.is_array(entry.value):
            tensors[name] = arrays.leaf(entry.value, f"{where}: {name}")
        else:
            values[name] = entry.value
    weak = [name for name, leaf in tensors.items() if leaf.kind == "jax.weak"]
    keys = {name: leaf.kind.partition(":")[2] for name, leaf in tensors.items() if leaf.kind.startswith("jax.key:")}
    return tensors, {"values": values, "weak": weak, "keys": keys}


def as_tree(found: Mapping[str, Entry], where: str) -> dict[str, Any]:
    """`found` as one tree for polyckpt.residue, tensors included."""
    tensors, native = capture(found, where)
    return {"tensors": tensors, **native}


def from_tree(tree: Any, where: str) -> dict[str, Stored]:
    """What `as_tree` stored; nothing for None."""
    if tree is None:
        return {}
    refs = tree.get("tensors") if isinstance(tree, dict) else None
    if not isinstance(refs, dict) or not all(isinstance(ref, TensorRef) for ref in refs.values()):
        raise CorruptError(f"{where}: native residue holds {tree!r:.80}, which is no pytree")
    return arrays.stored_leaves({name: ref.stored for name, ref in refs.items()}, tree, where)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Live leaves against stored ones: what differs, and what fits as (name in the live tree, live value, stored leaf)."""

    problems: Sequence[Problem]
    fitting: Sequence[tuple[str, Any, Stored]]


def compare(live: Mapping[str, Entry], stored: Mapping[str, Stored], section: str) -> Comparison:
    """Compare by the keys of both mappings, which may be other names than those in the live tree."""
    problems: list[Problem] = []
    fitting: list[tuple[str, Any, Stored]] = []
    for name, entry in live.items():
        if name not in stored:
            problems.append(Problem("missing", section, name, live=arrays.show(entry.value)))
        elif found := arrays.mismatch(entry.value, stored[name], section, name):
            problems.append(found)
        else:
            fitting.append((entry.name, entry.value, stored[name]))
    problems += [Problem("unexpected", section, name, stored=str(stored[name])) for name in stored if name not in live]
    return Comparison(problems, fitting)


def restore(tree: Any, comparisons: Sequence[Comparison]) -> Restore:
    """The restore of all that fits into `tree`."""
    fitting = [each for comparison in comparisons for each in comparison.fitting]

    def apply() -> Any:
        made = arrays.make([(live, stored) for _, live, stored in fitting])
        return rebuild(tree, {name: value for (name, _, _), value in zip(fitting, made, strict=True)})

    undo: Callable[[], Any] | None = None
    if found := graphs(tree):
        _check_fillable(found)
        before = {name: live for name, live, _ in fitting}

        def undo() -> Any:
            return rebuild(tree, before)

    return Restore(
        apply=apply,
        problems=[problem for comparison in comparisons for problem in comparison.problems],
        tensors=[stored.tensor for _, _, stored in fitting if stored.tensor is not None],
        undo=undo,
    )


def _check_fillable(graphs: Sequence[Any]) -> None:
    for path, value, variable in (found for graph in graphs for found in _walk(graph, (), None, "model")):
        if variable is None and isinstance(value, jax.ShapeDtypeStruct):
            raise UnsupportedError(
                f"{names.join(path)}: flax cannot put an array into an abstract module that held a bare one. Hold it in an "
                "nnx.Variable, or load into a module with values"
            )


def _walk(
    tree: Any, path: tuple[Any, ...], variable: type | None, where: str
) -> Iterator[tuple[tuple[Any, ...], Any, type | None]]:
    is_opaque = opaque()
    for at, leaf in _flatten(tree, where, path)[0]:
        if is_opaque is None or not is_opaque(leaf):
            yield at, leaf, variable
        elif is_variable(leaf):
            yield from _walk(leaf.get_value(), at, type(leaf), where)
        else:
            yield from _walk(nnx().state(leaf), at, None, where)


def _updated(leaf: Any, values: Mapping[str, Any], path: tuple[Any, ...]) -> Any:
    if is_variable(leaf):
        return leaf.replace(rebuild(leaf.get_value(), values, path))
    nnx().update(leaf, rebuild(nnx().state(leaf), values, path))
    return leaf


def _flatten(tree: Any, where: str, path: tuple[Any, ...]) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """The leaves with their paths, which begin with `path`, and the structure."""
    try:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=opaque())
    except ValueError as error:
        raise UnsupportedError(
            f"{where}: JAX cannot flatten it: {error} The keys of one dict must be of one type that can be sorted"
        ) from error
    return [((*path, *map(segment, keys)), leaf) for keys, leaf in leaves], treedef


def segment(key: Any) -> Any:
    """The segment of a name for a key of JAX."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)
