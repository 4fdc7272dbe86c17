"""In what two checkpoints differ: what there is of each tensor, and by how much its values do, also across frameworks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from polyckpt import plans
from polyckpt.checkpoint import Checkpoint, StoredTensor
from polyckpt.conversion import side_of
from polyckpt.converted import Converted
from polyckpt.plans import Plan


@dataclass(frozen=True)
class Entry:
    """One tensor or value of two checkpoints.

    section: weights, optimizer, state or run. one, other: what each holds of it, "" for nothing. largest: the largest absolute
    difference of an element, 0 where all bits agree, infinite where only one is finite; None where they cannot be compared.
    """

    section: str
    name: str
    one: str
    other: str
    largest: float | None = None

    @property
    def differs(self) -> bool:
        """Whether anything does."""
        return self.largest != 0.0 or self.one != self.other


def plan_between(one: Checkpoint, other: Checkpoint, rules: Mapping[str, str] | None = None) -> Plan:
    """How the weights of one would become those of the other; the arguments are those of `polyckpt.plan`."""
    sides = [side_of(one), side_of(other)]
    if rules or not _are_named_alike(one, other):
        return plans.make(*sides, rules=rules)
    for index, each in enumerate((one, other)):
        if not each.manifest.model.layers:
            # What has the names of the other is what the other says.
            told = sides[1 - index]
            sides[index] = replace(sides[index], units=told.units, order=told.order, aliases=told.aliases)
    plan = plans.make(*sides, pairs=[(unit.path, unit.path, None) for unit in sides[1].units])
    return replace(plan, pairs=tuple(replace(pair, evidence="names and shapes") for pair in plan.pairs))


def _are_named_alike(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two hold tensors of the same names and shapes, which mean the same: of one adapter, or one does not say whose."""
    adapters = {each.manifest.producer.adapter for each in (one, other)}
    if len(adapters) > 1 and all(each.manifest.model.layers for each in (one, other)):
        return False
    shapes = [{name: tensor.shape for name, tensor in each.weights.stored.items()} for each in (one, other)]
    return shapes[0] == shapes[1]


def compare(one: Checkpoint, other: Checkpoint, rules: Mapping[str, str] | None = None) -> Iterator[Entry]:
    """Everything that both hold or one of them does.

    Weights go by their names where one adapter wrote both and no rules are given, else by the plan between the two: those of
    `one` are compared in the layout of `other`. Slots of the optimizer go by their names. Raises PlanError for rules that fit
    nothing, CorruptError for bytes that have changed.
    """
    yield from _of_run(one, other)
    same = one.manifest.producer.adapter == other.manifest.producer.adapter
    if not rules and (same or _are_named_alike(one, other)):
        yield from _by_name("weights", one.weights.stored, other.weights.stored)
    else:
        yield from _by_plan(one, other, rules)
    if same:
        yield from _by_name("optimizer", one.optimizer.stored, other.optimizer.stored)
        yield from _by_name("state", one.state.stored, other.state.stored)


def _of_run(one: Checkpoint, other: Checkpoint) -> Iterator[Entry]:
    alike = one.manifest.producer.adapter == other.manifest.producer.adapter
    sides = [_values(each, settings=alike) for each in (one, other)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = (side.get(name, "") for side in sides)
        yield Entry("run", name, a, b, largest=0.0 if a == b else None)


def _values(checkpoint: Checkpoint, *, settings: bool) -> dict[str, str]:
    """Where the run was. settings: whether to tell what is of one framework too."""
    manifest = checkpoint.manifest
    found: dict[str, Any] = msgspec.to_builtins(manifest.progress)
    found |= {f"metric {name}": value for name, value in msgspec.to_builtins(manifest.metrics).items()}
    if settings:
        found["model"] = manifest.model.type
    if settings and manifest.optimizer:
        found["optimizer"] = manifest.optimizer.type
        for index, group in enumerate(manifest.optimizer.groups):
            values = msgspec.to_builtins(group.hyperparameters)
            found |= {f"{name} of group {index}": value for name, value in values.items()}
    return {name: str(value) for name, value in found.items() if value is not None}


def _by_name(section: str, one: Mapping[str, StoredTensor], other: Mapping[str, StoredTensor]) -> Iterator[Entry]:
    for name in dict.fromkeys([*one, *other]):
        yield _entry(section, name, one.get(name), other.get(name))


def _by_plan(one: Checkpoint, other: Checkpoint, rules: Mapping[str, str] | None) -> Iterator[Entry]:
    plan = plan_between(one, other, rules)
    made, _ = plan.moves()
    stored, used = one.weights.stored, set()
    for name, tensor in other.weights.stored.items():
        moves = made.get(name, ())
        sources = list(dict.fromkeys(piece.tensor for move in moves for piece in move.sources))
        used |= set(sources)
        converted = Converted(name, tensor.dtype, tensor.shape, moves, stored) if sources else None
        shown = f"{name} <- {', '.join(sources)}" if sources and sources != [name] else name
        yield _entry("weights", shown, converted, tensor)
    aliases = one.manifest.model.aliases
    for name, tensor in stored.items():
        if not {name, aliases.get(name, name)} & (used | {aliases.get(each, each) for each in used}):
            yield _entry("weights", name, tensor, None)


def _entry(section: str, name: str, one: StoredTensor | None, other: StoredTensor | None) -> Entry:
    a, b = ("" if each is None else str(each) for each in (one, other))
    if one is None or other is None or one.shape != other.shape:
        return Entry(section, name, a, b)
    if not isinstance(one, Converted) and one.dtype == other.dtype and one.checksums == other.checksums:
        return Entry(section, name, a, b, largest=0.0)
    return Entry(section, name, a, b, largest=_largest(one.numpy(), other.numpy()))


_AT_ONCE = 1 << 22


def _largest(one: np.ndarray, other: np.ndarray) -> float:
    """The largest |a - b|; equal infinities and NaN in the same place do not differ."""
    if not one.size:
        return 0.0
    flat, found = (one.reshape(-1), other.reshape(-1)), 0.0
    for start in range(0, one.size, _AT_ONCE):
        a, b = (_wide(each[start : start + _AT_ONCE]) for each in flat)
        with np.errstate(invalid="ignore"):
            apart = np.where((a == b) | ((a != a) & (b != b)), 0.0, np.abs(a - b))
        found = max(found, float(np.where(np.isfinite(apart), apart, np.inf).max()))
    return found


def _wide(values: np.ndarray) -> np.ndarray:
    """Values in a type in which they can be subtracted."""
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)
