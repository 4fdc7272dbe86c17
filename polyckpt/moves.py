"""What it takes to turn one unit into another: which pieces are copied, added up, made up or lost."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from polyckpt import formulas
from polyckpt.formulas import Compute
from polyckpt.layers import RECURRENT
from polyckpt.layouts import Piece
from polyckpt.units import OPTIONAL, Unit


class Exactness(enum.StrEnum):
    """What happens to a tensor on its way.

    EXACT: every bit of every number arrives, in another layout or a wider type at most. HYPERPARAMETER, CONSTANT_RATE: an
    optimizer goes on exactly, with another number for the same thing; or as long as its learning rate stays. FOLDED: numbers
    were added up, so that outputs agree but training may go on differently. DEFAULT: the checkpoint has none, and the value
    that stands for none was taken. DROPPED: the live object has no place for it. APPROXIMATE: rounded to a narrower type; or
    an optimizer computes something else, by the size told.
    """

    EXACT = "exact"
    HYPERPARAMETER = "exact with changed hyperparameter"
    CONSTANT_RATE = "exact while the learning rate stays"
    FOLDED = "folded"
    DEFAULT = "default"
    DROPPED = "dropped"
    APPROXIMATE = "approximate"


@dataclass(frozen=True)
class Move:
    """What a piece of a live tensor becomes: the sum of `sources` and a constant; the constant alone where there are none.

    formula: what is made of `sources` instead of their sum; the first is what the others change.
    """

    target: Piece
    sources: tuple[Piece, ...]
    constant: float = 0.0
    formula: Compute | None = None

    @property
    def rounded(self) -> tuple[Piece, ...]:
        """The sources whose numbers arrive, so that a narrower type would round them."""
        return self.sources[:1] if self.formula else self.sources

    @property
    def exactness(self) -> Exactness:
        """FOLDED where numbers are added up."""
        if not self.sources:
            return Exactness.DEFAULT
        return Exactness.FOLDED if len(self.sources) > 1 or self.constant or self.formula else Exactness.EXACT


FOLDED_BIAS = "folded bias"
"""What to accept for a bias that the model lacks to go into the batch norm after it."""


def less(move: Move, piece: Piece) -> Move:
    """The move with a piece subtracted."""
    return replace(move, sources=(*move.sources, replace(piece, sign=-piece.sign)))


@dataclass(frozen=True)
class Loss:
    """A piece that the target has no place for; nothing is lost where all of it is `value`. foldable: see FOLDED_BIAS."""

    piece: Piece
    value: float | None
    foldable: bool = False


def moves_of(source: Unit, target: Unit) -> tuple[list[Move], list[Loss]]:
    """The moves that make `target` of `source`, and what of `source` has no place there."""
    if source.kind in RECURRENT:
        return _recurrent_moves(source, target)
    moves = []
    used: set[str] = set()
    for role, piece in target.pieces.items():
        # After many updates an average that began at zero is what it was put right to.
        held = role if role in source.pieces else role.removesuffix("_biased")
        used.add(held)
        if formula := formulas.making(source, target, role):
            inputs = tuple(source.pieces[name] for name in formula.inputs)
            moves.append(Move(piece, inputs, formula=formula.bind(inputs, piece, source.config)))
            used |= set(formula.inputs)
        else:
            moves.append(Move(piece, (source.pieces[held],)) if held in source.pieces else Move(piece, (), OPTIONAL[role]))
    lost = [
        Loss(piece, OPTIONAL[role], foldable=role == "bias")
        for role, piece in source.pieces.items()
        if role not in target.pieces and role not in _BOOKKEEPING | used
    ]
    return moves, lost


_BOOKKEEPING = {"kernel_u", "unset", "count", "mean_biased", "variance_biased", "mean_updates", "variance_updates"}
"""Roles that say how averages or norms came about: without them these are what they are."""


def _recurrent_moves(source: Unit, target: Unit) -> tuple[list[Move], list[Loss]]:
    """Kernels gate by gate; of several biases of a gate only the sum means anything, but in a GRU that resets afterwards."""
    moves: list[Move] = []
    losses: list[Loss] = []
    shift = float(source.config.get("forget_bias", 0.0)) - float(target.config.get("forget_bias", 0.0))
    gates = list(dict.fromkeys(role.partition(":")[2] for role in (*source.pieces, *target.pieces)))
    for role, piece in target.pieces.items():
        if "bias" not in role:
            moves.append(Move(piece, (source.pieces[role],)))
    for gate in filter(None, gates):
        roles = [f"{kind}:{gate}" for kind in ("bias", "input_bias", "recurrent_bias")]
        ours = {role: source.pieces[role] for role in roles if role in source.pieces}
        theirs = {role: target.pieces[role] for role in roles if role in target.pieces}
        constant = shift if gate == "f" else 0.0
        apart = source.kind == "gru" and gate == "n" and source.config.get("reset_after") is True
        if apart or (ours.keys() == theirs.keys() and not constant):
            moves += [Move(piece, (ours[role],) if role in ours else ()) for role, piece in theirs.items()]
            losses += [Loss(piece, 0.0) for role, piece in ours.items() if role not in theirs]
        elif theirs:
            first, *rest = theirs.values()
            moves.append(Move(first, tuple(ours.values()), constant))
            moves += [Move(piece, ()) for piece in rest]
        else:
            losses += [Loss(piece, -constant) for piece in ours.values()]
    return moves, losses
