"""optax states, alone or in a flax TrainState or nnx.Optimizer: which leaves belong to which weight, and what they hold.

The classes of a state do not say which optimizer it is of (that of Adam serves six), nor its hyperparameters unless they are
injected. The transformation does, where it is at hand. What is left open is "custom" here; `native["states"]` keeps the classes
for a caller who knows more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from polyckpt import names, optimizers
from polyckpt.adapter import Continuation, ContinuedGroup, ModelCapture, OptimizerCapture, Restore, StoredOptimizer
from polyckpt.adapters.jax import arrays, transforms, trees
from polyckpt.adapters.jax.arrays import Stored
from polyckpt.adapters.jax.continued import ContinuedState
from polyckpt.adapters.jax.transforms import Described
from polyckpt.adapters.jax.trees import Entry
from polyckpt.converted import Made
from polyckpt.errors import CorruptError, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.optimizers import factored
from polyckpt.schema import ParameterGroup, to_number
from polyckpt.updates import Form


class Carried(NamedTuple):
    """What a train state carries of its optimizer. tx: gives the transformation that the state is of.

    A function, since to a tree it is structure; a transformation may be any object.
    """

    opt_state: Any
    step: Any
    tx: Callable[[], Any]


_MEANINGS: dict[tuple[str, str], str] = {
    # Adamax and Yogi keep something else than Adam in `nu`.
    ("ScaleByAdamState", "mu"): "first_moment",
    ("ScaleByAmsgradState", "mu"): "first_moment",
    ("ScaleByAmsgradState", "nu"): "second_moment",
    ("ScaleByAmsgradState", "nu_max"): "max_second_moment",
    ("ScaleByBeliefState", "mu"): "first_moment",
    ("ScaleByLionState", "mu"): "first_moment",
    ("MuonState", "mu"): "momentum",
    ("ScaleByRmsState", "nu"): "second_moment",
    ("ScaleByRmsWithCountState", "nu"): "second_moment",
    ("ScaleByRStdDevState", "mu"): "first_moment",
    ("ScaleByRStdDevState", "nu"): "second_moment",
    ("ScaleByRStdDevWithCountState", "mu"): "first_moment",
    ("ScaleByRStdDevWithCountState", "nu"): "second_moment",
    ("ScaleByRssState", "sum_of_squares"): "squared_sum",
    ("ScaleByAdaDeltaState", "e_g"): "second_moment",
    ("ScaleByAdaDeltaState", "e_x"): "squared_update",
    ("FactoredState", "v_row"): "longest_axis_second_moment",
    ("FactoredState", "v_col"): "next_axis_second_moment",
    ("FactoredState", "v"): "second_moment",
    ("ScaleByRpropState", "step_sizes"): "step_size",
    ("TraceState", "trace"): "momentum",
    **{("ContinuedState", meaning): meaning for meaning in ContinuedState._fields if meaning != "count"},
    ("MultiStepsState", "acc_grads"): "gradient_accumulator",
    ("ApplyEvery", "grad_acc"): "gradient_accumulator",
}
"""State class and field -> what it holds in every optimizer that has this state."""

_FACTORED = {("FactoredState", "v_row"), ("FactoredState", "v_col"), ("FactoredState", "v")} | {
    ("ContinuedState", meaning) for meaning in ContinuedState._fields
}
"""Slots whose tensors may have another shape than their parameter."""

_STEPS = {
    *(
        (name, "count")
        for name in (
            "ScaleByAdamState",
            "ScaleByAmsgradState",
            "ScaleByBeliefState",
            "ScaleByLionState",
            "ScaleByNovogradState",
            "ScaleByRmsWithCountState",
            "ScaleByRStdDevWithCountState",
            "ScaleByScheduleState",
            "ContinuedState",
            "FactoredState",
            "MuonState",
            "EmaState",
            "InjectHyperparamsState",
            "InjectStatefulHyperparamsState",
            "WrappedScheduleState",
            "WeightDecaySchedule",
        )
    ),
    ("ScaleByAdanState", "t"),
    ("MultiStepsState", "gradient_step"),
}
"""Fields that count completed updates."""

_FAMILIES = {
    "ScaleByAmsgradState": "adam",
    "ScaleByLionState": "lion",
    "MuonState": "muon",
    "ScaleByRmsState": "rmsprop",
    "ScaleByRmsWithCountState": "rmsprop",
    "ScaleByRStdDevState": "rmsprop",
    "ScaleByRStdDevWithCountState": "rmsprop",
    "ScaleByRssState": "adagrad",
    "ScaleByAdaDeltaState": "adadelta",
    "FactoredState": "adafactor",
    "ScaleByRpropState": "rprop",
}
"""States that one family alone has."""

_INJECTED = ("InjectHyperparamsState", "InjectStatefulHyperparamsState")


@dataclass(frozen=True, slots=True)
class _Place:
    """A subtree that mirrors the parameters, or a leaf that does not: where, and the state class and field it stands in."""

    path: tuple[Any, ...]
    owner: tuple[str, str]
    prefixes: frozenset[str] | None


def capture(optimizer: Any, model: ModelCapture) -> OptimizerCapture:
    """Describe an optimizer state over the weights of `model`."""
    state, found, carried = _opened(optimizer)
    shapes = {name: leaf.shape for name, leaf in model.weights.items()}
    places, states = list(_places(state, (), ("", ""), shapes)), dict(_states(state, ()))
    prefix = _prefix([place.prefixes for place in places if place.prefixes])
    tensors, native = trees.capture(found, "optimizer")
    by_slot = {names.join(place.path): place for place in places}
    slots: dict[str, dict[str, Leaf]] = {}
    for name, leaf in tensors.items():
        slot, within = _split(name, by_slot)
        slots.setdefault(slot, {})[_parameter(within, prefix) if by_slot[slot].prefixes else within] = leaf
    meanings = {slot: _meaning(by_slot[slot].owner) for slot in slots}
    told = _told(optimizer, state, prefix, model)
    if told is not None:
        of = {name: group.family or told.family for group in told.groups for name in group.parameters}
        for slot, entries in slots.items():
            families = {of[name] for name in entries if name in of}
            found_as = {_ADAM_NU[each, *owner] for each in families if (each, *(owner := by_slot[slot].owner)) in _ADAM_NU}
            if len(found_as) == 1:
                meanings[slot] = found_as.pop()
    injected = {path: node for path, (kind, node) in states.items() if kind in _INJECTED}
    groups = [_group(path, node, slots, model) for path, node in injected.items()]
    rates = [
        transforms.number(node.hyperparams["learning_rate"])
        for node in injected.values()
        if "learning_rate" in node.hyperparams
    ]
    return OptimizerCapture(
        type=names.type_name(state if isinstance(optimizer, Carried) else optimizer),
        family=told.family if told else _family([kind for kind, _ in states.values()], set(meanings.values())),
        slots=slots,
        meanings=meanings,
        groups=told.groups if told else groups,
        conventions=told.conventions if told else {},
        step=_step(found, places, carried),
        native={
            **native,
            "prefix": prefix,
            "states": {names.join(path): kind for path, (kind, _) in states.items()},
            "carried": trees.as_tree(carried, "optimizer") if carried else None,
            **({_CONTINUED: _forms(told)} if told and _is_continued(states) else {}),
        },
        learning_rate=told.learning_rate if told else rates[0] if len(rates) == 1 else None,
        settable=[each.settable for each in told.described] if told else [frozenset()] * len(groups),
        choices=[{}] * len(told.groups if told else groups),
        rates=(lambda steps: _rates(told, steps)) if told and told.scheduled else None,
    )


def _rates(told: _Told, steps: np.ndarray) -> np.ndarray:
    """The learning rates of all groups after each of `steps` updates."""
    columns = []
    for each in told.described:
        if each.rate is None:
            found: Any = each.hyperparameters["learning_rate"]
        else:
            try:
                found = jax.vmap(each.rate)(jax.numpy.asarray(steps))
            except Exception:  # one that computes with Python's numbers
                found = [float(each.rate(int(step))) for step in steps]
        columns.append(np.broadcast_to(np.asarray(found, np.float64), steps.shape))
    return np.stack(columns, axis=1)


@dataclass(frozen=True, slots=True)
class _Told:
    """What the transformation says of an optimizer."""

    family: str
    conventions: dict[str, str]
    groups: list[ParameterGroup]
    learning_rate: float | tuple[float, ...]
    scheduled: bool
    described: list[Described]


_ADAM_NU = {
    **{(family, "ScaleByAdamState", "nu"): "second_moment" for family in ("adam", "nadam", "radam", "lamb")},
    ("adamax", "ScaleByAdamState", "nu"): "infinity_norm",
}
"""Family, state class and field -> what it holds."""


def _told(optimizer: Any, state: Any, prefix: str | None, model: ModelCapture) -> _Told | None:
    """What the transformation says, where it is at hand and can be read."""
    tx = optimizer.tx() if isinstance(optimizer, Carried) else getattr(optimizer, "tx", None)
    if tx is None:
        return None
    if prefix is None:
        prefix = "params" if any(name.startswith("params/") for name, _ in model.parameters) else ""
    inside = {_within(name, prefix): name for name, _ in model.parameters if not prefix or name.startswith(f"{prefix}/")}
    found = transforms.describe(tx, state, {path: model.weights[name] for path, name in inside.items()})
    if not found:
        return None
    family, conventions = found[0][1].family, optimizers.common([described.conventions for _, described in found])
    groups = [
        ParameterGroup(
            parameters=tuple(inside[path] for path in paths),
            hyperparameters={name: to_number(value) for name, value in described.hyperparameters.items()},
            family=described.family,
            conventions=dict(described.conventions),
        )
        for paths, described in found
    ]
    rates = tuple(float(described.hyperparameters["learning_rate"]) for _, described in found)
    return _Told(
        family,
        conventions,
        [optimizers.apart(group, family, conventions) for group in groups],
        rates if len(rates) > 1 else rates[0],
        scheduled=any(each.rate is not None for _, each in found),
        described=[each for _, each in found],
    )


_CONTINUED = "continued"


def _is_continued(states: Mapping[tuple[Any, ...], tuple[str, Any]]) -> bool:
    return any(kind == ContinuedState.__name__ for kind, _ in states.values())


def _forms(told: _Told) -> list[dict[str, Any]]:
    """What each group computes, for an optimizer that is made anew."""
    return [
        {
            "parameters": list(group.parameters),
            "family": each.family,
            "conventions": dict(each.conventions),
            "hyperparameters": dict(each.hyperparameters),
        }
        for group, each in zip(told.groups, told.described, strict=True)
    ]


def prepare(optimizer: Any, stored: StoredOptimizer, model: Callable[[], ModelCapture], live: Any) -> Restore:
    """Compare a live optimizer or state with a stored one, by the paths of their leaves.

    model, live: the model that it is of, described and as the caller gave it.
    """
    state, found, carried = _opened(optimizer)
    native = stored.native
    if isinstance(native, dict) and native.get(_CONTINUED) and not _is_continued(dict(_states(state, ()))):
        # It went on by another formula when it was saved, and goes on by it.
        groups = [
            ContinuedGroup(
                parameters=tuple(each["parameters"]),
                hyperparameters={},
                conventions={},
                form=Form(each["family"], dict(each["conventions"]), dict(each["hyperparameters"])),
            )
            for each in native[_CONTINUED]
        ]
        fresh, back = _otherwise(optimizer, groups, model(), live)
        return back(prepare(fresh, stored, model, live))
    if not isinstance(native, dict) or not isinstance(prefix := native.get("prefix"), str | None) or "carried" not in native:
        raise CorruptError(f"optimizer: native residue holds {native!r:.80}, which is no optax state")
    tensors = {
        "/".join(filter(None, (slot, _within(parameter, prefix)))): tensor
        for slot, each in stored.slots.items()
        for parameter, tensor in each.items()
    }
    slots = trees.compare(found, arrays.stored_leaves(tensors, native, "optimizer"), "optimizer")
    steps = trees.compare(carried, trees.from_tree(native["carried"], "optimizer"), "optimizer")
    return trees.restore(optimizer, [slots, steps])


def continue_(optimizer: Any, continuation: Continuation, model: ModelCapture, live: Any) -> Restore:
    """Prepare an optimizer to go on from a checkpoint of another framework. live: the model, as the caller gave it."""
    if any(group.form for group in continuation.groups):
        return _continue_otherwise(optimizer, continuation, model, live)
    captured = capture(optimizer, model)
    state, found, carried = _opened(optimizer)
    shapes = {name: leaf.shape for name, leaf in model.weights.items()}
    places = {names.join(place.path): place for place in _places(state, (), ("", ""), shapes)}
    prefix = captured.native["prefix"]
    wanted: dict[str, Stored] = {}
    for name, entry in found.items():
        slot, within = _split(name, places)
        parameter = _parameter(within, prefix)
        meaning = factored(captured.meanings.get(slot, optimizers.CUSTOM), shapes.get(parameter, ()))
        tensor = continuation.slots.get(meaning, {}).get(parameter) if places[slot].prefixes else None
        if places[slot].owner in _STEPS:
            wanted[name] = _number(entry, continuation.step)
        elif tensor is not None and tensor.shape == np.shape(entry.value):
            wanted[name] = Stored(tensor, weak=arrays.is_array(entry.value) and _is_weak(entry.value))
    wanted |= _injected(state, continuation, captured, model, found)
    slots = trees.compare({name: found[name] for name in wanted}, wanted, "optimizer")
    beside = {name: entry for name, entry in carried.items() if name == "step"}
    steps = trees.compare(beside, {name: _number(entry, continuation.step) for name, entry in beside.items()}, "optimizer")
    return trees.restore(optimizer, [slots, steps])


def _number(entry: Entry, value: float) -> Stored:
    """A number in the form that a leaf has."""
    if not arrays.is_array(entry.value):
        return Stored(value=type(entry.value)(value))
    dtype = entry.value.dtype.name
    return Stored(Made(entry.name, dtype, np.shape(entry.value), lambda: np.asarray(value)), weak=_is_weak(entry.value))


def _is_weak(value: Any) -> bool:
    return isinstance(value, jax.Array) and arrays.is_weak(value)


def _injected(
    state: Any, continuation: Continuation, captured: OptimizerCapture, model: ModelCapture, found: Mapping[str, Entry]
) -> dict[str, Stored]:
    """What a state that holds hyperparameters is to hold."""
    wanted = {}
    for path, (kind, node) in dict(_states(state, ())).items():
        if kind not in _INJECTED:
            continue
        below = set(_group(path, node, captured.slots, model).parameters)
        groups = [group for group in continuation.groups if not below or below & set(group.parameters)]
        for name in node.hyperparams:
            place = names.join((*path, "hyperparams", name))
            values = [
                group.hyperparameters[transforms.INJECTED[name]]
                for group in groups
                if transforms.INJECTED.get(name) in group.hyperparameters
            ]
            if values and place in found:
                wanted[place] = _number(found[place], values[0])
    return wanted


def _continue_otherwise(optimizer: Any, continuation: Continuation, model: ModelCapture, live: Any) -> Restore:
    """The continuation of an optimizer by another formula: with a transformation of ours in the place of its own."""
    fresh, back = _otherwise(optimizer, continuation.groups, model, live)
    return back(continue_(fresh, _without_forms(continuation), model, live))


def _otherwise(
    optimizer: Any, groups: Sequence[ContinuedGroup], model: ModelCapture, live: Any
) -> tuple[Any, Callable[[Restore], Restore]]:
    """An optimizer that follows the forms of `groups` in the place of the one given, and what makes of its restore that of
    the one given.
    """
    tx = optimizer.tx() if isinstance(optimizer, Carried) else getattr(optimizer, "tx", None)
    state, _, _ = _opened(optimizer)
    prefix = _prefix_of(optimizer, model)
    told, before = _told(optimizer, state, prefix, model), transforms.gradient_steps(tx) if tx is not None else None
    if told is None or before is None or len(told.described) != len(groups):
        raise UnsupportedError(
            'optimizer: continuation="exact" puts another transformation in the place of the one given, which must be a chain '
            "of known ones, with the same groups: pass it without the wrapper, and wrap what comes back"
        )
    made = transforms.instead_of(before, told.described, groups, lambda name: _parameter(name, prefix))
    if isinstance(optimizer, Carried):
        return Carried(made.init(_inside(live, prefix)), optimizer.step, lambda: made), lambda restore: restore
    fresh = trees.nnx().Optimizer(live, made, wrt=optimizer.wrt)
    old = optimizer.tx, optimizer.opt_state, optimizer.step

    def put(tx: Any, opt_state: Any, step: Any) -> Any:
        optimizer.tx, optimizer.opt_state, optimizer.step = tx, opt_state, step
        return optimizer

    def back(restore: Restore) -> Restore:
        def apply() -> Any:
            restore.apply()
            return put(made, fresh.opt_state, fresh.step)

        return replace(restore, apply=apply, undo=lambda: put(*old))

    return fresh, back


def _without_forms(continuation: Continuation) -> Continuation:
    return replace(continuation, groups=[replace(group, form=None) for group in continuation.groups])


def _prefix_of(optimizer: Any, model: ModelCapture) -> str | None:
    prefix: str | None = capture(optimizer, model).native["prefix"]
    if prefix is None:
        prefix = "params" if any(name.startswith("params/") for name, _ in model.parameters) else ""
    return prefix


def _inside(live: Any, prefix: str | None) -> Any:
    """The tree of parameters within a model; what cannot be trained is None, as in equinox.filter."""
    for segment in names.split(prefix) if prefix else ():
        live = next(child for name, child in trees.children(live) if str(name) == segment)
    return jax.tree.map(lambda leaf: leaf if _is_inexact(leaf) else None, live)


def _is_inexact(leaf: Any) -> bool:
    return arrays.is_array(leaf) and arrays.is_inexact(leaf.dtype)


def _opened(optimizer: Any) -> tuple[Any, dict[str, Entry], dict[str, Entry]]:
    """The optax state, its leaves by path in it, and the leaves that a train state or nnx.Optimizer has beside it."""
    found = trees.entries(optimizer, "optimizer")
    nnx = trees.nnx()
    if not isinstance(optimizer, Carried) and not (nnx and isinstance(optimizer, nnx.Optimizer)):
        return optimizer, found, {}
    inside = {names.join(entry.path[1:]): entry for entry in found.values() if entry.path[0] == "opt_state"}
    # nnx.ModelAndOptimizer holds the model too, which is saved as such.
    beside = {name: entry for name, entry in found.items() if entry.path[0] not in ("opt_state", "model")}
    return optimizer.opt_state, inside, beside


def _fields(node: Any) -> list[tuple[Any, Any]]:
    return [] if trees.is_variable(node) or not trees.is_node(node) else trees.children(node)


def _places(
    node: Any, path: tuple[Any, ...], owner: tuple[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[_Place]:
    below = _fields(node)
    if not below:
        single = owner in _MEANINGS and "" in shapes
        yield _Place(path, owner, frozenset({""}) if single else None)
        return
    leaves = {names.join(entry.path): np.shape(entry.value) for entry in trees.entries(node, "optimizer").values()}
    if leaves and (prefixes := _mirrored(leaves, shapes, factored=owner in _FACTORED)):
        yield _Place(path, owner, prefixes)
        return
    for segment, child in below:
        within = (type(node).__name__, str(segment)) if hasattr(node, "_fields") else ("", "")
        yield from _places(child, (*path, segment), within, shapes)


def _mirrored(
    leaves: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], *, factored: bool
) -> frozenset[str]:
    """The prefixes P for which every leaf L has a weight P/L of its shape."""
    first = next(iter(leaves))
    candidates = {"": first} if first in shapes else {}
    candidates |= {name.removesuffix(f"/{first}"): name for name in shapes if name.endswith(f"/{first}")}
    return frozenset(
        prefix
        for prefix in candidates
        if all(
            (weight := _weight(leaf, prefix)) in shapes and (factored or shapes[weight] == shape)
            for leaf, shape in leaves.items()
        )
    )


def _weight(leaf: str, prefix: str) -> str:
    return f"{prefix}/{leaf}" if prefix else leaf


def _prefix(candidates: Sequence[frozenset[str]]) -> str | None:
    """Where in the model the parameters are that all slots mirror, None where that is not clear.

    "params" is what Flax calls them; copies beside them (an EMA) fit as well.
    """
    common = frozenset.intersection(*candidates) if candidates else frozenset()
    if "params" in common:
        return "params"
    return next(iter(common)) if len(common) == 1 else None


def _split(name: str, slots: Mapping[str, Any]) -> tuple[str, str]:
    """The slot among `slots` that a leaf is in, and its name within that."""
    segments = name.split("/") if name else []
    for count in range(len(segments) + 1):
        if (slot := "/".join(segments[:count])) in slots:
            return slot, "/".join(segments[count:])
    raise KeyError(name)


def _parameter(within: str, prefix: str | None) -> str:
    return within if prefix is None else _weight(within, prefix) if within else prefix


def name_of(slot: str, parameter: str, captured: OptimizerCapture) -> str:
    """The name of the leaf of a state that is this slot of this parameter."""
    return "/".join(filter(None, (slot, _within(parameter, captured.native["prefix"]))))


def _within(parameter: str, prefix: str | None) -> str:
    return parameter.removeprefix(f"{prefix}/") if prefix else parameter


def _states(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], tuple[str, Any]]]:
    """Every optax state by path: the name of its class, and itself."""
    of_optax = type(node).__module__.partition(".")[0] == "optax" and hasattr(node, "_fields")
    if of_optax or isinstance(node, ContinuedState):
        yield path, (type(node).__name__, node)
    for segment, child in _fields(node):
        yield from _states(child, (*path, segment))


def _meaning(owner: tuple[str, str]) -> str:
    if owner in _STEPS:
        return "step"
    return _MEANINGS.get(owner, optimizers.CUSTOM)


def _family(classes: Sequence[str], meanings: set[str]) -> str:
    families = {_FAMILIES[name] for name in classes if name in _FAMILIES}
    if len(families) != 1:
        return optimizers.CUSTOM
    family = families.pop()
    # optax.contrib.muon hands what is no matrix to Adam.
    others = {"ScaleByAdamState", "ScaleByBeliefState", "ScaleByNovogradState", "ScaleByAdanState", "ScaleBySM3State"}
    if family == "muon":
        others.discard("ScaleByAdamState")
    known = optimizers.FAMILIES[family] | {"step", "gradient_accumulator", "parameter_average", optimizers.CUSTOM}
    return family if not others & set(classes) and meanings <= known else optimizers.CUSTOM


def _group(path: tuple[Any, ...], state: Any, slots: Mapping[str, Mapping[str, Leaf]], model: ModelCapture) -> ParameterGroup:
    start = names.join((*path, "inner_state"))
    slotted = [
        parameter
        for slot, each in slots.items()
        if slot == start or slot.startswith(f"{start}/")
        for parameter in each
        if parameter in model.weights
    ]
    numbers = {
        transforms.INJECTED[name]: transforms.number(value)
        for name, value in state.hyperparams.items()
        if name in transforms.INJECTED
    }
    return ParameterGroup(
        parameters=tuple(dict.fromkeys(slotted)),
        hyperparameters={name: to_number(value) for name, value in numbers.items()},
    )


def _step(found: Mapping[str, Entry], places: Sequence[_Place], carried: Mapping[str, Entry]) -> int | None:
    """Completed updates, where all counters of the state, or else that of the train state, agree on it."""
    counters = [found[name].value for place in places if place.owner in _STEPS and (name := names.join(place.path)) in found]
    if not counters and "step" in carried:
        counters = [carried["step"].value]
    if any(isinstance(counter, jax.ShapeDtypeStruct) for counter in counters):
        return None  # a template
    counts = {int(np.asarray(counter)) for counter in counters if np.ndim(counter) == 0}
    return counts.pop() if len(counts) == 1 else None
