"""A model as a plan sees it, and what was flattened into its linear layers.

A linear layer that reads a flattened image or sequence has its inputs in the order of the flattened axes. Where one side has
the channels first and the other last, those inputs change their order; where both models turn their axes alike, they do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from polyckpt import schema
from polyckpt.layers import RECURRENT
from polyckpt.layouts import Piece
from polyckpt.matching import Order
from polyckpt.units import BARE, Unit, units


@dataclass(frozen=True)
class Side:
    """A model as a plan sees it. label: what to call it. tensors: name -> (shape, dtype), tied names included.

    aliases: tied names -> the name of the same tensor. flattened: linear layer -> shape of what was flattened into it.
    """

    label: str
    units: Sequence[Unit]
    order: Order
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    flattened: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        label: str,
        layers: Sequence[schema.Layer],
        order: Order,
        tensors: Mapping[str, tuple[tuple[int, ...], str]],
        aliases: Mapping[str, str],
    ) -> Side:
        """The side of a described model."""
        return cls(
            label, units(layers, {name: shape for name, (shape, _) in tensors.items()}, aliases), order, tensors, aliases
        )

    def seen(self, ran: Sequence[str], flattened: Mapping[str, tuple[int, ...]]) -> Side:
        """This side after it was seen to run. ran: paths of layers, in that order; where some are missing, it says nothing."""
        first: dict[str, int] = {}
        for place, path in enumerate(ran):
            first.setdefault(path, place)
        bare = [unit for unit in self.units if unit.kind == BARE]
        others = [unit for unit in self.units if unit.kind != BARE]
        if not ran or not all(unit.layer in first for unit in others):
            return replace(self, flattened=flattened)
        others.sort(key=lambda unit: (first[unit.layer], unit.place))
        placed = [replace(unit, place=place) for place, unit in enumerate([*others, *bare])]
        return replace(self, units=placed, order="execution", flattened=flattened)

    @property
    def channels(self) -> str | None:
        """Where the channels lie in what its convolutions read, where all agree."""
        told = {str(unit.config["channels"]) for unit in self.units if "channels" in unit.config}
        return told.pop() if len(told) == 1 else None

    @property
    def tied(self) -> list[Unit]:
        """Units that hold nothing but tensors of others."""
        return [unit for unit in self.units if unit.tensors <= self.aliases.keys()]


@dataclass(frozen=True)
class Flatten:
    """The inputs of a linear layer are those of a tensor of `shape`, whose axes the other side has in `order`."""

    shape: tuple[int, ...]
    order: tuple[int, ...]

    def __str__(self) -> str:
        return f"inputs {list(self.shape)} flattened as {[self.shape[axis] for axis in self.order]}"


def flattenings(source: Unit, target: Unit, ours: Side, theirs: Side) -> tuple[Flatten | None, ...]:
    """What the inputs of a linear unit may be, the likeliest first."""
    if source.kind != "linear" or source.part or source.kernel is None:
        return (None,)
    inputs = source.kernel.shape[0]
    here, there = (side.flattened.get(unit.layer) for side, unit in ((ours, source), (theirs, target)))
    here, there = (shape if shape and math.prod(shape) == inputs else None for shape in (here, there))
    turned = None not in (ours.channels, theirs.channels) and ours.channels != theirs.channels
    if here is not None and there is not None:
        return _between(here, there, ours.channels if turned else None)
    if not turned:
        return (None,)
    assert ours.channels is not None and theirs.channels is not None
    if here is not None:
        return _distinct((_moved(here, ours.channels), None))
    if there is not None:
        back = _moved(there, theirs.channels)
        return _distinct((_moved(tuple(there[axis] for axis in back.order), ours.channels), None))
    before = [unit for unit in ours.units if unit.place < source.place]
    channels = [_features(unit) for unit in reversed(before) if unit.kind in ("conv", "conv_transpose")]
    if inputs in {_features(unit) for unit in before}:
        return (None,)
    fitting = [count for count in dict.fromkeys(channels) if count and inputs % count == 0]
    shapes = [(count, inputs // count) if ours.channels == "first" else (inputs // count, count) for count in fitting]
    return _distinct((*(_moved(shape, ours.channels) for shape in shapes), None))


def _between(here: tuple[int, ...], there: tuple[int, ...], channels: str | None) -> tuple[Flatten | None, ...]:
    """From one seen shape to another. channels: where they lie here, None where both sides have them at the same end."""
    if channels is None and here == there:
        return (None,)
    ends = ("first", "last") if channels is None else (channels,)
    moved = [each for each in (_moved(here, end) for end in ends) if tuple(here[axis] for axis in each.order) == there]
    # Where all sizes are equal, shapes do not say whether the axes were turned.
    return _distinct((*moved, *([None] if here == there or not moved else [])))


def _moved(shape: tuple[int, ...], channels: str) -> Flatten:
    """The channels, which lie first or last, on the other end."""
    axes = tuple(range(len(shape)))
    return Flatten(shape, (*axes[1:], 0) if channels == "first" else (axes[-1], *axes[:-1]))


def _distinct(options: Sequence[Flatten | None]) -> tuple[Flatten | None, ...]:
    """Each once, those that change nothing as None."""
    real = (each if each is not None and sum(size > 1 for size in each.shape) > 1 else None for each in options)
    return tuple(dict.fromkeys(real))


def _features(unit: Unit) -> int:
    """How many features a unit makes, 0 where that is not plain."""
    if unit.kind in ("linear", "conv", "conv_transpose"):
        kernel = unit.kernel
        return 0 if kernel is None else kernel.shape[0 if unit.kind == "conv" else 1]
    if unit.kind == "embedding":
        return unit.pieces["embedding"].shape[1]
    if unit.kind in RECURRENT:
        return next(piece.shape[-1] for role, piece in unit.pieces.items() if role.startswith("recurrent_kernel"))
    return 0


def unflattened(source: Unit, flatten: Flatten | None) -> Unit:
    """The source with its inputs in the order that the target has."""
    if flatten is None or source.kernel is None:
        return source
    (inputs,) = source.kernel.order[0]
    # Under spectral norm the singular vector over the inputs is in their order too.
    along = {inputs, "rest"}
    return replace(source, pieces={role: _reordered(piece, along, flatten) for role, piece in source.pieces.items()})


def _reordered(piece: Piece, along: Set[str], flatten: Flatten) -> Piece:
    """A piece with the axis that is one of `along`, if it has one, split and in another order."""
    names = tuple(f"f{axis}" for axis in range(len(flatten.shape)))
    turned = tuple(names[axis] for axis in flatten.order)
    return replace(
        piece,
        axes=tuple(tuple(each for axis in group for each in (names if axis in along else (axis,))) for group in piece.axes),
        sizes={**piece.sizes, **dict(zip(names, flatten.shape, strict=True))},
        order=tuple(turned if set(group) & along else group for group in piece.order),
    )
