"""What a user says of which is which: rules with placeholders, and the pairs of a saved plan."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from polyckpt import matching
from polyckpt.errors import PlanError
from polyckpt.sides import Flatten, Side
from polyckpt.units import Unit, listed

_MAX_LISTED = 12


_PLACEHOLDER = re.compile(r"\{(\*?)(\w+)\}")
_SEPARATORS = "./:~"


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
