"""Trees that lost their types when they were saved: nested dicts of arrays, where classes, tuples and field names were.

A live object finds its leaves in them by names and shapes. Without one, evidence tells weights from the state of an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
}
"""Names of fields of optax's states -> what such a field holds, whatever the state."""

_TELLING = frozenset({"mu", "nu", "trace", "sum_of_squares"})
"""Those of which a name alone says that it is of a state."""

_COUNTS = ("step", "count")


@dataclass(frozen=True)
class Tree:
    """Leaves by name: segments joined as names are."""

    leaves: Mapping[str, Leaf]

    def find(self, wanted: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Leaf] | None:
        """The leaves of these names and shapes, all of which may stand below one prefix; None where they are not there.

        Raises UnsupportedError where they stand below several prefixes of one length: which is meant cannot be told.
        """
        if not wanted:
            return {}
        there = self._without_value_level()
        longest = max(wanted, key=len)
        prefixes = [name.removesuffix(longest) for name in there if name == longest or name.endswith(f"/{longest}")]
        fitting = []
        for prefix in prefixes:
            found = {name: there[prefix + name] for name in wanted if prefix + name in there}
            if len(found) == len(wanted) and all(found[name].shape == shape for name, shape in wanted.items()):
                fitting.append((prefix.count("/"), prefix, found))
        fitting.sort(key=lambda each: each[:2])
        if len(fitting) > 1 and fitting[0][0] == fitting[1][0]:
            told = ", ".join(repr(prefix.rstrip("/")) for depth, prefix, _ in fitting if depth == fitting[0][0])
            raise UnsupportedError(f"{where}: what is looked for stands below {told} alike: which is meant cannot be told")
        return fitting[0][2] if fitting else None

    def _without_value_level(self) -> dict[str, Leaf]:
        short = {name.removesuffix(f"/{_VALUE}"): leaf for name, leaf in self.leaves.items()}
        return {**short, **self.leaves} if len(short) == len(self.leaves) else dict(self.leaves)


def contents_of(where: str, tree: Tree, like: Like | None, left_out: Sequence[str], **more: Any) -> Contents:
    """The contents of a tree. where: for errors. more: further members, with metrics and progress.

    Raises MismatchError where a `like` that is required is not in it.
    """
    told = list(left_out)
    if like is not None:
        wanted = {name: leaf.shape for name, leaf in like.captured.weights.items()}
        weights = tree.find(wanted, where)
        if weights is not None:
            found: Contents = table.call(
                "polyckpt.adapters.jax.detyped:contents_of", where, "polyckpt[jax]", where, tree, weights, like, told, more
            )
            return found
        if like.required:
            raise MismatchError(f"{where}: the tensors of `like` are not in it:", list(problems_of(tree.leaves, like)))
    weights, slots = _told_apart(tree)
    step = more.pop("step", None)
    counts = [leaf for name, leaf in tree.leaves.items() if _plain(name).rpartition("/")[2] in _COUNTS and not leaf.shape]
    if step is None and len(found_counts := {number(leaf) for leaf in counts}) == 1:
        step = found_counts.pop()
    optimizer = None
    if slots:
        optimizer = _optimizer(slots, weights, step)
        told.append(
            "which optimizer its state is of: its fields do not tell adam from nadam or adamax: pass like= what was saved"
        )
    model = ModelCapture(type="pytree", weights=weights, order="name", native=None)
    return Contents(adapter="jax", model=model, optimizer=optimizer, step=step, left_out=told, **more)


def number(leaf: Leaf) -> Any:
    """The value of a leaf of one element."""
    return leaf.read().reshape(-1).view(lookup(leaf.dtype, "").numpy)[0].item()


def leaf_of(value: bool | int | float) -> Leaf:
    """A number of Python as a leaf of no axes."""
    array = np.asarray(value)
    return Leaf(dtype=array.dtype.name, shape=(), read=lambda: array, frozen=True)


def _plain(name: str) -> str:
    return name.removesuffix(f"/{_VALUE}")


def _told_apart(tree: Tree) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Weights, and the state of optimizers: all below what has fields of optax's states somewhere below it."""
    tops = {name: names.split(name)[0] for name in tree.leaves}
    states = {
        tops[name] for name in tree.leaves if set(names.split(_plain(name))[1:]) & {"mu", "nu", "trace", "sum_of_squares"}
    }
    # A tree that is nothing but such states is the optimizer's own; weights named so are weights.
    if states == set(tops.values()):
        states = set()
    weights = {name: leaf for name, leaf in tree.leaves.items() if tops[name] not in states and _plain(name) not in _COUNTS}
    return weights, {name: leaf for name, leaf in tree.leaves.items() if tops[name] in states}


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
