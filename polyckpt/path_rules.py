"""What a user says of which is which: rules with placeholders, and the pairs of a saved plan.

A path may end in "[start:stop]", some of the outputs of a layer: a packed projection is three layers of the other model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from polyckpt import matching
from polyckpt.errors import PlanError
from polyckpt.sides import Flatten, Side
from polyckpt.units import Unit, listed

_MAX_LISTED = 12


_PLACEHOLDER = re.compile(r"\{(\*?)(\w+)\}")
_SEPARATORS = "./:~"
_SLICE = re.compile(r"\[(\d*):(\d*)\]$")
_OUTPUTS = {"linear": 1, "conv": 0}
"""Kinds that can be cut, and which axis of the canonical kernel their outputs are."""


def demanded_by_rules(source: Side, target: Side, rules: Mapping[str, str]) -> set[tuple[str, str]]:
    """The pairs that the user's rules demand."""
    demanded: dict[Unit, list[Unit]] = defaultdict(list)
    matched_by: dict[Unit, int] = defaultdict(int)
    problems: list[str] = []
    for wanted, given in rules.items():
        pattern = _pattern(wanted)
        names = {name for _, name in _PLACEHOLDER.findall(wanted)}
        if unknown := {name for _, name in _PLACEHOLDER.findall(given)} - names:
            problems.append(f"{wanted!r} -> {given!r}: {', '.join(sorted(unknown))} stands on the right only")
            continue
        matched = {unit: found for unit in source.units for text in _texts(unit) if (found := pattern.fullmatch(text))}
        if not matched:
            problems.append(f"{wanted!r} fits nothing in {source.label}; there are {listed(source.units)}")
            continue
        reached = False
        for unit, found in matched.items():
            matched_by[unit] += 1
            path = _PLACEHOLDER.sub(lambda each, found=found: found[each[2]], given)  # type: ignore[misc]
            for other in target.units:
                below = any(
                    text == path or (text.startswith(path) and text[len(path)] in _SEPARATORS) for text in _texts(other)
                )
                same_part = not found["polyckpt_rest"] or unit.part == other.part
                if below and same_part and matching.compatible(unit, other):
                    demanded[unit].append(other)
                    reached = True
        if not reached:
            problems.append(
                f"{wanted!r} -> {given!r}: nothing of {target.label} has this path and fits; there are {listed(target.units)}"
            )
    for unit, others in demanded.items():
        if matched_by[unit] > 1 and len({other.layer for other in others}) > 1:
            paths = sorted({other.path for other in others})
            problems.append(f"{unit.path}: several rules hold for it, and lead to {', '.join(paths)}")
    if problems:
        raise PlanError("\n  ".join(["the rules cannot be followed:", *problems]))
    return {(unit.path, other.path) for unit, others in demanded.items() for other in others}


def sliced(side: Side, texts: Iterable[str]) -> Side:
    """The side with its layers cut where `texts` name some of their outputs; what none names is a part of its own.

    Raises PlanError for a layer that cannot be cut, or not so.
    """
    cuts: dict[Unit, set[str]] = defaultdict(set)
    for text in texts:
        if found := _SLICE.search(text):
            pattern = _pattern(text[: found.start()])
            for unit in side.units:
                if any((match := pattern.fullmatch(each)) and not match["polyckpt_rest"] for each in _texts(unit)):
                    cuts[unit].add(found[0])
    if not cuts:
        return side
    parts = [part for unit in side.units for part in (_cut(unit, cuts[unit]) if unit in cuts else [unit])]
    return replace(side, units=[replace(part, place=place) for place, part in enumerate(parts)])


def _cut(unit: Unit, labels: Iterable[str]) -> list[Unit]:
    axis = _OUTPUTS.get(unit.kind)
    merged = any(len(group) > 1 for piece in unit.pieces.values() for group in piece.order)
    if axis is None or unit.part or merged or not unit.pieces.keys() <= {"kernel", "bias"} or unit.config.get("groups", 1) != 1:
        raise PlanError(f"{unit}: only the outputs of linear and convolutional layers can be cut, where they are one axis")
    count = unit.pieces["kernel"].shape[axis]
    wanted = {}
    for label in labels:
        start, stop = _SLICE.fullmatch(label).groups()  # type: ignore[union-attr]
        wanted[int(start or 0), int(stop) if stop else count] = label
    made, end = [], 0
    for (start, stop), label in [*sorted(wanted.items()), ((count, count), "")]:
        if not end <= start <= stop <= count or (label and start == stop):
            raise PlanError(f"{unit.path}{label}: of {count} outputs; parts must hold some each, and none twice")
        if end < start:
            made.append(_slice_of(unit, axis, end, start, f"[{end}:{start}]"))
        if label:
            made.append(_slice_of(unit, axis, start, stop, label))
        end = stop
    return made


def _slice_of(unit: Unit, axis: int, start: int, stop: int, label: str) -> Unit:
    pieces = {}
    for role, piece in unit.pieces.items():
        (name,) = piece.order[axis if role == "kernel" else 0]
        pieces[role] = (
            piece if (start, stop) == (0, piece.sizes[name]) else replace(piece, pick={**piece.pick, name: (start, stop)})
        )
    return replace(unit, layer=f"{unit.layer}{label}", pieces=pieces)


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


def demanded_by_plan(source: Side, target: Side, pairs: Sequence[tuple[str, str, Flatten | None]]) -> set[tuple[str, str]]:
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
    return {(a, b) for a, b, _ in pairs}
