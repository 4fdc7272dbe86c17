"""What an optax transformation does: read from what its functions hold, since its state does not say.

A transformation is a pair of functions. The update function of each of optax's is named after the function that made it
("scale_by_adam.<locals>.update_fn"), and its free variables are the arguments (b1, b2, eps). What is not known here, or would
mean something else than the tables of polyckpt.optimizers, is not described at all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from polyckpt import names
from polyckpt.adapter import ContinuedGroup
from polyckpt.adapters.jax import trees
from polyckpt.adapters.jax.continued import MAKER, Transformation, continued
from polyckpt.leaves import Leaf
from polyckpt.updates import Form


@dataclass(frozen=True)
class _At:
    """Where a transformation stands.

    only: the parameters that it changes, None for all. injected: hyperparameters that a state holds (optax.inject_hyperparams),
    with the schedule that each follows, or None.
    """

    parameters: Mapping[str, Leaf]
    only: frozenset[str] | None
    injected: Mapping[str, Any] = field(default_factory=dict)

    def within(self, chosen: set[str]) -> _At:
        """Below a mask that leaves these alone."""
        return replace(self, only=frozenset(chosen) if self.only is None else self.only & chosen)


@dataclass(frozen=True)
class Step:
    """One transformation of a chain. name: of the function of optax that made it. state: its own."""

    name: str
    values: Mapping[str, Any]
    state: Any
    at: _At


@dataclass(frozen=True)
class Described:
    """A chain in neutral terms, as in schema.Optimizer and schema.ParameterGroup.

    rate: the learning rate, or a function that gives it for completed updates. settable: hyperparameters that its state holds.
    """

    family: str
    conventions: Mapping[str, str]
    hyperparameters: Mapping[str, Any]
    rate: Any = field(default=None, repr=False)
    settable: frozenset[str] = frozenset()


class _UnknownError(Exception):
    """A transformation that cannot be read."""


def describe(tx: Any, state: Any, parameters: Mapping[str, Leaf]) -> list[tuple[tuple[str, ...], Described]] | None:
    """The parameters that are updated alike, and how; None where the transformation cannot be read.

    state: the state of `tx`. parameters: by their paths in the tree that it is of.
    """
    try:
        steps = list(_read(tx.update, state, _At(parameters, None)))
        groups: dict[str, tuple[list[str], Described]] = {}
        for name in parameters:
            own = [step for step in steps if step.at.only is None or name in step.at.only]
            if any(step.name == "set_to_zero" for step in own):
                continue  # frozen
            described = _described(own)
            groups.setdefault(repr(described), ([], described))[0].append(name)
    except Exception:  # what others wrote may look as if it were known; no save fails because of what it cannot describe
        return None
    return [(tuple(inside), described) for inside, described in groups.values()]


# From functions to steps.


def held(function: Any) -> dict[str, Any]:
    """The free variables of a function, and those of the functions among them that were made beside it."""
    function = getattr(function, "__func__", function)
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for value in list(found.values()):
        beside = getattr(value, "__qualname__", "").partition(".<locals>")[0] == _maker(function)
        if beside and hasattr(value, "__code__"):
            found = {**held(value), **found}
    return found


def _maker(function: Any) -> str:
    return str(getattr(function, "__qualname__", "")).partition(".<locals>")[0]


def _read(update: Any, state: Any, at: _At) -> Iterator[Step]:
    """The steps of the transformation with the function `update`."""
    if isinstance(update, functools.partial) or not hasattr(getattr(update, "__func__", update), "__code__"):
        raise _UnknownError(repr(update))
    if _maker(update) != MAKER and not str(getattr(update, "__module__", "")).startswith("optax."):
        raise _UnknownError(f"{update.__module__}.{update.__qualname__}")
    name = _maker(update)
    if name == "MultiSteps.update":
        yield from _read(update.__self__._opt.update, state.inner_opt_state, at)
        return
    values = held(update)
    if name in _CONTAINERS:
        yield from _CONTAINERS[name](values, state, at)
    else:
        yield Step(name, values, state, at)


_Reader = Callable[[Mapping[str, Any], Any, _At], Iterator[Step]]


def _chain(values: Mapping[str, Any], state: Any, at: _At) -> Iterator[Step]:
    for update, each in zip(values["update_fns"], state, strict=True):
        yield from _read(update, each, at)


def _wrapped(values: Mapping[str, Any], state: Any, at: _At) -> Iterator[Step]:
    yield from _read(values["tx"].update, state, at)


def _inner(values: Mapping[str, Any], state: Any, at: _At) -> Iterator[Step]:
    yield from _read(values["inner"].update, state.inner_state, at)


def _masked(values: Mapping[str, Any], state: Any, at: _At) -> Iterator[Step]:
    chosen = {name for name, value in _spread(values["mask"], at.parameters).items() if value}
    yield from _read(values["inner"].update, state.inner_state, at.within(chosen))


def _partition(values: Mapping[str, Any], state: Any, at: _At) -> Iterator[Step]:
    labels = _spread(values["param_labels"], at.parameters)
    for label, tx in values["transforms"].items():
        chosen = {name for name, value in labels.items() if value == label}
        within = state.inner_states[label]
        yield from _read(tx.update, getattr(within, "inner_state", within), at.within(chosen))


def _injected(values: Mapping[str, Any], state: Any, at: _At) -> Iterator[Step]:
    numbers = {name: number(value) for name, value in state.hyperparams.items()}
    # The state holds what the last update used.
    for name, schedule in values["sched_hps"].items():
        numbers[name] = number(schedule.schedule_fn(_count(state.hyperparams_states[name])))
    tx = values["inner_factory"](**values["other_hps"], **numbers)
    injected = {name: values["sched_hps"][name].schedule_fn if name in values["sched_hps"] else None for name in numbers}
    yield from _read(tx.update, state.inner_state, replace(at, injected=injected))


_CONTAINERS: dict[str, _Reader] = {
    "chain": _chain,
    "with_extra_args_support": _wrapped,
    "apply_if_finite": _inner,
    "masked": _masked,
    "partition": _partition,
    "inject_hyperparams": _injected,
}


def _spread(given: Any, parameters: Mapping[str, Leaf]) -> dict[str, Any]:
    """A mask or labels, a tree with the parameters' or above theirs, or a function that makes one, as parameter -> value."""
    given = given(_tree(parameters)) if callable(given) else given
    placed = {name: entry.value for name, entry in trees.entries(given, "mask").items()}
    found = {}
    for name in parameters:
        above = [place for place in placed if place in ("", name) or name.startswith(f"{place}/")]
        if len(above) != 1:
            raise _UnknownError(f"a mask that says nothing of {name}")
        found[name] = placed[above[0]]
    return found


def _tree(parameters: Mapping[str, Leaf]) -> dict[str, Any]:
    """Something of the shapes of all parameters, as a tree by their paths."""
    tree: dict[str, Any] = {}
    for name, leaf in parameters.items():
        *path, last = names.split(name)
        node = functools.reduce(lambda below, key: below.setdefault(key, {}), path, tree)
        node[last] = np.broadcast_to(np.float32(0), leaf.shape)
    return tree


def number(value: Any) -> float:
    """A Python number of a 0-d array, or of a Variable that holds one."""
    return float(np.asarray(value.get_value() if trees.is_variable(value) else value, np.float64))


def _count(state: Any) -> np.ndarray:
    """How many updates the state of a schedule has seen."""
    return np.asarray(int(number(state.count)))


# From steps to the tables.


@dataclass(frozen=True)
class _Row:
    """A transformation that has slots. keys: argument -> neutral name. needs: what arguments must be for the row to hold."""

    family: str
    keys: Mapping[str, str]
    conventions: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)


_MOMENTS = {"b1": "beta1", "b2": "beta2", "eps": "epsilon"}

_ROWS: dict[str, _Row] = {
    "scale_by_adam": _Row("adam", _MOMENTS, {"epsilon": "outside_sqrt"}, needs={"eps_root": 0.0}),
    "scale_by_amsgrad": _Row(
        "adam",
        _MOMENTS,
        {"epsilon": "outside_sqrt", "max_second_moment": "bias_corrected"},
        {"amsgrad": True},
        {"eps_root": 0.0, "bias_correction_mu": True, "bias_correction_nu": True},
    ),
    "scale_by_radam": _Row(
        "radam", _MOMENTS, {"epsilon": "outside_sqrt"}, needs={"eps_root": 0.0, "nesterov": False, "threshold": 5.0}
    ),
    "scale_by_adamax": _Row("adamax", _MOMENTS, {"epsilon": "in_norm"}),
    "scale_by_rms": _Row("rmsprop", {"decay": "rho", "eps": "epsilon"}, needs={"bias_correction": False}),
    "scale_by_stddev": _Row(
        "rmsprop", {"decay": "rho", "eps": "epsilon"}, fixed={"centered": True}, needs={"bias_correction": False}
    ),
    "scale_by_rss": _Row("adagrad", {"eps": "epsilon"}, {"epsilon": "inside_sqrt"}),
    "scale_by_adadelta": _Row("adadelta", {"rho": "rho", "eps": "epsilon"}, {"epsilon": "inside_sqrt"}),
    "scale_by_lion": _Row("lion", {"b1": "beta1", "b2": "beta2"}, needs={"mode": "hard"}),
    "scale_by_factored_rms": _Row(
        "adafactor", {"epsilon": "epsilon"}, {"epsilon": "in_square", "rate": "as_given"}, needs={"step_offset": 0}
    ),
    "scale_by_muon": _Row(
        "muon",
        {"beta": "momentum", "eps": "epsilon", "nesterov": "nesterov", "ns_steps": "iterations"},
        {"momentum": "corrected_average", "epsilon": "beside_norm", "outputs": "last", "scale": "none"},
        needs={"adaptive": False, "preconditioning": "frobenius"},
    ),
}

_GRADIENT_ONLY = {"clip", "clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip", "zero_nans"}
"""Transformations that change gradients on their way to the slots, and nothing else."""


_CLIPS = {"clip": ("clip_value", "max_delta"), "clip_by_global_norm": ("clip_global_norm", "max_norm")}
"""Transformations of gradients that other frameworks have too -> hyperparameter and argument."""


def _described(steps: Sequence[Step]) -> Described:
    scaler: str | None = None
    conventions: dict[str, str] = {}
    values: dict[str, Any] = {}
    rate, rated, family = -1.0, False, "sgd"
    for step in steps:
        row = _ROWS.get(step.name)
        if step.name == MAKER:
            form, rated = step.values["form"], True
            scaler, family = MAKER, form.family
            rate *= _factor(step)
            conventions |= form.conventions
            values |= form.hyperparameters
        elif row is not None:
            if scaler or rated or any(step.values.get(name) != value for name, value in row.needs.items()):
                raise _UnknownError(step.name)
            scaler, family = step.name, row.family
            conventions |= row.conventions
            values |= {neutral: step.values[name] for name, neutral in row.keys.items()} | dict(row.fixed)
            _special(step, conventions, values)
            family = "nadam" if "momentum_schedule" in conventions else family
        elif step.name == "trace":
            if "momentum" in values or scaler not in (None, "scale_by_rms", "scale_by_stddev") or (scaler and not rated):
                raise _UnknownError("a momentum of another place")
            values |= {"momentum": step.values["decay"], "nesterov": step.values["nesterov"]}
            conventions["momentum"] = "scaled_by_learning_rate" if rated else "unscaled"
            scaler = scaler or "trace"
        elif step.name == "add_decayed_weights":
            if rated and step.values["weight_decay"]:
                raise _UnknownError("a weight decay after the learning rate")
            if step.values["weight_decay"]:
                if "weight_decay" in values:
                    raise _UnknownError("two weight decays")
                values["weight_decay"] = number(step.values["weight_decay"])
                conventions["weight_decay"] = "decoupled" if scaler else "coupled"
        elif step.name == "scale_by_trust_ratio":
            if scaler != "scale_by_adam" or step.values != {"eps": 0.0, "min_norm": 0.0, "trust_coefficient": 1.0}:
                raise _UnknownError(step.name)
            family = "lamb"
            if "weight_decay" in values:
                conventions["weight_decay"] = "in_trust_ratio"
        elif step.name in ("scale", "scale_by_schedule"):
            rate *= _factor(step)
            rated = True
        elif step.name == "scale_by_shape" and family == "muon":
            _check_axes(step)
            conventions["scale"] = "width" if step.values["consistent_rms"] is None else "longer_axis"
            values |= {"rms_rate": step.values["consistent_rms"]} if step.values["consistent_rms"] is not None else {}
        elif step.name == "scale_by_param_block_rms" and family == "adafactor":
            values["epsilon2"] = step.values["min_scale"]
        elif step.name == "clip_by_block_rms" and family == "adafactor":
            values["clip_threshold"] = step.values["threshold"]
        elif step.name in _CLIPS and not scaler:
            clip, argument = _CLIPS[step.name]
            values[clip] = step.values[argument]
        elif step.name != "identity" and (step.name not in _GRADIENT_ONLY or scaler):
            raise _UnknownError(step.name)
    values["learning_rate"] = rate
    plain = {name: value if isinstance(value, bool) else number(value) for name, value in values.items()}
    if "iterations" in plain:
        plain["iterations"] = int(plain["iterations"])
    settable = {
        INJECTED[name] for step in steps for name, schedule in step.at.injected.items() if name in INJECTED and schedule is None
    }
    return Described(family, conventions, plain, _rate_of(steps), frozenset(settable))


INJECTED = {
    "learning_rate": "learning_rate",
    "b1": "beta1",
    "b2": "beta2",
    "eps": "epsilon",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "rho": "rho",
    "initial_accumulator_value": "initial_accumulator",
}
"""Arguments of optax's optimizers that mean the same in all of them -> neutral name."""


def _rate_of(steps: Sequence[Step]) -> Any:
    """The learning rate of some steps: a function where it follows a schedule, else None."""
    injected = next((step.at.injected["learning_rate"] for step in steps if "learning_rate" in step.at.injected), None)
    if injected is not None:
        return injected
    scales = [step for step in steps if step.name in ("scale", "scale_by_schedule", MAKER)]
    if not any(step.name == "scale_by_schedule" or callable(step.values.get("learning_rate")) for step in scales):
        return None

    def rate(count: Any) -> Any:
        total: Any = -1.0
        for step in scales:
            total = total * _factor_at(step, count)
        return total

    return rate


def _special(step: Step, conventions: dict[str, str], values: dict[str, Any]) -> None:
    """What an argument says of the conventions."""
    if step.name in ("scale_by_rms", "scale_by_stddev"):
        conventions["epsilon"] = "inside_sqrt" if step.values["eps_in_sqrt"] else "outside_sqrt"
    if step.name == "scale_by_adam" and step.values["nesterov"]:
        conventions["momentum_schedule"] = "constant"
    if step.name == "scale_by_muon":
        _check_axes(step)
        coefficients = np.asarray(step.state.ns_coeffs)
        if coefficients.shape != (3,):
            raise _UnknownError("coefficients that change from one iteration to the next")
        values |= {f"coefficient{place + 1}": float(each) for place, each in enumerate(coefficients)}
    if step.name == "scale_by_factored_rms":
        values["beta2_decay"] = -step.values["decay_rate"]
        values["factored_from"] = step.values["min_dim_size_to_factor"] if step.values["factored"] else np.inf


def _check_axes(step: Step) -> None:
    """That an orthogonal update is that of matrices with their inputs first, and of nothing else."""
    given = step.values["weight_dimension_numbers"]
    given = given(_tree(step.at.parameters)) if callable(given) else given
    axes = jax.tree.leaves(given, is_leaf=lambda node: isinstance(node, tuple) and hasattr(node, "reduction_axis"))
    if any(each != (0, 1) for each in axes):
        raise _UnknownError("axes of other matrices")
    if any(len(leaf.shape) != 2 for name, leaf in step.at.parameters.items() if step.at.only is None or name in step.at.only):
        raise _UnknownError("what is no matrix")


def _factor(step: Step) -> float:
    """What the next update is multiplied by."""
    return number(_factor_at(step, None if step.name == "scale" else _count(step.state)))


def _factor_at(step: Step, count: Any) -> Any:
    """What an update after `count` completed ones is multiplied by."""
    if step.name == MAKER:
        return -step.values["rate"](count)
    return step.values["step_size"] if step.name == "scale" else step.values["step_size_fn"](count)


def gradient_steps(tx: Any) -> list[Any] | None:
    """The transformations that a chain begins with and that only change gradients; None where a wrapper is around it.

    The rest of the chain is what `describe` tells.
    """
    flat = list(_flattened(tx))
    if any(_maker(each.update) in ("MultiSteps.update", "apply_if_finite") for each in flat):
        return None
    return list(itertools.takewhile(lambda each: _maker(each.update) in _GRADIENT_ONLY, flat))


def _flattened(tx: Any) -> Iterator[Any]:
    """The links of a chain, and of those in it."""
    name = _maker(tx.update)
    if name == "with_extra_args_support":
        yield from _flattened(held(tx.update)["tx"])
    elif name == "chain":
        for init, update in zip(held(tx.init)["init_fns"], held(tx.update)["update_fns"], strict=True):
            yield from _flattened(Transformation(init, update))
    else:
        yield tx


def instead_of(
    before: Sequence[Any],
    described: Sequence[Described],
    groups: Sequence[ContinuedGroup],
    name_of: Callable[[str], str],
) -> Any:
    """A chain that computes the forms of `groups` in the place of what was described, with its learning rates.

    before: transformations of gradients that stay. name_of: from a path in the tree of parameters to the name of a weight.
    """
    import optax  # type: ignore[import-untyped]  # a program that has a transformation has optax

    made = []
    for each, group in zip(described, groups, strict=True):
        form = group.form or Form(each.family, each.conventions, each.hyperparameters)
        rate = group.hyperparameters.get("learning_rate", each.hyperparameters["learning_rate"])
        if "learning_rate" in each.settable:
            made.append(optax.inject_hyperparams(continued)(learning_rate=rate, form=form))
        else:
            made.append(continued(each.rate or rate, form))
    if len(made) == 1:
        return optax.chain(*before, made[0])
    of = {name: str(index) for index, group in enumerate(groups) for name in group.parameters}

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: of.get(name_of(names.join(tuple(map(trees.segment, path)))), "frozen"), params
        )

    parts = {**{str(index): each for index, each in enumerate(made)}, "frozen": optax.set_to_zero()}
    return optax.chain(*before, optax.partition(parts, labels))
