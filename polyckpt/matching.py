"""Pairs the units of two models by constraints and evidence, and says where the evidence does not suffice.

Kind, part and canonical shapes are hard constraints: what they allow falls into classes, and within a class of more than one
pair something has to tell twins apart. Two kinds of evidence can: names (tokens of paths, rare ones weighing more, synonyms;
numbers by their rank, since one port counts blocks from 0 and another from 2) and order (of execution or of definition). What
both say is likely, what they disagree on is open; what settles it is a rule, or numbers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from polyckpt import formulas
from polyckpt.units import BARE, KERNELS, OPTIONAL, Unit

Order = Literal["execution", "definition", "name"]
Pairing = tuple[tuple[Unit, Unit], ...]

_CLEAR = 0.05
"""A difference of similarity that says something; smaller ones come from chance."""

_HARD = ("groups", "direction", "reset_after")
"""Entries of the config without which a unit is another one; where only one side tells them they constrain nothing."""

_SYNONYMS = {
    token: words[0]
    for words in (
        ("query", "q"),
        ("key", "k"),
        ("value", "v"),
        ("output", "out", "o", "proj", "projection"),
        ("linear", "dense", "fc", "lin"),
        ("convolution", "conv", "convolutional"),
        ("batchnorm", "bn"),
        ("norm", "ln", "normalization", "normalisation", "layernorm"),
        ("embedding", "embeddings", "embed", "emb", "embedder"),
        ("attention", "attn", "mha", "att"),
        ("encoder", "enc"),
        ("decoder", "dec"),
        ("position", "pos", "positional", "positions"),
        ("depthwise", "dw", "dwconv"),
        ("pointwise", "pw", "pwconv"),
        ("downsample", "down", "downsampling"),
        ("upsample", "up", "upsampling"),
        ("head", "classifier", "predictions", "logits"),
        ("gamma", "scale"),
        ("forward", "fwd"),
        ("backward", "bwd", "reverse"),
        ("squeeze", "reduce"),
        ("intermediate", "inner", "hidden"),
        ("token", "word", "tokens", "words"),
    )
    for token in words
}


PROOFS = frozenset({"a rule", "the plan", "parity", "the only one that fits", "nothing to pair"})
"""Evidence that needs no other. Names and order may lie together: two layers may have changed their places and their names."""

AGREED = "names and order"
"""Evidence that is likely and no proof."""


@dataclass(frozen=True)
class Class:
    """Units that the constraints cannot tell apart.

    proposals: pairings, the likeliest first. evidence: what speaks for the first, "" where nothing does. why: what speaks
    against it.
    """

    sources: tuple[Unit, ...]
    targets: tuple[Unit, ...]
    proposals: tuple[Pairing, ...]
    evidence: str
    why: str = ""


def classes(
    sources: Sequence[Unit],
    targets: Sequence[Unit],
    *,
    orders: tuple[Order, Order],
    demanded: Set[tuple[str, str]] = frozenset(),
    spare: Iterable[Unit] = (),
) -> list[Class]:
    """All units of two models in classes; one that has no counterpart is a class with nothing on the other side.

    orders: what the places of the units of each side mean. demanded: (source path, target path) of the pairs that the user
    demands; what stands in one stands in no other pair. spare: units that need no counterpart, since what they hold is another
    one's (tied tensors).
    """
    extra = {unit.path for unit in spare}
    buckets: dict[object, tuple[list[Unit], list[Unit]]] = defaultdict(lambda: ([], []))
    for side, found in enumerate((sources, targets)):
        for unit in found:
            buckets[_signature(unit)][side].append(unit)
    similarity = _Similarity([*sources, *targets])
    return [
        _class(part, similarity, orders, demanded, extra)
        for ours, theirs in buckets.values()
        for part in _components(ours, theirs, demanded)
    ]


def compatible(source: Unit, target: Unit) -> bool:
    """Whether the two can be one unit: kind, part, what must agree of the config, and every shape."""
    if source.kind != target.kind or (source.part and target.part and source.kind != BARE and source.part != target.part):
        return False
    one, other = source.config, target.config
    hard = (*_HARD, "heads", "key_heads") if source.part and target.part else _HARD
    if any(name in one and name in other and one[name] != other[name] for name in hard):
        return False
    both = source.pieces.keys() & target.pieces.keys()
    if any(source.pieces[role].shape != target.pieces[role].shape for role in both):
        return False
    made = {role: formulas.making(source, target, role) for role in target.pieces.keys() - source.pieces.keys()}
    used = {name for formula in made.values() if formula for name in formula.inputs}
    lone = {role for role, formula in made.items() if not formula} | (source.pieces.keys() - target.pieces.keys() - used)
    return bool(both or used or not lone) and all(_is_optional(role) for role in lone)


def _is_optional(role: str) -> bool:
    """Whether a unit may lack `role`, which in a recurrent one has a part and a gate."""
    return role.partition(":")[0].removeprefix("input_").removeprefix("recurrent_") in OPTIONAL


def _signature(unit: Unit) -> object:
    """Equal for units that may be compatible."""
    needed = {
        "kernel" if role in KERNELS else role: piece.shape
        for role, piece in unit.pieces.items()
        if not _is_optional(role) and role not in formulas.HELPERS
    }
    if not needed:
        needed = {"": next(iter(unit.pieces.values())).shape}
    return (unit.kind, tuple(sorted(needed.items())))


Component = tuple[list[Unit], list[Unit], set[tuple[str, str]]]


def _components(sources: list[Unit], targets: list[Unit], demanded: Set[tuple[str, str]]) -> list[Component]:
    """The connected parts of "may be paired", each with its pairs."""
    demanded_of, demanded_by = {a for a, _ in demanded}, {b for _, b in demanded}

    def may(source: Unit, target: Unit) -> bool:
        free = source.path not in demanded_of and target.path not in demanded_by
        return (free or (source.path, target.path) in demanded) and compatible(source, target)

    edges = {(a.path, b.path) for a in sources for b in targets if may(a, b)}
    left_of: dict[str, set[str]] = defaultdict(set)
    right_of: dict[str, set[str]] = defaultdict(set)
    for a, b in edges:
        right_of[a].add(b)
        left_of[b].add(a)
    found: list[Component] = []
    done: set[str] = set()
    for unit in sources:
        if unit.path in done:
            continue
        ours, stack = {unit.path}, [unit.path]
        theirs: set[str] = set()
        while stack:
            for b in right_of[stack.pop()] - theirs:
                theirs.add(b)
                stack += left_of[b] - ours
                ours |= left_of[b]
        done |= ours
        found.append(([a for a in sources if a.path in ours], [b for b in targets if b.path in theirs], edges))
    reached = {unit.path for _, theirs, _ in found for unit in theirs}
    return [*found, *(([], [unit], edges) for unit in targets if unit.path not in reached)]


def _class(
    component: Component,
    similarity: _Similarity,
    orders: tuple[Order, Order],
    demanded: Set[tuple[str, str]],
    extra: set[str],
) -> Class:
    sources, targets, edges = component
    members = (tuple(sources), tuple(targets))
    if len(sources) != len(targets):
        sources, targets = _without_spare(sources, targets, extra)
    if not sources or not targets:
        return Class(tuple(sources), tuple(targets), ((),), "nothing to pair")
    if len(sources) == len(targets) == 1:
        (source,), (target,) = sources, targets
        evidence = "a rule" if (source.path, target.path) in demanded else "the only one that fits"
        return Class(*members, (((source, target),),), evidence)
    may = np.array([[(a.path, b.path) in edges for b in targets] for a in sources])
    named, unclear = _by_name(sources, targets, may, similarity)
    executed = orders == ("execution", "execution")
    ordered = _by_order(sources, targets, may) if "name" not in orders and len(sources) == len(targets) else None
    if ordered is None:
        return Class(*members, (named,), "", "only names tell them apart" if not unclear else "names do not tell them apart")
    if named == ordered and not unclear:
        return Class(*members, (named,), AGREED, "names and order agree, which is likely and no proof")
    if named == ordered:
        return Class(*members, (named,), "", "only their order tells them apart")
    return Class(*members, (ordered, named) if executed else (named, ordered), "", "names and order disagree")


def _without_spare(sources: list[Unit], targets: list[Unit], extra: set[str]) -> tuple[list[Unit], list[Unit]]:
    """Leave out units that need no counterpart, as far as there are too many of them."""

    def fewer(units: list[Unit], wanted: int) -> list[Unit]:
        left_out = [unit.path for unit in units if unit.path in extra][: len(units) - wanted]
        return [unit for unit in units if unit.path not in left_out]

    if len(sources) > len(targets):
        return fewer(sources, len(targets)), targets
    return sources, fewer(targets, len(sources))


def _by_order(sources: Sequence[Unit], targets: Sequence[Unit], may: np.ndarray) -> Pairing | None:
    """The n-th with the n-th, where that is allowed."""
    first = sorted(range(len(sources)), key=lambda index: sources[index].place)
    second = sorted(range(len(targets)), key=lambda index: targets[index].place)
    if not all(may[a, b] for a, b in zip(first, second, strict=True)):
        return None
    return tuple((sources[a], targets[b]) for a, b in sorted(zip(first, second, strict=True)))


def _by_name(
    sources: Sequence[Unit], targets: Sequence[Unit], may: np.ndarray, similarity: _Similarity
) -> tuple[Pairing, Pairing]:
    """The pairing of most similar names, and those of its pairs that could be exchanged with another at no cost."""
    from scipy.optimize import linear_sum_assignment

    text = np.array([[similarity(a, b) for b in targets] for a in sources])
    ranks = _ranks(sources), _ranks(targets)
    number = np.array([[1 - abs(a - b) for b in ranks[1]] for a in ranks[0]])
    # Rounded, so that noise of the last digit decides nothing; numbers decide between equal texts only.
    score = np.where(may, np.round(text, 6) + _CLEAR / len(sources) * number, -1e3)
    rows, columns = linear_sum_assignment(score, maximize=True)
    chosen = [(int(a), int(b)) for a, b in zip(rows, columns, strict=True) if may[a, b]]
    unclear: set[tuple[int, int]] = set()
    for (a, b), (c, d) in itertools.combinations(chosen, 2):
        if may[a, d] and may[c, b]:
            by_text = text[a, b] + text[c, d] - text[a, d] - text[c, b]
            by_number = number[a, b] + number[c, d] - number[a, d] - number[c, b]
            if by_text < _CLEAR and not (by_text > -1e-6 and by_number > 1e-9):
                unclear |= {(a, b), (c, d)}
    left = set(range(len(sources))) - {a for a, _ in chosen} | set(range(len(targets))) - {b for _, b in chosen}
    if left:  # a unit without a partner could take any one's place
        unclear |= {(a, b) for a, b in chosen if _replaceable(a, b, chosen, text, may)}
    return tuple((sources[a], targets[b]) for a, b in chosen), tuple((sources[a], targets[b]) for a, b in sorted(unclear))


def _replaceable(a: int, b: int, chosen: Sequence[tuple[int, int]], text: np.ndarray, may: np.ndarray) -> bool:
    taken = {c for c, _ in chosen}, {d for _, d in chosen}
    others = [text[c, b] for c in range(len(text)) if c not in taken[0] and may[c, b]]
    others += [text[a, d] for d in range(text.shape[1]) if d not in taken[1] and may[a, d]]
    return bool(others) and max(others) > text[a, b] - _CLEAR


def _ranks(units: Sequence[Unit]) -> list[float]:
    """From 0 to 1, the place of each by its numbers among those whose names have the same words."""
    groups: dict[tuple[str, ...], set[tuple[int, ...]]] = defaultdict(set)
    keys = [(tuple(sorted(_words(unit.path))), tuple(map(int, re.findall(r"\d+", unit.path)))) for unit in units]
    for words, numbers in keys:
        groups[words].add(numbers)
    places = {words: {numbers: place for place, numbers in enumerate(sorted(found))} for words, found in groups.items()}
    return [places[words][numbers] / max(1, len(places[words]) - 1) for words, numbers in keys]


class _Similarity:
    """How alike the words of two paths are: 0 to 1, words that many units share counting less."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._words = {unit.path: Counter(_words(unit.path)) for unit in units}
        in_units = Counter(word for words in self._words.values() for word in words)
        self._weight = {word: math.log(1 + len(units) / count) for word, count in in_units.items()}

    def __call__(self, source: Unit, target: Unit) -> float:
        one, other = self._words[source.path], self._words[target.path]
        both, either = one & other, one | other
        total = sum(self._weight[word] * count for word, count in either.items())
        return sum(self._weight[word] * count for word, count in both.items()) / total if total else 1.0


def _words(path: str) -> list[str]:
    apart = re.sub(r"([a-z0-9])([A-Z])|([A-Z])(?=[A-Z][a-z])", r"\1\3 \2", path)
    return [_SYNONYMS.get(word, word) for word in re.findall(r"[a-z]+", apart.lower())]
