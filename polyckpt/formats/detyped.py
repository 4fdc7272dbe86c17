"""Trees that lost their types when they were saved: nested dicts of arrays, where classes, tuples and field names were.

A live object finds its leaves in them by names and shapes. Without one, evidence tells weights from the state of an optimizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyckpt import names
from polyckpt.adapter import Contents, ModelCapture, OptimizerCapture
from polyckpt.dtypes import lookup
from polyckpt.errors import MismatchError, UnsupportedError
from polyckpt.formats import table
from polyckpt.formats.described import Like, problems_of
from polyckpt.leaves import Leaf

_VALUE = "value"
"""The level that an nnx Variable adds."""

_FIELDS = {
    "mu": "first_moment",
    "nu": "custom",  # second moments, or the infinity norm of adamax
    "nu_max": "custom",
    "trace": "momentum",
    "sum_of_squares": "squared_sum",
    "count": "step",
    "mini_step": "custom",
    "gradient_step": "custom",
    "acc_grads": "custom",
    "e_g": "custom",
    "e_x": "custom",
    "v_row": "custom",
    "v_col": "custom",
    "hyperparams": "custom",
    "ns_coeffs": "custom",
}
"""Names of fields of optax's states -> what such a field holds, whatever the state."""

_TELLING = frozenset({"mu", "nu", "trace", "sum_of_squares"})
"""Those of which a name alone says that it is of a state."""

_STEP, _COUNT = "step", "count"


@dataclass(frozen=True)
class Found:
    """Leaves that were looked for, by the names looked for. prefix: before them in the tree."""

    leaves: Mapping[str, Leaf]
    prefix: str = ""


@dataclass(frozen=True)
class Tree:
    """Leaves by name: segments joined as names are. texts: the strings among them."""

    leaves: Mapping[str, Leaf]
    texts: Mapping[str, str] = field(default_factory=dict)

    def find(self, wanted: Mapping[str, tuple[int, ...] | None], where: str) -> Found | None:
        """The leaves of these names and shapes (None: any), all of which may stand below one prefix; None where they are not.

        Raises UnsupportedError where they stand below several prefixes of one length: which is meant cannot be told.
        """
        if not wanted:
            return Found({})
        there = self._without_value_level()
        longest = max(wanted, key=len)
        prefixes = [name.removesuffix(longest) for name in there if name == longest or name.endswith(f"/{longest}")]
        fitting = []
        for prefix in prefixes:
            found = {name: there[prefix + name] for name in wanted if prefix + name in there}
            if len(found) == len(wanted) and all(shape in (None, found[name].shape) for name, shape in wanted.items()):
                fitting.append((prefix.count("/"), prefix, found))
        fitting.sort(key=lambda each: each[:2])
        if len(fitting) > 1 and fitting[0][0] == fitting[1][0]:
            told = ", ".join(repr(prefix.rstrip("/")) for depth, prefix, _ in fitting if depth == fitting[0][0])
            raise UnsupportedError(f"{where}: what is looked for stands below {told} alike: which is meant cannot be told")
        return Found(fitting[0][2], fitting[0][1]) if fitting else None

    def _without_value_level(self) -> dict[str, Leaf]:
        short = {name.removesuffix(f"/{_VALUE}"): leaf for name, leaf in self.leaves.items()}
        return {**short, **self.leaves} if len(short) == len(self.leaves) else dict(self.leaves)


def contents_of(where: str, tree: Tree, like: Like | None, left_out: Sequence[str], **more: Any) -> Contents:
    """The contents of a tree. where: for errors. more: further members, with metrics and progress.

    Raises MismatchError where a `like` that is required is not in it.
    """
    told = list(left_out)
    split = _Split.of(tree)
    counted = split.step(told)
    taken = counted if counted is not None else more.get("step")
    if more.get("step") is None:
        more["step"] = counted
    if like is not None:
        wanted = {name: leaf.shape for name, leaf in like.captured.weights.items()} | dict.fromkeys(numbers_of(like), ())
        # What the state of an optimizer holds beside each weight has the same names.
        weights = Tree(split.weights).find(wanted, where) or tree.find(wanted, where)
        if weights is None:
            # Of the same names: then it is their shapes that differ, which is told of each.
            weights = Tree(split.weights).find(dict.fromkeys(wanted), where)
            if like.required:
                there = tree.leaves if weights is None else weights.leaves
                raise MismatchError(f"{where}: the tensors of `like` are not in it:", list(problems_of(there, like)))
        if like.optimizer is None and split.slots:
            told.append("optimizer: a state, and no live one to say what it is: pass like=(model, optimizer)")
        if weights is not None:
            found: Contents = table.call(
                "polyckpt.adapters.jax.detyped:contents_of",
                where,
                "polyckpt[jax]",
                where,
                tree,
                weights,
                like,
                told,
                more,
                taken,
            )
            return found
    told += [f"{name}: {text!r:.80}, which is no array" for name, text in tree.texts.items()]
    optimizer = None
    if split.slots:
        optimizer = _optimizer(split.slots, split.weights, taken)
        told.append(
            "which optimizer its state is of: its fields do not tell adam from nadam or adamax: pass like= what was saved"
        )
    model = ModelCapture(type="pytree", weights=split.weights, order="name", native=None)
    return Contents(adapter="jax", model=model, optimizer=optimizer, left_out=told, **more)


def numbers_of(like: Like) -> list[str]:
    """The names of Python's numbers in a live model, which are arrays of no axes in a file."""
    values = like.captured.native["values"]
    return [name for name, value in values.items() if isinstance(value, bool | int | float | complex)]


def number(leaf: Leaf) -> Any:
    """The value of a leaf of one element."""
    return leaf.read().reshape(-1).view(lookup(leaf.dtype, "").numpy)[0].item()


def leaf_of(value: bool | int | float | complex) -> Leaf:
    """A number of Python as a leaf of no axes."""
    array = np.asarray(value)
    return Leaf(dtype=array.dtype.name, shape=(), read=lambda: array, frozen=True)


def _plain(name: str) -> str:
    return name.removesuffix(f"/{_VALUE}")


@dataclass(frozen=True)
class _Split:
    """A tree taken apart: weights, slots of optimizers, and how many steps were taken."""

    weights: Mapping[str, Leaf]
    slots: Mapping[str, Leaf]
    steps: Mapping[str, Leaf]

    @classmethod
    def of(cls, tree: Tree) -> _Split:
        """Slots are all below what has nothing but fields of optax's states somewhere below it, weights what is left."""
        paths = {name: tuple(names.split(_plain(name))) for name in tree.leaves}
        roots = _states(paths.values())
        slots = {name for name, path in paths.items() if any(path[:length] in roots for length in range(1, len(path)))}
        # A tree that is nothing but such states is the optimizer's own; weights named so are weights.
        if len(slots) == len(tree.leaves):
            return cls(tree.leaves, {}, {})
        beside = {(), *(root[:-1] for root in roots)}
        steps = {
            name
            for name, path in paths.items()
            if path and path[-1] == _STEP and _is_count(tree.leaves[name]) and (path[:-1] in beside or name in slots)
        }
        return cls(
            weights={name: leaf for name, leaf in tree.leaves.items() if name not in slots and name not in steps},
            slots={name: leaf for name, leaf in tree.leaves.items() if name in slots},
            steps={name: leaf for name, leaf in tree.leaves.items() if name in steps},
        )

    def step(self, left_out: list[str]) -> int | None:
        """The step that a train state has, or else the counts of its optimizer, where they agree."""
        counts = [leaf for name, leaf in self.slots.items() if names.split(_plain(name))[-1] == _COUNT and _is_count(leaf)]
        for found in (self.steps.values(), counts):
            values = {number(leaf) for leaf in found}
            if len(values) == 1 and min(values) >= 0:
                return int(values.pop())
            if values and found is not counts:
                left_out += [f"{name}: {number(leaf)}, of several steps" for name, leaf in self.steps.items()]
                return None
        return None


def _is_count(leaf: Leaf) -> bool:
    return not leaf.shape and np.issubdtype(lookup(leaf.dtype, "").numpy, np.integer)


def _states(paths: Collection[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The roots of the states of optimizers in a tree: as far up as there is not a weight below them.

    Each slot mirrors the weights: so what has the path of one of its tensors, and is in no state, is a weight.
    """
    below: dict[tuple[str, ...], set[str]] = {}
    for path in paths:
        for length in range(len(path)):
            below.setdefault(path[:length], set()).add(path[length])
    owners = {path for path, fields in below.items() if path and fields & _TELLING and fields <= _FIELDS.keys()}
    mirrored: dict[tuple[str, ...], tuple[str, ...]] = {}
    weights: dict[str, list[tuple[str, ...]]] = {}
    for path in paths:
        owner = next((path[:length] for length in range(1, len(path)) if path[:length] in owners), None)
        if owner is not None and path[len(owner)] in _TELLING:
            mirrored[owner] = max(mirrored.get(owner, ()), path[len(owner) + 1 :], key=len)
        elif owner is None and path and not set(path) & _FIELDS.keys():
            weights.setdefault(path[-1], []).append(path)
    return {owner[: _shared(owner, rest, weights) + 1] for owner, rest in mirrored.items()}


def _shared(owner: tuple[str, ...], rest: tuple[str, ...], weights: Mapping[str, list[tuple[str, ...]]]) -> int:
    """How many segments a state shares with the nearest weight whose path ends with `rest`."""
    shared = 0
    for path in weights.get(rest[-1], ()) if rest else ():
        if path[-len(rest) :] != rest:
            continue
        length = next((at for at, (one, other) in enumerate(zip(owner, path, strict=False)) if one != other), 0)
        # What an unknown transformation of the same chain keeps is no weight.
        if length == len(owner) - 1 and owner[-1].isdigit() and len(path) != len(owner) + len(rest):
            continue
        shared = max(shared, length)
    return shared


def _optimizer(slots: Mapping[str, Leaf], weights: Mapping[str, Leaf], step: int | None) -> OptimizerCapture:
    found: dict[str, dict[str, Leaf]] = {}
    meanings: dict[str, str] = {}
    for name, leaf in slots.items():
        segments = names.split(_plain(name))
        at = next((place for place, segment in enumerate(segments) if segment in _FIELDS), len(segments) - 1)
        slot, rest = names.join(segments[: at + 1]), names.join(segments[at + 1 :])
        found.setdefault(slot, {})[next(iter(_named(rest, weights)), rest)] = leaf
        meanings[slot] = _FIELDS.get(segments[at], "custom")
    return OptimizerCapture(type="optax", family="custom", slots=found, meanings=meanings, step=step, native={"detyped": True})


def _named(parameter: str, weights: Mapping[str, Leaf]) -> Iterator[str]:
    """The one weight that a parameter of a state is."""
    fitting = [name for name in weights if _plain(name) == parameter or _plain(name).endswith(f"/{parameter}")]
    if len(fitting) == 1:
        yield fitting[0]
