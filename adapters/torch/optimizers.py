"""torch optimizers: what their slots mean, reading them without a step, and writing them back exactly."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from polyckpt import optimizers, residue, scalars
from polyckpt.adapter import Continuation, OptimizerCapture, Restore, StoredOptimizer
from polyckpt.adapters.torch import continued, tensors
from polyckpt.adapters.torch.continued import Continued
from polyckpt.checkpoint import StoredTensor
from polyckpt.converted import Made
from polyckpt.errors import MismatchError, Problem, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.names import type_name
from polyckpt.schema import Hyperparameter, ParameterGroup, to_number
from polyckpt.updates import Form

_ADAM_SLOTS = {"exp_avg": "first_moment", "exp_avg_sq": "second_moment", "max_exp_avg_sq": "max_second_moment"}
_ADAM_KEYS: dict[str, str | tuple[str, int]] = {
    "learning_rate": "lr",
    "beta1": ("betas", 0),
    "beta2": ("betas", 1),
    "epsilon": "eps",
    "weight_decay": "weight_decay",
    "maximize": "maximize",
}
_COMMON_KEYS: dict[str, str | tuple[str, int]] = {"learning_rate": "lr", "weight_decay": "weight_decay", "maximize": "maximize"}


@dataclass(frozen=True, slots=True)
class Row:
    """An optimizer class: family, slots as key -> meaning, hyperparameters as neutral name -> group key, conventions.

    said: conventions that a group says itself, as convention -> key in the group, and choice -> what stands there; the first
    choice is what None amounts to. counts: whether it counts the updates of a parameter.
    """

    family: str
    slots: Mapping[str, str]
    keys: Mapping[str, str | tuple[str, int]]
    conventions: Mapping[str, str] = field(default_factory=dict)
    said: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    counts: bool = True


_DECOUPLED = {"weight_decay": ("decoupled_weight_decay", {"coupled": False, "decoupled": True})}

_ROWS: dict[str, Row] = {
    "SGD": Row(
        "sgd",
        {"momentum_buffer": "momentum"},
        {**_COMMON_KEYS, "momentum": "momentum", "dampening": "dampening", "nesterov": "nesterov"},
        {"momentum": "unscaled"},
        counts=False,
    ),
    "Adam": Row(
        "adam",
        _ADAM_SLOTS,
        {**_ADAM_KEYS, "amsgrad": "amsgrad"},
        {"epsilon": "outside_sqrt", "max_second_moment": "raw"},
        _DECOUPLED,
    ),
    "NAdam": Row(
        "nadam",
        {**_ADAM_SLOTS, "mu_product": "momentum_product"},
        {**_ADAM_KEYS, "momentum_decay": "momentum_decay"},
        {"epsilon": "outside_sqrt", "momentum_schedule": "decaying"},
        _DECOUPLED,
    ),
    "RAdam": Row("radam", _ADAM_SLOTS, _ADAM_KEYS, {"epsilon": "before_bias_correction"}, _DECOUPLED),
    "SparseAdam": Row("sparse_adam", _ADAM_SLOTS, _ADAM_KEYS, {"epsilon": "before_bias_correction"}),
    "Adamax": Row("adamax", {"exp_avg": "first_moment", "exp_inf": "infinity_norm"}, _ADAM_KEYS, {"epsilon": "in_norm"}),
    "Adadelta": Row(
        "adadelta",
        {"square_avg": "second_moment", "acc_delta": "squared_update"},
        {**_COMMON_KEYS, "rho": "rho", "epsilon": "eps"},
        {"epsilon": "inside_sqrt"},
    ),
    "Adagrad": Row(
        "adagrad",
        {"sum": "squared_sum"},
        {
            **_COMMON_KEYS,
            "epsilon": "eps",
            "learning_rate_decay": "lr_decay",
            "initial_accumulator": "initial_accumulator_value",
        },
        {"epsilon": "outside_sqrt"},
    ),
    "RMSprop": Row(
        "rmsprop",
        {"square_avg": "second_moment", "momentum_buffer": "momentum", "grad_avg": "first_moment"},
        {**_COMMON_KEYS, "rho": "alpha", "epsilon": "eps", "momentum": "momentum", "centered": "centered"},
        {"epsilon": "outside_sqrt", "momentum": "unscaled"},
    ),
    "Rprop": Row(
        "rprop", {"prev": "previous_gradient", "step_size": "step_size"}, {"learning_rate": "lr", "maximize": "maximize"}
    ),
    "ASGD": Row("asgd", {"ax": "parameter_average", "eta": "schedule", "mu": "schedule"}, _COMMON_KEYS),
    "Adafactor": Row(
        "adafactor",
        {"row_var": "row_second_moment", "col_var": "column_second_moment", "variance": "second_moment"},
        {
            **_COMMON_KEYS,
            "beta2_decay": "beta2_decay",
            "epsilon": ("eps", 0),
            "epsilon2": ("eps", 1),
            "clip_threshold": "d",
        },
        {"epsilon": "as_bound", "rate": "bounded", "weight_decay": "decoupled"},
    ),
    "Muon": Row(
        "muon",
        {"momentum_buffer": "momentum"},
        {
            **_COMMON_KEYS,
            "momentum": "momentum",
            "nesterov": "nesterov",
            "epsilon": "eps",
            "iterations": "ns_steps",
            **{f"coefficient{place + 1}": ("ns_coefficients", place) for place in range(3)},
        },
        {
            "momentum": "average",
            "epsilon": "bound_of_norm",
            "weight_decay": "decoupled",
            "outputs": "first",
            "precision": "bfloat16",
        },
        {"scale": ("adjust_lr_fn", {"width": "original", "longer_axis": "match_rms_adamw"})},
        counts=False,
    ),
    "LBFGS": Row("lbfgs", {}, {"learning_rate": "lr"}),
}
_ROWS["AdamW"] = _ROWS["Adam"]


def capture(optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, Any]]) -> OptimizerCapture:
    """Describe an optimizer as it stands: nothing is stepped, and a parameter without state is stored as having none."""
    names = names_of(optimizer, parameters)
    known = {id(parameter) for _, parameter in parameters}
    foreign = {name: each for name, each in zip(names, _flat(optimizer), strict=True) if parameters and id(each) not in known}
    state_dict = optimizer.state_dict()
    slots: dict[str, dict[str, Leaf]] = {}
    values: dict[str, dict[Any, Any]] = {}
    shared: dict[Any, Any] = {}
    for key, state in state_dict["state"].items():
        if not isinstance(key, int) or key >= len(names):
            shared[key] = state
            continue
        for slot, value in state.items():
            if isinstance(value, torch.Tensor) and isinstance(slot, str):
                slots.setdefault(slot, {})[names[key]] = tensors.leaf(value, f"optimizer: {slot} of {names[key]}")
            else:
                values.setdefault(names[key], {})[slot] = value
    row, hook = _row(optimizer), continued.of(optimizer)
    groups = _describe_groups(optimizer, names, row, {name for name, _ in parameters})
    common = optimizers.common([group.conventions for group in groups])
    return OptimizerCapture(
        type=type_name(optimizer),
        family=row.family if row else optimizers.CUSTOM,
        slots=slots,
        meanings={slot: "step" if slot == "step" else row.slots.get(slot, optimizers.CUSTOM) for slot in slots} if row else {},
        groups=[optimizers.apart(group, row.family if row else optimizers.CUSTOM, common) for group in groups],
        conventions=common,
        step=_step(optimizer),
        native={
            "groups": _named_groups(state_dict, names),
            "shapes": {name: list(parameter.shape) for name, parameter in zip(names, _flat(optimizer), strict=True)},
            "values": values,
            "shared": shared,
            # Parameters of a loss, or of a second model: nothing else would hold them.
            "parameters": foreign,
            "other": {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")},
            **(
                {_CONTINUED: [{"family": each.family, "conventions": dict(each.conventions)} for each in hook.of]}
                if hook
                else {}
            ),
        },
        learning_rate=_learning_rate(optimizer),
        settable=[frozenset(row.keys) if row else frozenset()] * len(groups),
        choices=[{name: frozenset(choices) for name, (_, choices) in row.said.items()} if row else {}] * len(groups),
    )


_CONTINUED = "continued"


def continue_(
    optimizer: torch.optim.Optimizer, continuation: Continuation, parameters: Sequence[tuple[str, Any]], section: str
) -> Restore:
    """Prepare an optimizer to go on from a checkpoint of another framework: as if it had been saved here."""
    row = _row(optimizer)
    if row is None:
        raise UnsupportedError(f"{section}: a {type_name(optimizer)} has a formula of its own")
    exact = any(group.form for group in continuation.groups)
    if exact:
        continued.check(optimizer)
    names = names_of(optimizer, parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in zip(names, _flat(optimizer), strict=True)}
    state_dict = optimizer.state_dict()
    groups = _named_groups(state_dict, names)
    for group, new in zip(groups, continuation.groups, strict=True):
        of_form = new.form.hyperparameters if new.form else {}
        kept = {"learning_rate", *optimizers.CLIPS}
        for name, value in {
            **{name: value for name, value in of_form.items() if name not in kept},
            **new.hyperparameters,
        }.items():
            # What torch has no key for goes by its neutral name, for the hook.
            _put(group, row.keys.get(name, name), value)
        for name, choice in new.conventions.items():
            key, choices = row.said[name]
            group[key] = choices[choice]
    keys = _keys(row)
    slots: dict[str, dict[str, StoredTensor]] = {}
    for meaning, entries in continuation.slots.items():
        # Before the first update there is no buffer, and torch begins one otherwise than from zero.
        if row.family == "sgd" and not continuation.step:
            continue
        for name, tensor in entries.items():
            shape = _kept(meaning, tensor.shape, shapes[name])
            slots.setdefault(keys[meaning], {})[name] = Made(name, tensor.dtype, shape, tensor.numpy, tensor)
    if row.counts or (exact and continuation.step):
        held = {name for entries in slots.values() for name in entries}
        count = continuation.step
        slots["step"] = {name: Made("step", "float32", (), lambda: np.asarray(count)) for name in held}
    native = {
        "groups": groups,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "values": {},
        "shared": {},
        "other": {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")},
        **({_CONTINUED: [_told(group.form, row) for group in continuation.groups]} if exact else {}),
    }
    return prepare(optimizer, StoredOptimizer(type=type_name(optimizer), slots=slots, native=native), parameters, section)


def _told(form: Form | None, row: Row) -> dict[str, Any]:
    """A form without what stands in its group; a group that goes on from nothing follows torch's own."""
    return {
        "family": form.family if form else row.family,
        "conventions": dict(form.conventions if form else _conventions(row, {})),
    }


def _put(group: dict[str, Any], key: str | tuple[str, int], value: Any) -> None:
    if isinstance(key, str):
        group[key] = type(group[key])(value) if isinstance(group.get(key), int) and not isinstance(value, float) else value
    else:
        name, index = key
        group[name] = tuple(value if place == index else each for place, each in enumerate(group[name]))


def _keys(row: Row) -> dict[str, str]:
    """Meaning -> the key in the state; what torch does not know goes by its meaning."""
    return {**{meaning: meaning for meaning in optimizers.MEANINGS}, **{meaning: key for key, meaning in row.slots.items()}}


def _kept(meaning: str, shape: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
    """torch keeps the axis that was averaged away, as one of size one."""
    axis = optimizers.AVERAGED.get(meaning)
    return shape if axis is None else tuple(1 if at == len(whole) + axis else size for at, size in enumerate(whole))


def _hook(row: Row, told: Sequence[Mapping[str, Any]]) -> Continued:
    return Continued(
        [Form(each["family"], dict(each["conventions"]), {}) for each in told], _keys(row), lambda group: _read(row, group)
    )


def _read(row: Row, group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group: by torch's keys, and what it holds for a hook besides."""
    values = {name: _pick(group, key) for name, key in row.keys.items()}
    values |= {name: _pick(group, name) for name in optimizers.HYPERPARAMETERS if name in group and name not in values}
    return {name: value for name, value in values.items() if value is not None}


def prepare(
    optimizer: torch.optim.Optimizer,
    stored: StoredOptimizer,
    parameters: Sequence[tuple[str, Any]],
    section: str,
    *,
    in_place: bool = False,
) -> Restore:
    """Compare an optimizer with a stored one by the names of parameters, not by their position.

    in_place: let slots that are there be written where they lie, by `finish`, which the caller then must call.
    """
    names = names_of(optimizer, parameters)
    native = _read_native(stored.native)
    problems = list(_problems(optimizer, stored, native, names, section))
    unfit = {problem.name for problem in problems}

    before: list[Callable[[], None]] = []
    reused: dict[int, tuple[torch.Tensor, StoredTensor]] = {}

    def apply() -> torch.optim.Optimizer:
        if _TYPE not in unfit and _GROUPS not in unfit:
            before.append(_snapshot(optimizer, native.parameters.keys() - unfit, names))
            if in_place:
                reused.update(_reusable(optimizer, stored, names, unfit))
            try:
                with torch.inference_mode(False):
                    _write(optimizer, stored, native, names, unfit, {key: slot for key, (slot, _) in reused.items()})
                    _follow(optimizer, native)
            except Exception as error:
                refusal = f"{section}: {type(optimizer).__name__}.load_state_dict() refused what was stored: {error}"
                raise MismatchError(refusal) from error
        return optimizer

    def finish() -> None:
        tensors.write_all(reused.values())

    slots = [tensor for entries in stored.slots.values() for tensor in entries.values()]
    return Restore(
        apply=apply,
        problems=problems,
        tensors=[*slots, *residue.tensors(stored.native)],
        undo=lambda: before[0]() if before else None,
        finish=finish,
    )


def _reusable(
    optimizer: torch.optim.Optimizer, stored: StoredOptimizer, names: Sequence[str], unfit: set[str]
) -> dict[int, tuple[torch.Tensor, StoredTensor]]:
    """The stored slots, by identity, that fit into live ones whose memory nothing else has: it is mapped already."""
    parameters = dict(zip(names, _flat(optimizer), strict=True))
    live = {
        (slot, name): value
        for name, parameter in parameters.items()
        if name not in unfit
        for slot, value in optimizer.state.get(parameter, {}).items()
        if type(value) is torch.Tensor and value.layout is torch.strided
    }
    places = Counter(tensor.untyped_storage().data_ptr() for tensor in (*live.values(), *parameters.values()))
    found: dict[int, tuple[torch.Tensor, StoredTensor]] = {}
    for slot, entries in stored.slots.items():
        for name, tensor in entries.items():
            value = live.get((slot, name))
            if (
                value is not None
                and (tuple(value.shape), tensors.DTYPE_NAMES.get(value.dtype)) == (tensor.shape, tensor.dtype)
                and _is_laid_out_like(value, parameters[name])
                and places[value.untyped_storage().data_ptr()] == 1
                and not value.is_inference()
            ):
                found.setdefault(id(tensor), (value, tensor))
    return found


def _is_laid_out_like(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    return value.stride() == parameter.stride() if value.shape == parameter.shape else value.is_contiguous()


def _snapshot(optimizer: torch.optim.Optimizer, foreign: AbstractSet[str], names: Sequence[str]) -> Callable[[], None]:
    """What puts an optimizer back. load_state_dict() makes state and groups anew, so that the old ones need no copy."""
    state, groups = optimizer.state, optimizer.param_groups
    written = [value for group in groups for value in group.values() if isinstance(value, torch.Tensor)]
    written += [parameter for name, parameter in zip(names, _flat(optimizer), strict=True) if name in foreign]
    values = [(value, value.detach().clone()) for value in written]
    hook = continued.of(optimizer)

    def back() -> None:
        continued.remove(optimizer)
        if hook:
            hook.install(optimizer)
        optimizer.state, optimizer.param_groups = state, groups
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)

    return back


def capture_tree(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer as one tree, for where it stands beside the main one; parameters go by their position."""
    captured = capture(optimizer, [])
    return {
        "type": captured.type,
        "slots": {slot: dict(entries) for slot, entries in captured.slots.items()},
        "native": captured.native,
    }


def prepare_tree(optimizer: torch.optim.Optimizer, tree: Mapping[str, Any], path: str) -> Restore:
    """The counterpart of `capture_tree`."""
    slots = {slot: {name: ref.stored for name, ref in entries.items()} for slot, entries in tree["slots"].items()}
    return prepare(optimizer, StoredOptimizer(type=tree["type"], slots=slots, native=tree["native"]), [], path)


@dataclass(frozen=True, slots=True)
class _Native:
    """The native residue of an optimizer: named groups, shapes of parameters, what is in its state beside slots."""

    groups: list[dict[str, Any]]
    shapes: dict[str, list[int]]
    values: dict[str, dict[Any, Any]]
    shared: dict[Any, Any]
    parameters: dict[str, Any]
    other: dict[str, Any]
    continued: list[dict[str, Any]]


def _read_native(tree: Mapping[str, Any]) -> _Native:
    """Everything in the residue, read before anything is written, so that nothing in it can fail a half-done restore."""
    return _Native(
        groups=[{**residue.live(group), "params": list(group["params"])} for group in tree["groups"]],
        shapes=dict(tree["shapes"]),
        values={name: dict(residue.live(values)) for name, values in tree["values"].items()},
        shared=dict(residue.live(tree["shared"])),
        parameters=dict(residue.live(tree.get("parameters", {}))),
        other=dict(residue.live(tree["other"])),
        continued=[dict(each) for each in tree.get(_CONTINUED) or ()],
    )


_TYPE = "class"
_GROUPS = "parameter groups"


def _problems(
    optimizer: torch.optim.Optimizer, stored: StoredOptimizer, native: _Native, names: Sequence[str], section: str
) -> Iterator[Problem]:
    if stored.type.rpartition(".")[2] != type(optimizer).__qualname__.rpartition(".")[2]:
        yield Problem("value", section, _TYPE, stored=stored.type, live=type_name(optimizer))
        return
    groups = native.groups
    if len(groups) != len(optimizer.param_groups):
        yield Problem("value", section, _GROUPS, stored=str(len(groups)), live=str(len(optimizer.param_groups)))
        return
    position = 0
    for index, (saved, live) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        inside = names[position : position + len(live["params"])]
        position += len(inside)
        for name in inside:
            if name not in saved["params"]:
                yield Problem("missing", section, name, stored=f"it not in group {index}", live=f"it in group {index}")
        for name in saved["params"]:
            if name not in inside:
                yield Problem("unexpected", section, name, stored=f"it in group {index}", live=f"it not in group {index}")
    for name, parameter in zip(names, _flat(optimizer), strict=True):
        if native.shapes.get(name, list(parameter.shape)) != list(parameter.shape):
            yield Problem("shape", section, name, stored=str(native.shapes[name]), live=str(list(parameter.shape)))
        elif (value := native.parameters.get(name)) is not None and tensors.show(value) != tensors.show(parameter):
            yield Problem("dtype", section, name, stored=tensors.show(value), live=tensors.show(parameter))
    for slot, entries in stored.slots.items():
        for name, tensor in entries.items():
            if not tensors.loadable(tensor):
                yield Problem("dtype", section, f"{slot} of {name}", stored=str(tensor), live="no such type in torch")


def _write(
    optimizer: torch.optim.Optimizer,
    stored: StoredOptimizer,
    native: _Native,
    names: Sequence[str],
    unfit: set[str],
    reused: Mapping[int, torch.Tensor],
) -> None:
    index_of = {name: index for index, name in enumerate(names) if name not in unfit}
    state: dict[Any, dict[Any, Any]] = {}
    exact: dict[tuple[int, str], torch.Tensor] = {}
    copies = dict(reused)
    for slot, entries in stored.slots.items():
        for name, tensor in entries.items():
            if name in index_of:
                # One stored tensor in several places was one live tensor, which an in-place update reaches through all.
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensors.copied(tensor)
                state.setdefault(index_of[name], {})[slot] = exact[index_of[name], slot] = copies[id(tensor)]
    for name, values in native.values.items():
        if name in index_of:
            state.setdefault(index_of[name], {}).update(values)
    before = [dict(group) for group in optimizer.param_groups]
    groups, position = [], 0
    for saved, live in zip(native.groups, before, strict=True):
        count = len(live["params"])
        kept = {"param_names": live["param_names"]} if "param_names" in live else {}
        groups.append({**live, **saved, **kept, "params": list(range(position, position + count))})
        position += count
    optimizer.load_state_dict({**native.other, "state": {**state, **native.shared}, "param_groups": groups})
    _undo_casts(optimizer, exact)
    flat = _flat(optimizer)
    for name, values in native.values.items():
        if name in index_of:
            loaded = optimizer.state[flat[index_of[name]]]
            loaded.update({slot: _uncast(loaded[slot], value) for slot, value in values.items() if slot in loaded})
    with torch.no_grad():
        for name, value in native.parameters.items():
            if name in index_of:
                flat[index_of[name]].copy_(value)
    _keep_tensor_hyperparameters(optimizer, before)


def _follow(optimizer: torch.optim.Optimizer, native: _Native) -> None:
    """Let the optimizer compute what the stored one did: its own formula, or that of another framework."""
    continued.remove(optimizer)
    if native.continued and (row := _row(optimizer)):
        _hook(row, native.continued).install(optimizer)


def _undo_casts(optimizer: torch.optim.Optimizer, exact: Mapping[tuple[int, str], torch.Tensor]) -> None:
    """Give slots back the type they had: load_state_dict casts floating ones to the type of the parameter."""
    moved: dict[tuple[int, torch.device], torch.Tensor] = {}
    parameters = _flat(optimizer)
    for (index, slot), tensor in exact.items():
        loaded = optimizer.state[parameters[index]].get(slot)
        # Where load_state_dict put it is right (a capturable step on the device), what it made of it is not.
        if isinstance(loaded, torch.Tensor) and loaded.shape == tensor.shape:
            place = (id(tensor), loaded.device)
            if place not in moved:
                moved[place] = tensors.laid_out_like(tensor.to(loaded.device), parameters[index])
            optimizer.state[parameters[index]][slot] = moved[place]


def _uncast(loaded: Any, exact: Any) -> Any:
    """`loaded` with the tensors of `exact`, however nested, on the devices where load_state_dict put them."""
    if isinstance(exact, torch.Tensor):
        return exact.to(loaded.device) if isinstance(loaded, torch.Tensor) else loaded
    if isinstance(exact, dict) and isinstance(loaded, dict):
        for key in exact.keys() & loaded.keys():
            exact[key] = _uncast(loaded[key], exact[key])
        return exact
    if isinstance(exact, list | tuple | deque) and isinstance(loaded, type(exact)) and len(exact) == len(loaded):
        values = [_uncast(*pair) for pair in zip(loaded, exact, strict=True)]
        return deque(values, exact.maxlen) if isinstance(exact, deque) else type(exact)(values)
    # load_state_dict rebuilds all that can be iterated, strings too, from a generator.
    return exact


def _keep_tensor_hyperparameters(optimizer: torch.optim.Optimizer, before: Sequence[Mapping[str, Any]]) -> None:
    """A learning rate that is a tensor keeps its identity: compiled steps and graphs hold on to it."""
    with torch.no_grad():
        for group, old in zip(optimizer.param_groups, before, strict=True):
            for key, value in old.items():
                new = group[key]
                if isinstance(value, torch.Tensor) and isinstance(new, torch.Tensor) and value.shape == new.shape:
                    group[key] = value.copy_(new)


def _flat(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def names_of(optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, Any]]) -> list[str]:
    """The name of each parameter in the order of the groups: that of the model's weight, else its place."""
    known = {id(parameter): name for name, parameter in parameters}
    return [
        known.get(id(parameter), f"group {index}, parameter {place}")
        for index, group in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(group["params"])
    ]


def _named_groups(state_dict: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    return [{**group, "params": [names[index] for index in group["params"]]} for group in state_dict["param_groups"]]


def row_of(kind: type) -> Row | None:
    """The row of a class, or of the nearest that it inherits from; None where there is none."""
    return next((_ROWS[each.__name__] for each in kind.__mro__ if each.__name__ in _ROWS), None)


def _row(optimizer: torch.optim.Optimizer) -> Row | None:
    """The row of the torch.optim class whose `step` runs; a subclass that replaces it may mean anything."""
    step: Callable[..., Any] = type(optimizer).step
    if not step.__module__.startswith("torch.optim."):
        return None
    row = row_of(type(optimizer))
    if row and (hook := continued.of(optimizer)):
        return replace(
            row, family=hook.of[0].family, slots={**row.slots, **{key: meaning for meaning, key in hook.slots.items()}}
        )
    return row


def _describe_groups(
    optimizer: torch.optim.Optimizer, names: Sequence[str], row: Row | None, weights: set[str]
) -> list[ParameterGroup]:
    described, position = [], 0
    hook = continued.of(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        inside = names[position : position + len(group["params"])]
        position += len(inside)
        values = _read(row, group) if row else {}
        if row and row.family == "adafactor" and "epsilon" not in values and group["params"]:
            values["epsilon"] = torch.finfo(group["params"][0].dtype).eps  # what torch takes for None
        form = hook.form_of(index) if hook else None
        conventions = (_conventions(row, group) if row else {}) if form is None else {**_decay(row), **form.conventions}
        if "scale" in conventions:
            values.setdefault("rms_rate", _RMS_RATE)
        hyperparameters: dict[str, Hyperparameter] = {name: to_number(value) for name, value in values.items()}
        described.append(
            ParameterGroup(
                parameters=tuple(name for name in inside if name in weights),
                hyperparameters=hyperparameters,
                family=form.family if form else None,
                conventions=conventions,
            )
        )
    return described


_RMS_RATE = 0.2
"""What torch's Muon multiplies with where it matches the updates of AdamW (Liu et al. 2025)."""


def _pick(group: Mapping[str, Any], key: str | tuple[str, int]) -> Any:
    value = group.get(key) if isinstance(key, str) else group.get(key[0], (None, None))[key[1]]
    return _number(value) if hasattr(value, "item") else value if isinstance(value, bool | int | float | str) else None


def _number(value: Any) -> float | int | None:
    """A Python number, or None for what is not one."""
    try:
        return scalars.scalar(value, "")
    except UnsupportedError:
        return None


def _conventions(row: Row, group: Mapping[str, Any]) -> dict[str, str]:
    """Those of a class, and what a group says itself."""
    said = {}
    for name, (key, choices) in row.said.items():
        said[name] = next((choice for choice, value in choices.items() if group.get(key) == value), next(iter(choices)))
    return {**_decay(row), **row.conventions, **said}


def _decay(row: Row | None) -> dict[str, str]:
    """How weight decay enters where nothing else is said."""
    return {"weight_decay": row.conventions.get("weight_decay", "coupled")} if row and "weight_decay" in row.keys else {}


def _step(optimizer: torch.optim.Optimizer) -> int | None:
    """Completed updates where all parameters that have a count agree."""
    steps = {_number(state["step"]) for state in optimizer.state.values() if isinstance(state, dict) and "step" in state}
    step = steps.pop() if len(steps) == 1 else None
    return int(step) if step is not None and step >= 0 and step % 1 == 0 else None


def _learning_rate(optimizer: torch.optim.Optimizer) -> float | tuple[float, ...] | None:
    rates = [_number(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    found = tuple(float(rate) for rate in rates if rate is not None)
    if not found or len(found) != len(rates):
        return None
    return found if len(found) > 1 else found[0]
