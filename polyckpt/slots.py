"""The slots of a stored optimizer for the parameters of a live one, by the plan of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from polyckpt import schema, updates
from polyckpt.adapter import OptimizerCapture
from polyckpt.checkpoint import Checkpoint, StoredTensor
from polyckpt.converted import Converted, Made
from polyckpt.dtypes import lookup, widens
from polyckpt.errors import Problem
from polyckpt.layouts import Piece
from polyckpt.moves import Move
from polyckpt.optimizers import AVERAGED, CUSTOM, LINEAR, WHOLE, factored
from polyckpt.plans import Plan
from polyckpt.translation import Affine, Sample
from polyckpt.updates import Form

SECTION = "optimizer"
"""Where problems of it are."""
_SAMPLED = 1 << 16
"""How many elements of a group are looked at to tell how exact it goes on."""


def form_of(described: schema.Optimizer | OptimizerCapture, group: schema.ParameterGroup) -> Form:
    """What is computed for a group of a described optimizer."""
    conventions = {**described.conventions, **group.conventions}
    return Form(group.family or described.family, conventions, numbers(group.hyperparameters))


class Slots:
    """The slots of a checkpoint. made: tensor of the live model -> its moves. stored: meaning -> parameter -> slot.

    group_of: parameter -> the group of the checkpoint that it is in. What does not fit is added to the `problems` given.
    """

    def __init__(
        self, checkpoint: Checkpoint, source: schema.Optimizer, plan: Plan, step: int, problems: list[Problem], *, cast: bool
    ) -> None:
        self.checkpoint, self.source, self.plan = checkpoint, source, plan
        self.step, self.problems, self.cast = step, problems, cast
        self.made, _ = plan.moves()
        self.stored = _by_meaning(checkpoint, source)
        self.group_of = {name: index for index, group in enumerate(source.groups) for name in group.parameters}

    def astray(self, group: schema.ParameterGroup, source: int, live: Form) -> Iterator[str]:
        """Matrices that do not lie as other matrices of the two frameworks do to each other, as tables of embeddings do not."""
        turned = form_of(self.source, self.source.groups[source]).choice("outputs") != live.choice("outputs")
        for name in group.parameters:
            shape, moves = self.plan.target.tensors[name][0], self.made.get(name, ())
            owner = self.owner(name)
            if len(shape) != 2 or shape[0] == shape[1] or len(moves) != 1 or self.group_of.get(owner or "") != source:
                continue
            if (_lies_in(moves[0].target, moves[0].sources[0], 0) == 1) != turned:
                yield name

    def source_form(self, index: int, live: Form) -> Form:
        """The form of a group of the checkpoint, over matrices that lie as they do here."""
        form = form_of(self.source, self.source.groups[index])
        if not form.choice("outputs") or not live.choice("outputs"):
            return form
        return replace(form, conventions={**form.conventions, "outputs": live.choice("outputs")})

    def owner(self, name: str) -> str | None:
        """The weight of the checkpoint that the slots of a live parameter come from."""
        sources = [piece.tensor for move in self.made.get(name, ()) for piece in move.sources[:1]]
        return self._stored_as(sources[0]) if sources else None

    def _stored_as(self, tensor: str) -> str:
        aliases = self.checkpoint.manifest.model.aliases
        if tensor in self.group_of:
            return tensor
        return next((other for other in _tied(aliases, tensor) if other in self.group_of), tensor)

    def is_folded(self, name: str, owner: str | None) -> bool:
        """Whether a parameter does not go on as the one of the checkpoint alone does."""
        moves = self.made[name]
        if any(len(move.sources) != 1 or move.formula for move in moves):
            return True
        source = self.source.groups[self.group_of[owner]] if owner in self.group_of else None
        if source is None or (source.family or self.source.family) not in WHOLE:
            return False
        return len(moves) != 1 or bool(moves[0].target.pick or moves[0].sources[0].pick)

    def fill(
        self,
        name: str,
        owner: str | None,
        form: Form,
        changes: Mapping[str, tuple[Affine, ...]],
        slots: dict[str, dict[str, StoredTensor]],
    ) -> bool:
        """Put the slots of a parameter into `slots`; whether all of them came one by one from the checkpoint."""
        shape, dtype = self.plan.target.tensors[name]
        whole = owner is not None and not self.is_folded(name, owner)
        for meaning, (size, first) in updates.slots_of(form, shape).items():
            tensor = None
            if meaning == "momentum_product":
                tensor = self._product(form, owner, dtype)
            elif owner is not None:
                tensor = self.converted(meaning, name, size, dtype) or self._derived(meaning, name, size, dtype)
            if tensor is None:
                whole = False
                value = first
                tensor = Made(name, dtype, size, lambda value=value: np.asarray(value))  # type: ignore[misc]
            for affine in changes.get(meaning, ()):
                before = tensor
                tensor = Made(name, dtype, size, lambda a=affine, b=before: a(b.numpy()), before)  # type: ignore[misc]
            slots.setdefault(meaning, {})[name] = tensor
        return whole

    def _product(self, form: Form, owner: str | None, dtype: str) -> StoredTensor:
        """NAdam's product: the checkpoint's, where the schedule is the same."""
        held = self.stored.get("momentum_product", {}).get(owner or "")
        source = self.source_form(self.group_of.get(owner or "", 0), form)
        if held is not None and updates.momentum_of(source, 1) == updates.momentum_of(form, 1):
            return held
        return Made("momentum_product", dtype, (), lambda: np.asarray(updates.momentum_product(form, self.step)))

    def converted(self, meaning: str, name: str, shape: tuple[int, ...], dtype: str) -> StoredTensor | None:
        """A slot by the moves of its parameter; None where the checkpoint has none."""
        moves = self.made[name]
        if meaning in AVERAGED:
            return self._averaged(meaning, name, moves, shape, dtype)
        entries = self.stored.get(meaning, {})
        linear = meaning in LINEAR
        taken: list[Move] = []
        found: dict[str, StoredTensor] = {}
        for move in moves:
            pieces = move.sources[:1]
            for piece in pieces:
                slot = entries.get(self._stored_as(piece.tensor))
                if slot is None:
                    return None
                found[piece.tensor] = slot
            taken.append(Move(_signed(move.target, linear), tuple(_signed(piece, linear) for piece in pieces)))
        self._check_type(meaning, name, found.values(), dtype)
        return Converted(name, dtype, shape, taken, found)

    def _derived(self, meaning: str, name: str, shape: tuple[int, ...], dtype: str) -> StoredTensor | None:
        """A slot that the checkpoint has factored otherwise."""
        whole = self.plan.target.tensors[name][0]
        shapes = {"second_moment": whole, "row_second_moment": whole[:-1], "column_second_moment": (*whole[:-2], *whole[-1:])}
        sources = {each: self.converted(each, name, shapes[each], dtype) for each in updates.DERIVED.get(meaning, ())}
        if not sources or not len(whole) > 1 or None in sources.values():
            return None
        held = {each: tensor for each, tensor in sources.items() if tensor is not None}

        def compute() -> np.ndarray:
            wide = {each: tensor.numpy().astype(np.float64) for each, tensor in held.items()}
            return np.asarray(updates.slot_from(meaning, wide, np), lookup(dtype, name).numpy)

        return Made(name, dtype, shape, compute, *held.values())

    def _averaged(
        self, meaning: str, name: str, moves: Sequence[Move], shape: tuple[int, ...], dtype: str
    ) -> StoredTensor | None:
        """A slot that lacks an axis of its parameter: the one of the checkpoint that lacks the same."""
        if len(moves) != 1 or len(moves[0].sources) != 1 or len(shape) + 1 != len(self.plan.target.tensors[name][0]):
            return None
        target, source = moves[0].target, moves[0].sources[0]
        group = target.axes[AVERAGED[meaning]]
        place = next((index for index, each in enumerate(target.order) if each == group), None)
        if place is None or target.pick or source.pick:
            return None
        axis = next((index for index, each in enumerate(source.axes) if each == source.order[place]), None)
        if axis is None:
            return None
        there = next((each for each, at in AVERAGED.items() if at % len(source.axes) == axis), None)
        slot = self.stored.get(there or "", {}).get(self._stored_as(source.tensor))
        if slot is None:
            return None
        self._check_type(meaning, name, [slot], dtype)
        pair = _without(target, group), (_without(source, source.order[place]),)
        return Converted(name, dtype, shape, [Move(*pair)], {source.tensor: slot})

    def _check_type(self, meaning: str, name: str, sources: Any, dtype: str) -> None:
        for tensor in sources:
            if not self.cast and not widens(tensor.dtype, dtype):
                live = f"{dtype}; pass cast=True to round"
                self.problems.append(Problem("dtype", SECTION, f"{meaning} of {name}", stored=str(tensor), live=live))

    def samples(self, group: schema.ParameterGroup, live: Form) -> list[Sample]:
        """Parts of a few parameters of a group of the checkpoint with their slots, with matrices as they lie here."""
        turned = form_of(self.source, group).choice("outputs") != live.choice("outputs")
        found: list[Sample] = []
        left = _SAMPLED
        for name in group.parameters:
            if name not in self.checkpoint.weights.stored or left <= 0:
                continue
            weight = self.checkpoint.weights.stored[name]
            box = _box(weight.shape, left)
            sample = {"w": weight.numpy()[box]}
            for meaning, entries in self.stored.items():
                if name in entries:
                    sample[meaning] = _part(meaning, entries[name].numpy(), weight.shape, box)
            left -= sample["w"].size
            found.append({meaning: part.T if turned else part for meaning, part in sample.items()})
        return found


def _by_meaning(checkpoint: Checkpoint, optimizer: schema.Optimizer) -> dict[str, dict[str, StoredTensor]]:
    """The slots of a checkpoint as meaning -> parameter -> tensor."""
    found: dict[str, dict[str, StoredTensor]] = {}
    weights, tensors = checkpoint.weights.stored, checkpoint.optimizer.stored
    for slot in optimizer.slots.values():
        for name, key in slot.tensors.items():
            if name in weights and slot.meaning not in (CUSTOM, "step"):
                shape = weights[name].shape
                meaning = factored(slot.meaning, shape)
                size, stored = math.prod(tensors[key].shape), tensors[key]
                # What is not used of a factored state is of another size.
                if meaning not in AVERAGED and size != math.prod(shape) and meaning != "momentum_product":
                    continue
                if meaning in AVERAGED and (len(shape) < 2 or size * shape[AVERAGED[meaning]] != math.prod(shape)):
                    continue
                found.setdefault(meaning, {})[name] = stored
    return found


def _tied(aliases: Mapping[str, str], tensor: str) -> Iterator[str]:
    owner = aliases.get(tensor, tensor)
    yield owner
    yield from (alias for alias, other in aliases.items() if other == owner)


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: schema.from_number(value) if isinstance(value, schema.NonFinite) else value for name, value in values.items()}


def _signed(piece: Piece, linear: bool) -> Piece:
    return piece if linear or piece.sign > 0 else replace(piece, sign=1)


def _lies_in(target: Piece, source: Piece, axis: int) -> int | None:
    """The axis of `source` that `axis` of `target` begins in."""
    places = {name: place for place, group in enumerate(target.order) for name in group}
    place = next((places[name] for name in target.axes[axis] if name in places), None)
    there = source.order[place] if place is not None else ()
    return next((index for index, group in enumerate(source.axes) if set(group) & set(there)), None)


def _without(piece: Piece, group: tuple[str, ...]) -> Piece:
    """The piece of a tensor that lacks the axis `group`."""
    axes = tuple(each for each in piece.axes if each != group)
    order = tuple(each for each in piece.order if each != group)
    return replace(piece, axes=axes, order=order, sign=1)


def _box(shape: tuple[int, ...], elements: int) -> tuple[slice, ...]:
    """The first part of a tensor, of about so many elements."""
    largest = max(1, round(elements ** (1 / max(len(shape), 1))))
    return tuple(slice(0, max(largest, 1)) for _ in shape)


def _part(meaning: str, slot: np.ndarray, shape: tuple[int, ...], box: tuple[slice, ...]) -> np.ndarray:
    if meaning == "momentum_product":
        return slot
    if meaning in AVERAGED:
        axis = AVERAGED[meaning] % len(shape)
        left = [index for index in range(len(shape)) if index != axis]
        return slot.reshape([shape[index] for index in left])[tuple(box[index] for index in left)]
    return slot.reshape(shape)[box]
