"""The plan of a conversion: which unit of a checkpoint becomes which unit of a model, how sure that is, and what it takes.

A plan is made (`make`), looked at (`print`), saved, edited and read back (`Plan.save`, `read`). `Plan.moves` is what carrying
it out consists of, for weights and for any other tensors of the same structure.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from polyckpt import matching
from polyckpt.dtypes import widens
from polyckpt.errors import PlanError
from polyckpt.layouts import Piece
from polyckpt.matching import Class
from polyckpt.moves import FOLDED_BIAS, Exactness, Loss, Move, less, moves_of
from polyckpt.path_rules import demanded_by_plan, demanded_by_rules, sliced
from polyckpt.sides import Flatten, Side, flattenings, unflattened
from polyckpt.units import BARE, Unit, listed

VERSION = 1


@dataclass(frozen=True)
class Pair:
    """One unit of the checkpoint for one of the model; evidence says what settled it, "" that nothing did."""

    source: Unit
    target: Unit
    evidence: str
    flatten: Flatten | None = None


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
    the weights fit (epsilon, activations, momentum). folds: whether biases go into the batch norms that follow them.
    """

    source: Side
    target: Side
    pairs: tuple[Pair, ...]
    unsettled: tuple[Class, ...]
    dropped: tuple[Unit, ...]
    missing: tuple[Unit, ...]
    notes: tuple[str, ...]
    folds: bool = False
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
            f"\n    {listed(each.sources)}\n    {listed(each.targets)}"
            for each in self.unsettled
        ]
        return found + [
            f"{path}: its inputs were flattened, and in which order is not known: "
            + " or ".join("as they are" if each is None else str(each) for each in options)
            for path, options in self.flatten.items()
        ]

    def moves(self) -> tuple[dict[str, list[Move]], list[Loss]]:
        """What each live tensor is made of, and what has no place."""
        biases = self.folded()
        made: dict[str, list[Move]] = {}
        losses: list[Loss] = []
        for pair in self.pairs:
            moves, lost = moves_of(unflattened(pair.source, pair.flatten), pair.target)
            losses += [loss for loss in lost if loss.piece not in biases.values()]
            for move in moves:
                if pair.target in biases and move.target is pair.target.pieces["mean"]:
                    move = less(move, biases[pair.target])
                made.setdefault(move.target.tensor, []).append(move)
        return made, losses

    def folded(self) -> dict[Unit, Piece]:
        """Batch norm of the model -> the bias of the layer before it in the checkpoint, where the model has no such bias.

        norm(x + bias) is the norm of x with a mean less by the bias (Jacob et al. 2018, section 3.2).
        """
        at = {pair.source.place: pair for pair in self.pairs}
        found = {}
        for pair in self.pairs if self.folds else ():
            bias, after = pair.source.pieces.get("bias"), at.get(pair.source.place + 1)
            if bias is None or "bias" in pair.target.pieces or after is None or after.source.kind != "batch_norm":
                continue
            mean = after.source.pieces.get("mean")
            if mean is not None and mean.shape == bias.shape and "mean" in after.target.pieces:
                found[after.target] = bias
        return found

    def rows(self) -> list[Row]:
        """The plan line by line."""
        evidence = {name: pair.evidence for pair in self.pairs for name in pair.target.tensors}
        flattened = {pair.target.kernel.tensor: pair.flatten for pair in self.pairs if pair.flatten and pair.target.kernel}
        made, _ = self.moves()
        rounded = {
            name
            for name, moves in made.items()
            for move in moves
            for piece in move.rounded
            if not widens(self.source.tensors[piece.tensor][1], self.target.tensors[name][1])
        }
        rows = [
            Row(
                target=name,
                source=", ".join(dict.fromkeys(piece.tensor for move in moves for piece in move.sources)) or "(none)",
                how=f"{_how(moves)}{f'; {flattened[name]}' if name in flattened else ''}",
                exactness=Exactness.APPROXIMATE if name in rounded else _worst([move.exactness for move in moves]),
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

    def summary(self, rows: Sequence[Row]) -> str:
        """Between what, and how many of `rows` are of each exactness."""
        counts = {kind: sum(row.exactness == kind for row in rows) for kind in Exactness}
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        return f"{self.source.label} -> {self.target.label}: {told or 'nothing'}"

    def __str__(self) -> str:
        rows = self.rows()
        cells = [("model", "checkpoint", "how", "exactness", "evidence")]
        cells += [(row.target, row.source, row.how, str(row.exactness), row.evidence) for row in rows]
        lines = [self.summary(rows), *table(cells)]
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
    accept: Collection[str] = (),
) -> Plan:
    """The plan from `source` to `target`.

    rules: patterns of source paths -> patterns of target paths; `{name}` stands for any text without a separator, `{*name}`
    for any text. A rule holds for all below the path that it names; "path[start:stop]" is some of the outputs of a layer.
    pairs: those of a plan, which must all be there. accept: evidence that suffices although it is no proof.
    Raises PlanError for rules and pairs that fit nothing or contradict each other.
    """
    rules = rules or {}
    source = sliced(source, [*rules, *(path for path, _, _ in pairs)])
    target = sliced(target, [*rules.values(), *(path for _, path, _ in pairs)])
    demanded = demanded_by_rules(source, target, rules) | demanded_by_plan(source, target, pairs)
    found = matching.classes(
        source.units,
        target.units,
        orders=(source.order, target.order),
        demanded=demanded,
        spare=[*source.tied, *target.tied],
    )
    given = {path: flatten for _, path, flatten in pairs}
    chosen = [(a, b, each.evidence) for each in found for a, b in each.proposals[0]]
    options = {b.path: flattenings(a, b, source, target) for a, b, _ in chosen if b.path not in given}
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
        unsettled=tuple(each for each in [*found, *_torn(made)] if each.evidence not in matching.PROOFS | set(accept)),
        dropped=tuple(unit for unit in source.units if unit.path not in paired[0] | tied[0]),
        missing=tuple(unit for unit in target.units if unit.path not in paired[1] | tied[1]),
        notes=tuple(note for pair in made for note in _differences(pair)),
        folds=FOLDED_BIAS in accept,
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


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


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
