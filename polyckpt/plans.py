"""The plan of a conversion: which unit of a checkpoint becomes which unit of a model, how sure that is, and what it takes.

A plan is made (`make`), looked at (`print`), saved, edited and read back (`Plan.save`, `read`). `Plan.moves` is what carrying
it out consists of, for weights and for any other tensors of the same structure.
"""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from polyckpt import matching, schema
from polyckpt.errors import PlanError
from polyckpt.layouts import Piece
from polyckpt.matching import Class, Order
from polyckpt.units import BARE, OPTIONAL, Unit, units

VERSION = 1
_MAX_LISTED = 12


class Exactness(enum.StrEnum):
    """What happens to a tensor on its way.

    EXACT: every bit of every number arrives, in another layout or a wider type at most. FOLDED: numbers were added up, so that
    outputs agree but training may go on differently. DEFAULT: the checkpoint has none, and the value that stands for none was
    taken. DROPPED: the model has no place for it. APPROXIMATE: rounded to a narrower type.
    """

    EXACT = "exact"
    HYPERPARAMETER = "exact with changed hyperparameter"
    FOLDED = "folded"
    DEFAULT = "default"
    DROPPED = "dropped"
    APPROXIMATE = "approximate"


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
        *,
        ran: Sequence[str] = (),
        flattened: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Side:
        """The side of a described model. ran: paths of its layers in the order in which they were seen to run, if they were."""
        found = units(layers, {name: shape for name, (shape, _) in tensors.items()}, aliases)
        if ran:
            found, complete = _executed(found, ran)
            order = "execution" if complete else order
        return cls(label, found, order, tensors, aliases, flattened or {})

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


@dataclass(frozen=True)
class Pair:
    """One unit of the checkpoint for one of the model; evidence says what settled it, "" that nothing did."""

    source: Unit
    target: Unit
    evidence: str
    flatten: Flatten | None = None


@dataclass(frozen=True)
class Move:
    """What a piece of a live tensor becomes: the sum of `sources`, times `sign`, and a constant; OPTIONAL's value for none."""

    target: Piece
    sources: tuple[Piece, ...]
    constant: float = 0.0
    sign: int = 1

    @property
    def exactness(self) -> Exactness:
        """FOLDED where numbers are added up."""
        if not self.sources:
            return Exactness.DEFAULT
        return Exactness.FOLDED if len(self.sources) > 1 or self.constant else Exactness.EXACT


@dataclass(frozen=True)
class Loss:
    """A piece that the target has no place for; nothing is lost where all of it is `value`."""

    piece: Piece
    value: float | None


@dataclass(frozen=True)
class Row:
    """One line of a plan or report, for people."""

    target: str
    source: str
    how: str
    exactness: Exactness
    evidence: str


@dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes a model. `print` it, `save` it, pass it (or its file) to `load(..., plan=)`.

    pairs: units with their counterparts. unsettled: classes of units that the evidence does not tell apart. dropped,
    missing: units without a counterpart in the model and in the checkpoint. notes: what differs between paired units although
    the weights fit (epsilon, activations, momentum).
    """

    source: Side
    target: Side
    pairs: tuple[Pair, ...]
    unsettled: tuple[Class, ...]
    dropped: tuple[Unit, ...]
    missing: tuple[Unit, ...]
    notes: tuple[str, ...]
    flatten: Mapping[str, tuple[Flatten | None, ...]] = field(default_factory=dict)
    """Target path -> what its inputs may be, the likeliest first, where that is not settled."""

    @property
    def settled(self) -> bool:
        """Whether every unit has its counterpart by evidence that suffices."""
        return not (self.unsettled or self.flatten)

    def problems(self) -> list[str]:
        """Why it cannot be relied on, one paragraph each."""
        found = [
            f"{len(each.sources)} of {self.source.label} against {len(each.targets)} of {self.target.label}: {each.why}:"
            f"\n    {_listed(each.sources)}\n    {_listed(each.targets)}"
            for each in self.unsettled
        ]
        return found + [
            f"{path}: its inputs were flattened, and in which order is not known: "
            + " or ".join("as they are" if each is None else str(each) for each in options)
            for path, options in self.flatten.items()
        ]

    def moves(self) -> tuple[dict[str, list[Move]], list[Loss]]:
        """What each live tensor is made of, and what has no place."""
        made: dict[str, list[Move]] = {}
        losses: list[Loss] = []
        for pair in self.pairs:
            moves, lost = _moves(_unflattened(pair), pair.target)
            losses += lost
            for move in moves:
                made.setdefault(move.target.tensor, []).append(move)
        return made, losses

    def rows(self) -> list[Row]:
        """The plan line by line."""
        evidence = {name: pair.evidence for pair in self.pairs for name in pair.target.tensors}
        flattened = {
            name: pair.flatten
            for pair in self.pairs
            if pair.flatten
            for name in pair.target.pieces["kernel"].tensor.split("\0")
        }
        made, _ = self.moves()
        rows = [
            Row(
                target=name,
                source=", ".join(dict.fromkeys(piece.tensor for move in moves for piece in move.sources)) or "(none)",
                how=f"{_how(moves)}{f'; {flattened[name]}' if name in flattened else ''}",
                exactness=_worst([move.exactness for move in moves]),
                evidence=evidence[name] or "not settled",
            )
            for name, moves in made.items()
        ]
        used = {piece.tensor for moves in made.values() for move in moves for piece in move.sources}
        held = used | {self.source.aliases.get(name, name) for name in used}
        rows += [
            Row("(none)", name, "", Exactness.DROPPED, "the model has no place for it")
            for name in self.source.tensors
            if name not in held and self.source.aliases.get(name, name) not in held
        ]
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        cells = [("model", "checkpoint", "how", "exactness", "evidence")]
        cells += [(row.target, row.source, row.how, str(row.exactness), row.evidence) for row in rows]
        widths = [max(len(cell[column]) for cell in cells) for column in range(5)]
        table = ["  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip() for cell in cells]
        counts = {kind: sum(row.exactness == kind for row in rows) for kind in Exactness}
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        lines = [f"{self.source.label} -> {self.target.label}: {summary or 'nothing'}", *table]
        lines += [f"not settled: {problem}" for problem in self.problems()]
        lines += [f"missing in the checkpoint: {unit}" for unit in self.missing]
        lines += [f"differs: {note}" for note in self.notes]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON that can be edited: its pairs are what `load(..., plan=path)` goes by."""
        document = {
            "polyckpt_plan": VERSION,
            "source": self.source.label,
            "target": self.target.label,
            "pairs": [
                {
                    "source": pair.source.path,
                    "target": pair.target.path,
                    "evidence": pair.evidence,
                    **({"flatten": {"shape": pair.flatten.shape, "order": pair.flatten.order}} if pair.flatten else {}),
                }
                for pair in self.pairs
            ],
            "unsettled": [
                {"why": each.why, "sources": [u.path for u in each.sources], "targets": [u.path for u in each.targets]}
                for each in self.unsettled
            ],
        }
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


class _FilePair(msgspec.Struct, forbid_unknown_fields=True):
    source: str
    target: str
    evidence: str = "the plan"
    flatten: Flatten | None = None


class _File(msgspec.Struct):
    polyckpt_plan: int
    pairs: list[_FilePair]


def read(path: str | os.PathLike[str]) -> list[tuple[str, str, Flatten | None]]:
    """The pairs of a saved plan. Raises PlanError for a file that is none."""
    try:
        document = msgspec.json.decode(Path(path).read_bytes(), type=_File)
    except FileNotFoundError as error:
        raise PlanError(f"{os.fspath(path)}: no such plan") from error
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PlanError(f"{os.fspath(path)}: not a plan that Plan.save() wrote: {error}") from error
    if document.polyckpt_plan != VERSION:
        raise PlanError(f"{os.fspath(path)}: a plan of version {document.polyckpt_plan}; this library knows {VERSION}")
    return [(pair.source, pair.target, pair.flatten) for pair in document.pairs]


def make(
    source: Side,
    target: Side,
    *,
    rules: Mapping[str, str] | None = None,
    pairs: Sequence[tuple[str, str, Flatten | None]] = (),
) -> Plan:
    """The plan from `source` to `target`.

    rules: patterns of source paths -> patterns of target paths; `{name}` stands for any text without a separator, `{*name}`
    for any text. A rule holds for all below the path that it names. pairs: those of a plan, which must all be there.
    Raises PlanError for rules and pairs that fit nothing or contradict each other.
    """
    allowed = _allowed(source, target, rules or {})
    allowed |= _planned(source, target, pairs)
    found = matching.classes(
        source.units,
        target.units,
        orders=(source.order, target.order),
        allowed=allowed,
        spare=[*source.tied, *target.tied],
    )
    given = {path: flatten for _, path, flatten in pairs}
    chosen = [(a, b, each.evidence) for each in found if each.proposals for a, b in each.proposals[0]]
    options = {b.path: _flattenings(a, b, source, target) for a, b, _ in chosen if b.path not in given}
    made = [
        Pair(a, b, "the plan" if b.path in given else evidence, given[b.path] if b.path in given else options[b.path][0])
        for a, b, evidence in chosen
    ]
    paired = {pair.source.path for pair in made}, {pair.target.path for pair in made}
    tied = {unit.path for unit in source.tied}, {unit.path for unit in target.tied}
    return Plan(
        source,
        target,
        pairs=tuple(sorted(made, key=lambda pair: pair.target.place)),
        unsettled=tuple(each for each in [*found, *_torn(made)] if not each.settled),
        dropped=tuple(unit for unit in source.units if unit.path not in paired[0] | tied[0]),
        missing=tuple(unit for unit in target.units if unit.path not in paired[1] | tied[1]),
        notes=tuple(note for pair in made for note in _differences(pair)),
        flatten={path: each for path, each in options.items() if len(each) > 1},
    )


def repaired(plan: Plan, pairing: Iterable[tuple[Unit, Unit]], evidence: str) -> Plan:
    """The plan with other partners for some units of one class."""
    new = {b.path: a for a, b in pairing}
    return replace(
        plan,
        pairs=tuple(
            replace(pair, source=new[pair.target.path], evidence=evidence) if pair.target.path in new else pair
            for pair in plan.pairs
        ),
    )


def flattened(plan: Plan, path: str, flatten: Flatten | None) -> Plan:
    """The plan with another flattening of the inputs of a unit."""
    pairs = tuple(replace(pair, flatten=flatten) if pair.target.path == path else pair for pair in plan.pairs)
    return replace(plan, pairs=pairs)


def proven(plan: Plan, evidence: str) -> Plan:
    """The plan with what was not settled settled."""
    pairs = tuple(replace(pair, evidence=pair.evidence or evidence) for pair in plan.pairs)
    return replace(plan, pairs=pairs, unsettled=(), flatten={})


def _executed(found: Sequence[Unit], ran: Sequence[str]) -> tuple[list[Unit], bool]:
    """Units in the order in which their layers first ran, and whether all were seen to; else they stay as they are."""
    first: dict[str, int] = {}
    for place, path in enumerate(ran):
        first.setdefault(path, place)
    seen = [unit.kind == BARE or unit.layer in first for unit in found]
    if not all(seen):
        return list(found), False
    bare = [unit for unit in found if unit.kind == BARE]
    rest = sorted((unit for unit in found if unit.kind != BARE), key=lambda unit: (first[unit.layer], unit.place))
    return [replace(unit, place=place) for place, unit in enumerate([*rest, *bare])], True


# Rules.


_PLACEHOLDER = re.compile(r"\{(\*?)(\w+)\}")
_SEPARATORS = "./:~"


def _allowed(source: Side, target: Side, rules: Mapping[str, str]) -> dict[tuple[str, str], bool]:
    """What the user's rules say: the pairs that they demand."""
    allowed: dict[tuple[str, str], bool] = {}
    problems: list[str] = []
    for wanted, given in rules.items():
        pattern = _pattern(wanted)
        names = {name for _, name in _PLACEHOLDER.findall(wanted)}
        if unknown := {name for _, name in _PLACEHOLDER.findall(given)} - names:
            problems.append(f"{wanted!r} -> {given!r}: {', '.join(sorted(unknown))} stands on the right only")
            continue
        matched = [(unit, found) for unit in source.units for text in _texts(unit) if (found := pattern.fullmatch(text))]
        if not matched:
            problems.append(f"{wanted!r} fits nothing in {source.label}; there are {_listed(source.units)}")
            continue
        reached = 0
        for unit, found in matched:
            path = _PLACEHOLDER.sub(lambda each, found=found: found[each[2]], given)  # type: ignore[misc]
            rest = found["polyckpt_rest"] or ""
            for other in target.units:
                if any(text == path or (text.startswith(path) and text[len(path)] in _SEPARATORS) for text in _texts(other)):
                    exact = not rest or unit.part == other.part
                    if matching.compatible(unit, other) and exact:
                        allowed[unit.path, other.path] = True
                        reached += 1
        if not reached:
            problems.append(
                f"{wanted!r} -> {given!r}: nothing of {target.label} has this path and fits; there are {_listed(target.units)}"
            )
    for path, others in _grouped(allowed).items():
        layers = {unit.layer for unit in target.units if unit.path in others}
        if len(others) > 1 and len(layers) > 1 and len(_rules_for(path, rules, source)) > 1:
            problems.append(f"{path}: several rules hold for it, and lead to {', '.join(sorted(others))}")
    if problems:
        raise PlanError("\n  ".join(["the rules cannot be followed:", *problems]))
    return allowed


def _rules_for(path: str, rules: Mapping[str, str], source: Side) -> list[str]:
    unit = next(unit for unit in source.units if unit.path == path)
    return [rule for rule in rules if any(_pattern(rule).fullmatch(text) for text in _texts(unit))]


def _grouped(allowed: Mapping[tuple[str, str], bool]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for a, b in allowed:
        found.setdefault(a, set()).add(b)
    return found


def _texts(unit: Unit) -> list[str]:
    """What a rule may call a unit: its path, with ":" or as one more segment."""
    return [unit.path, *(f"{unit.layer}{separator}{unit.part}" for separator in "./" if unit.part)]


def _pattern(rule: str) -> re.Pattern[str]:
    parts: list[str] = []
    seen: set[str] = set()
    end = 0
    for found in _PLACEHOLDER.finditer(rule):
        parts.append(re.escape(rule[end : found.start()]))
        name = found[2]
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{'.*' if found[1] else '[^./:~]+?'})")
        seen.add(name)
        end = found.end()
    parts.append(re.escape(rule[end:]))
    return re.compile(f"{''.join(parts)}(?P<polyckpt_rest>[{re.escape(_SEPARATORS)}].*)?")


def _planned(source: Side, target: Side, pairs: Sequence[tuple[str, str, Flatten | None]]) -> dict[tuple[str, str], bool]:
    """The pairs of a plan as demands, where every one of them is possible."""
    by_path = {unit.path: unit for unit in source.units}, {unit.path: unit for unit in target.units}
    problems: list[str] = []
    for a, b, _ in pairs:
        ours, theirs = by_path[0].get(a), by_path[1].get(b)
        if ours is None or theirs is None:
            problems.append(
                f"{a!r} -> {b!r}: {a if ours is None else b!r} is not in {(source if ours is None else target).label}"
            )
        elif not matching.compatible(ours, theirs):
            problems.append(f"{a!r} -> {b!r}: {ours} is not {theirs}")
    for which, side in enumerate(("source", "target")):
        named = [str(pair[which]) for pair in pairs]
        problems += [f"{path!r} stands twice as {side}" for path in sorted({path for path in named if named.count(path) > 1})]
    if problems:
        raise PlanError("\n  ".join(["the plan is one of other models:", *problems[:_MAX_LISTED]]))
    return {(a, b): True for a, b, _ in pairs}


# What a pair takes.


def _moves(source: Unit, target: Unit) -> tuple[list[Move], list[Loss]]:
    if source.kind in ("lstm", "gru", "rnn"):
        return _recurrent_moves(source, target)
    moves = [
        Move(piece, (source.pieces[role],)) if role in source.pieces else Move(piece, (), OPTIONAL[role])
        for role, piece in target.pieces.items()
    ]
    # How many batches were seen shapes nothing unless running averages are cumulative.
    lost = [
        Loss(piece, None if role == "count" else OPTIONAL[role])
        for role, piece in source.pieces.items()
        if role not in target.pieces
    ]
    return moves, [loss for loss in lost if loss.value is not None]


def _recurrent_moves(source: Unit, target: Unit) -> tuple[list[Move], list[Loss]]:
    """Kernels gate by gate; of several biases of a gate only the sum means anything, but in a GRU that resets afterwards."""
    moves: list[Move] = []
    losses: list[Loss] = []
    # A gate that keeps what another cell's renews has the opposite sign inside the sigmoid.
    opposite = source.config.get("update_gate", "keep") != target.config.get("update_gate", "keep")
    shift = float(source.config.get("forget_bias", 0.0)) - float(target.config.get("forget_bias", 0.0))
    gates = list(dict.fromkeys(role.partition(":")[2] for role in (*source.pieces, *target.pieces)))
    for role, piece in target.pieces.items():
        if "bias" not in role:
            moves.append(Move(piece, (source.pieces[role],), sign=-1 if opposite and role.endswith(":z") else 1))
    for gate in filter(None, gates):
        roles = [f"{kind}:{gate}" for kind in ("bias", "input_bias", "recurrent_bias")]
        ours = {role: source.pieces[role] for role in roles if role in source.pieces}
        theirs = {role: target.pieces[role] for role in roles if role in target.pieces}
        sign = -1 if opposite and gate == "z" else 1
        constant = shift if gate == "f" else 0.0
        apart = source.kind == "gru" and gate == "n" and source.config.get("reset_after") is True
        if apart or (ours.keys() == theirs.keys() and not constant):
            moves += [Move(piece, (ours[role],) if role in ours else (), sign=sign) for role, piece in theirs.items()]
            losses += [Loss(piece, 0.0) for role, piece in ours.items() if role not in theirs]
        elif theirs:
            first, *rest = theirs.values()
            moves.append(Move(first, tuple(ours.values()), constant, sign))
            moves += [Move(piece, ()) for piece in rest]
        else:
            losses += [Loss(piece, -constant) for piece in ours.values()]
    return moves, losses


def _unflattened(pair: Pair) -> Unit:
    """The source with its inputs in the order that the target has."""
    if pair.flatten is None:
        return pair.source
    kernel = pair.source.pieces["kernel"]
    names = tuple(f"f{axis}" for axis in range(len(pair.flatten.shape)))
    (inputs,) = kernel.order[0]
    changed = replace(
        kernel,
        axes=tuple(tuple(each for axis in group for each in (names if axis == inputs else (axis,))) for group in kernel.axes),
        sizes={**kernel.sizes, **dict(zip(names, pair.flatten.shape, strict=True))},
        order=(tuple(names[axis] for axis in pair.flatten.order), *kernel.order[1:]),
    )
    return replace(pair.source, pieces={**pair.source.pieces, "kernel": changed})


def _flattenings(source: Unit, target: Unit, ours: Side, theirs: Side) -> tuple[Flatten | None, ...]:
    """What the inputs of a linear unit may be, the likeliest first."""
    if source.kind != "linear" or source.part or ours.channels is None or theirs.channels in (None, ours.channels):
        return (None,)
    inputs = source.pieces["kernel"].shape[0]
    here, there = ours.flattened.get(source.layer), theirs.flattened.get(target.layer)
    if here is not None and there is not None and math.prod(here) == inputs == math.prod(there):
        return _between(here, there, ours.channels)
    known = here if here is not None and math.prod(here) == inputs else None
    if known is None and there is not None and math.prod(there) == inputs:
        known = _moved_shape(there, theirs.channels or "last")
    if known is not None:
        return _distinct((_moved(known, ours.channels), None))
    before = [unit for unit in ours.units if unit.place < source.place]
    made = {_features(unit) for unit in before}
    if inputs in made or not any(unit.kind in ("conv", "conv_transpose") for unit in before):
        return (None,)
    channels = [_features(unit) for unit in reversed(before) if unit.kind in ("conv", "conv_transpose")]
    fitting = [count for count in dict.fromkeys(channels) if count and inputs % count == 0]
    shapes = [(count, inputs // count) if ours.channels == "first" else (inputs // count, count) for count in fitting]
    return _distinct((*(_moved(shape, ours.channels) for shape in shapes), None))


def _between(here: tuple[int, ...], there: tuple[int, ...], channels: str) -> tuple[Flatten | None, ...]:
    """From one seen shape to another."""
    moved = _moved(here, channels)
    shape = tuple(here[axis] for axis in moved.order)
    if shape == there and here != there:
        return (moved,)
    return (None,) if shape != there else _distinct((moved, None))


def _moved(shape: tuple[int, ...], channels: str) -> Flatten:
    """The channels, which lie first or last, on the other end."""
    axes = tuple(range(len(shape)))
    return Flatten(shape, (*axes[1:], 0) if channels == "first" else (axes[-1], *axes[:-1]))


def _moved_shape(shape: tuple[int, ...], channels: str) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _moved(shape, channels).order)


def _distinct(options: tuple[Flatten | None, ...]) -> tuple[Flatten | None, ...]:
    """Without flattenings that change nothing."""
    real = [each for each in options if each is not None and sum(size > 1 for size in each.shape) > 1]
    return (*real, None)


def _features(unit: Unit) -> int:
    """How many features a unit makes, 0 where that is not plain."""
    if unit.kind in ("linear", "conv", "conv_transpose"):
        kernel = unit.pieces.get("kernel")
        return 0 if kernel is None else kernel.shape[0 if unit.kind == "conv" else 1]
    if unit.kind == "embedding":
        return unit.pieces["embedding"].shape[1]
    if unit.kind in ("lstm", "gru", "rnn"):
        return next(piece.shape[-1] for role, piece in unit.pieces.items() if role.startswith("recurrent_kernel"))
    return 0


def _torn(pairs: Sequence[Pair]) -> list[Class]:
    """Parts of one layer that went to parts of several."""
    found = []
    layers: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.source.part and pair.target.part and pair.source.kind != BARE:
            layers.setdefault(pair.source.layer, []).append(pair)
    for group in layers.values():
        if len({pair.target.layer for pair in group}) > 1:
            members = tuple(pair.source for pair in group), tuple(pair.target for pair in group)
            found.append(Class(*members, ((),), "", "parts of one layer belong to one layer"))
    return found


_COMPARED = ("epsilon", "activation", "recurrent_activation", "heads", "negative_slope")


def _differences(pair: Pair) -> Iterator[str]:
    """What the configs of a pair say differently, where both say it."""
    one, other = pair.source.config, pair.target.config
    for name in _COMPARED:
        if name in one and name in other and one[name] != other[name]:
            yield f"{pair.target.path}: {name} {one[name]} in the checkpoint, {other[name]} in the model: outputs differ by it"
    momenta = [_momentum(config) for config in (one, other)]
    if all("momentum" in config for config in (one, other)) and not _close(*momenta):
        values = f"{momenta[0]} in the checkpoint, {momenta[1]} in the model"
        yield f"{pair.target.path}: momentum (share of the old) {values}: training differs by it"


def _momentum(config: Mapping[str, Any]) -> float | None:
    value = config.get("momentum")
    if not isinstance(value, int | float):
        return None
    return 1 - value if config.get("momentum_is") == "share of the new" else float(value)


def _close(one: float | None, other: float | None) -> bool:
    return one is other if one is None or other is None else math.isclose(one, other, rel_tol=1e-9)


# For people.


def _how(moves: Sequence[Move]) -> str:
    first = moves[0]
    if not first.sources and len(moves) == 1:
        return f"all {first.constant:g}"
    if len(moves) > 1:
        kept = all(move.sources for move in moves)
        return f"{len(moves)} parts{'' if kept else ', some of them zero'}"
    source, target = first.sources[0], first.target
    text = f"{_axes(source)} -> {_axes(target)}" if _axes(source) != _axes(target) else _axes(target)
    if source.pick:
        text = f"part of {text}"
    return f"sum of {len(first.sources)}: {text}" if len(first.sources) > 1 else text


def _axes(piece: Piece) -> str:
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in piece.axes) or "scalar"


def _worst(found: Collection[Exactness]) -> Exactness:
    ranking = (Exactness.APPROXIMATE, Exactness.FOLDED, Exactness.DEFAULT, Exactness.EXACT)
    return next((each for each in ranking if each in found), Exactness.EXACT)


def _listed(found: Sequence[Unit]) -> str:
    more = f", ... ({len(found) - _MAX_LISTED} more)" if len(found) > _MAX_LISTED else ""
    return (", ".join(unit.path or "(the whole)" for unit in found[:_MAX_LISTED]) or "none") + more
