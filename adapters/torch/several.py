"""Several torch optimizers as one: of matrices and of all else (Muon beside AdamW), of a generator and its critic.

Their groups stand one after the other, and their slots side by side, so that they go on in one optimizer of another framework.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from polyckpt import optimizers
from polyckpt.adapter import Continuation, OptimizerCapture, Restore, StoredOptimizer
from polyckpt.adapters.torch import optimizers as single
from polyckpt.errors import Problem, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.names import type_name
from polyckpt.schema import ParameterGroup

Optimizers = Sequence[torch.optim.Optimizer]
Parameters = Sequence[tuple[str, Any]]


def capture(several: Optimizers, parameters: Parameters) -> OptimizerCapture:
    """Describe optimizers as they stand. Raises UnsupportedError where two of them have a parameter in common."""
    parts = [single.capture(each, parameters) for each in several]
    slots: dict[str, dict[str, Leaf]] = {}
    of: dict[str, int] = {}
    for index, part in enumerate(parts):
        for name in part.native["shapes"]:
            if of.setdefault(name, index) != index:
                raise UnsupportedError(f"optimizers {of[name]} and {index}: both have {name}: pass one of them in `extra`")
        for slot, entries in part.slots.items():
            slots.setdefault(slot, {}).update(entries)
    groups = [_whole(group, part) for part in parts for group in part.groups]
    common = optimizers.common([group.conventions for group in groups])
    family = parts[0].family
    rates = [part.learning_rate for part in parts]
    flat = tuple(rate for each in rates if each is not None for rate in (each if isinstance(each, tuple) else (each,)))
    steps = {part.step for part in parts} - {None}
    return OptimizerCapture(
        type=_type(several),
        family=family,
        slots=slots,
        # Where two optimizers keep different things under one key, it says nothing.
        meanings={
            slot: found.pop() for slot in slots if len(found := {p.meanings[slot] for p in parts if slot in p.meanings}) == 1
        },
        groups=[optimizers.apart(group, family, common) for group in groups],
        conventions=common,
        step=steps.pop() if len(steps) == 1 else None,
        native={_SEVERAL: [{"type": part.type, "state": part.native} for part in parts]},
        learning_rate=flat if None not in rates else None,
        settable=[each for part in parts for each in part.settable],
        choices=[each for part in parts for each in part.choices],
    )


_SEVERAL = "several"


def parts_of(native: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What was kept of each of several optimizers; nothing where there was one."""
    return [part["state"] for part in native.get(_SEVERAL, ())]


def _type(several: Optimizers) -> str:
    return " and ".join(map(type_name, several))


def _whole(group: ParameterGroup, part: OptimizerCapture) -> ParameterGroup:
    """A group that says of itself what its optimizer says of all."""
    return ParameterGroup(
        parameters=group.parameters,
        hyperparameters=group.hyperparameters,
        family=group.family or part.family,
        conventions={**part.conventions, **group.conventions},
    )


def prepare(several: Optimizers, stored: StoredOptimizer, parameters: Parameters, section: str) -> Restore:
    """Compare optimizers with those stored, one by one in their order."""
    saved = stored.native.get(_SEVERAL)
    if saved is None or len(saved) != len(several):
        return _refused(several, stored.type, section)
    parts = []
    for optimizer, each in zip(several, saved, strict=True):
        # Slots of parameters that an optimizer does not have are nothing to it.
        own = StoredOptimizer(type=each["type"], slots=stored.slots, native=each["state"])
        parts.append(single.prepare(optimizer, own, parameters, section, in_place=True))
    return _together(several, parts)


def refuse(optimizer: torch.optim.Optimizer, stored: StoredOptimizer, section: str) -> Restore | None:
    """What becomes of one optimizer where several are stored; None where one is."""
    return _refused([optimizer], stored.type, section) if _SEVERAL in stored.native else None


def _refused(several: Optimizers, stored: str, section: str) -> Restore:
    problem = Problem("value", section, "class", stored=stored, live=_type(several))
    return Restore(apply=lambda: several[0] if len(several) == 1 else several, problems=[problem])


def continue_(several: Optimizers, continuation: Continuation, parameters: Parameters, section: str) -> Restore:
    """Prepare optimizers to go on from a checkpoint of another framework."""
    parts = list(_continued(several, continuation, parameters, section))
    return _together(several, parts)


def _continued(several: Optimizers, continuation: Continuation, parameters: Parameters, section: str) -> Iterator[Restore]:
    start = 0
    for optimizer in several:
        groups = continuation.groups[start : start + len(optimizer.param_groups)]
        start += len(groups)
        names = {name for group in groups for name in group.parameters}
        slots = {
            meaning: inside
            for meaning, entries in continuation.slots.items()
            if (inside := {name: tensor for name, tensor in entries.items() if name in names})
        }
        yield single.continue_(optimizer, Continuation(step=continuation.step, groups=groups, slots=slots), parameters, section)


def _together(several: Optimizers, parts: Sequence[Restore]) -> Restore:
    applied: list[Restore] = []

    def apply() -> Optimizers:
        for part in parts:
            applied.append(part)
            part.apply()
        return several

    def undo() -> None:
        for part in reversed(applied):
            if part.undo:
                part.undo()

    def finish() -> None:
        for part in parts:
            part.finish()

    return Restore(
        finish=finish,
        apply=apply,
        problems=[problem for part in parts for problem in part.problems],
        tensors=[tensor for part in parts for tensor in part.tensors],
        undo=undo,
    )
