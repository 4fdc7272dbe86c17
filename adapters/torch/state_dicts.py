"""State dicts of optimizers and schedulers without the objects that they are of: which class, and whose slots they hold.

A state dict numbers the parameters and does not name its class. Both are told by evidence: the keys that each class of torch
writes, the shapes of the slots, the order of a model's parameters. What that leaves open is not guessed.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from polyckpt import residue
from polyckpt.adapter import ModelCapture, OptimizerCapture
from polyckpt.adapters.torch import optimizers, several, tensors
from polyckpt.checkpoint import Checkpoint, StoredTensor
from polyckpt.formats.described import Like

_OF_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "param_names", "name", "params"}
)
"""Keys of groups that no optimizer writes itself."""

_HOW = "pass like=(model, optimizer), live ones of their classes"

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""How torch.nn calls what is in a state dict and is no parameter."""


def optimizer_capture(
    states: Sequence[Mapping[str, Any]],
    model: ModelCapture,
    like: Like | None,
    left_out: list[str],
    orders: Sequence[Sequence[str]] = (),
) -> OptimizerCapture | None:
    """Describe optimizers by their state dicts, as if they had been captured live; None where that cannot be told.

    model: whose parameters they are of. like: the live objects that may tell class and order. left_out: gets why not.
    orders: of parameters, that whoever wrote the state may have given them in.
    """
    live = _live(like)
    made: list[torch.optim.Optimizer] = []
    parameters: list[tuple[str, Any]] = []
    for index, state in enumerate(states):
        what = f"optimizer {index}" if len(states) > 1 else "optimizer"
        partner = live[index] if len(live) == len(states) else None
        names = _names(state, [*_candidates(state["param_groups"], model, like, partner), *orders], model)
        if names is None:
            left_out.append(
                f"{what}: its state numbers the parameters, and which number is which weight cannot be told from shapes and "
                f"order alone: {_HOW}"
            )
            return None
        kind = _class(state, partner)
        if kind is _Unknown:
            left_out.append(f"{what}: of which class it is cannot be told from its state: {_HOW}")
        one, dummies = _filled(state, names, model, kind)
        made.append(one)
        parameters += [pair for pair in dummies if pair[0] not in {name for name, _ in parameters}]
    captured = several.capture(made, parameters) if len(made) > 1 else optimizers.capture(made[0], parameters)
    return dataclasses.replace(captured, type=captured.type.replace(_UNKNOWN, "unknown"))


_FLAT = re.compile(r"(state|param_groups)\.(.+)\.([^.]+)")


def is_flattened(value: Any) -> bool:
    """Whether it is the state of an optimizer as one dict, "state.<parameter>.<slot>" and "param_groups.<parameter>.<key>"."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) and _FLAT.fullmatch(name) for name in value)
        and any(name.startswith("param_groups.") for name in value)
    )


def nested(flattened: Mapping[str, Any]) -> dict[str, Any]:
    """The state that was flattened; parameters whose keys are all equal are in one group."""
    found: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for name, value in flattened.items():
        matched = _FLAT.fullmatch(name)
        assert matched is not None
        part, parameter, key = matched.groups()
        found[part].setdefault(parameter, {})[key] = value
    groups: list[dict[str, Any]] = []
    for parameter, keys in found["param_groups"].items():
        group = next((each for each in groups if each["keys"] == keys), None)
        if group is None:
            groups.append(group := {"keys": keys, "params": []})
        group["params"].append(parameter)
    return {"state": found["state"], "param_groups": [{**group["keys"], "params": group["params"]} for group in groups]}


def scheduler_entry(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a scheduler, as polyckpt.objects keeps it; a state dict does not say of which class it is."""
    return {"adapter": None, "kind": "state_dict", "type": "", "state": dict(state)}


def _live(like: Like | None) -> list[torch.optim.Optimizer]:
    found = [] if like is None or like.optimizer is None else like.optimizer
    listed = list(found) if isinstance(found, list | tuple) else [found]
    return listed if all(isinstance(each, torch.optim.Optimizer) for each in listed) else []


# Which class.


class _Unknown(torch.optim.Optimizer):
    """An optimizer that torch does not have."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})


_UNKNOWN = f"{_Unknown.__module__}.{_Unknown.__qualname__}"


def _class(state: Mapping[str, Any], partner: torch.optim.Optimizer | None) -> type[torch.optim.Optimizer]:
    """The class that wrote a state: the live one's where it may be that, else the only one that it may be."""
    fitting = [kind for kind in _classes() if _fits(state, kind)]
    if any(each.get("decoupled_weight_decay") for each in state["param_groups"]) and torch.optim.AdamW in fitting:
        fitting = [torch.optim.AdamW]
    elif all(each.get("decoupled_weight_decay") is False for each in state["param_groups"]):
        fitting = [kind for kind in fitting if kind is not torch.optim.AdamW]
    if partner is not None and (type(partner) in fitting or (not fitting and _same_keys(state, partner))):
        return type(partner)
    return fitting[0] if len(fitting) == 1 else _Unknown


@cache
def _classes() -> dict[type[torch.optim.Optimizer], frozenset[str]]:
    """Every optimizer of torch -> the keys of its groups."""
    found: dict[type[torch.optim.Optimizer], frozenset[str]] = {}
    for kind in vars(torch.optim).values():
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            found[kind] = frozenset(kind([torch.nn.Parameter(torch.empty(2, 2))]).param_groups[0])  # type: ignore[call-arg]
    return found


def _fits(state: Mapping[str, Any], kind: type[torch.optim.Optimizer]) -> bool:
    """Whether the class may have written it: all that its row reads is there, and nothing that it does not write."""
    row = optimizers.row_of(kind)
    if row is None:
        return False
    needed = {key if isinstance(key, str) else key[0] for key in row.keys.values()} - {"maximize"}
    known = _classes()[kind] | _OF_SCHEDULERS
    slots = {slot for each in state["state"].values() if isinstance(each, Mapping) for slot in each}
    return all(needed <= group.keys() <= known for group in state["param_groups"]) and slots <= {*row.slots, "step"} | (
        _LBFGS if kind is torch.optim.LBFGS else frozenset()
    )


_LBFGS = frozenset(
    {"func_evals", "n_iter", "t", "d", "prev_flat_grad", "old_dirs", "old_stps", "ro", "al", "H_diag", "prev_loss"}
)


def _same_keys(state: Mapping[str, Any], partner: torch.optim.Optimizer) -> bool:
    groups = zip(state["param_groups"], partner.param_groups, strict=False)
    return len(state["param_groups"]) == len(partner.param_groups) and all(
        saved.keys() - _OF_SCHEDULERS == live.keys() - _OF_SCHEDULERS for saved, live in groups
    )


# Whose slots.


def _names(state: Mapping[str, Any], candidates: Sequence[Sequence[str]], model: ModelCapture) -> list[str] | None:
    """The first order of names that all shapes agree with, None where there is none."""
    count = sum(len(group["params"]) for group in state["param_groups"])
    return next((list(names) for names in candidates if len(names) == count and _agree(state, names, model)), None)


def _candidates(
    groups: Sequence[Mapping[str, Any]],
    model: ModelCapture,
    like: Like | None,
    partner: torch.optim.Optimizer | None,
) -> Iterator[Sequence[str]]:
    """Orders that the parameters may have, the surest first."""
    by_name = all(isinstance(each, str) for group in groups for each in group["params"])
    if by_name or all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        named = [name for group in groups for name in group["params" if by_name else "param_names"]]
        ends = {name: [own for own in model.weights if own == name or name.endswith(f".{own}")] for name in named}
        if all(ends.values()):
            yield [max(own, key=len) for own in ends.values()]
    if by_name:  # as torch.distributed.checkpoint.state_dict writes it: their place says nothing
        return
    sizes = [len(group["params"]) for group in groups]
    if partner is not None and like is not None and sizes == [len(group["params"]) for group in partner.param_groups]:
        names = optimizers.names_of(partner, like.captured.parameters)
        # An optimizer of another model says nothing; one that is loaded into may hold parameters of a loss besides.
        if not like.required or all(name in model.weights for name in names):
            yield names
    if len(groups) == 1 and model.parameters:
        yield [name for name, _ in model.parameters]
    if len(groups) == 1 and not model.parameters:
        leaves = model.weights
        seen: set[Any] = set()
        floating = []
        for name, leaf in leaves.items():
            if leaf.dtype.startswith(("float", "bfloat", "complex")) and name.rpartition(".")[2] not in _BUFFERS:
                if leaf.identity is None or leaf.identity not in seen:
                    floating.append(name)
                seen.add(leaf.identity)
        yield floating


def _agree(state: Mapping[str, Any], names: Sequence[str], model: ModelCapture) -> bool:
    """Whether every slot has the shape of its parameter, or of a part of it."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, name in zip(numbers, names, strict=True):
        shape = model.weights[name].shape if name in model.weights else None
        for slot, value in (state["state"].get(number) or {}).items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0 or slot in _LBFGS or shape is None:
                continue
            fits = value.ndim == len(shape) and all(one in (size, 1) for one, size in zip(value.shape, shape, strict=True))
            if not fits:
                return False
    return True


def _filled(
    state: Mapping[str, Any], names: Sequence[str], model: ModelCapture, kind: type[torch.optim.Optimizer]
) -> tuple[torch.optim.Optimizer, list[tuple[str, Any]]]:
    """An optimizer in this state over parameters without values, described as any other; and those by name."""
    shapes = [model.weights[name].shape if name in model.weights else () for name in names]
    dummies = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    sizes = [len(group["params"]) for group in state["param_groups"]]
    left = iter(dummies)
    groups = [{"params": [next(left) for _ in range(size)]} for size in sizes]
    made: torch.optim.Optimizer = _Unknown(groups)
    made.__class__ = kind  # not by its constructor, which may want more, and refuse these
    for group, saved in zip(made.param_groups, state["param_groups"], strict=True):
        members = group["params"]
        group.clear()
        group.update({**{key: value for key, value in saved.items() if key != "params"}, "params": members})
    made.state.clear()
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, dummies, strict=True))
    for number, slots in state["state"].items():
        made.state[by_number.get(number, number)] = dict(slots) if isinstance(slots, Mapping) else slots
    return made, list(zip(names, dummies, strict=True))


def of_stored(checkpoint: Checkpoint, native: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The state dicts of the optimizers of a checkpoint that this adapter wrote. native: what it kept of them."""
    described = checkpoint.manifest.optimizer
    assert described is not None
    stored = checkpoint.optimizer.stored
    slots = {slot: {name: stored[key] for name, key in each.tensors.items()} for slot, each in described.slots.items()}
    parts = several.parts_of(native) or [native]
    return [_state_dict(part, slots) for part in parts]


def _state_dict(native: Mapping[str, Any], slots: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, Any]:
    groups = [{**residue.live(group), "params": list(group["params"])} for group in native["groups"]]
    names = [name for group in groups for name in group["params"]]
    values = residue.live(native["values"])
    state: dict[Any, Any] = {}
    for number, name in enumerate(names):
        held = {slot: tensors.copied(entries[name]) for slot, entries in slots.items() if name in entries}
        if held := {**held, **values.get(name, {})}:
            state[number] = held
    state |= residue.live(native["shared"])
    numbered = {name: number for number, name in enumerate(names)}
    return {
        "state": state,
        "param_groups": [{**group, "params": [numbered[name] for name in group["params"]]} for group in groups],
        **residue.live(native["other"]),
    }
