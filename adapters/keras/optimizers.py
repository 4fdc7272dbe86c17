"""Keras optimizers: what their slots mean, reading them, and writing them back.

Slots are found by attribute (a list of variables parallel to the trainable ones), never by parsing names: Keras repeats
names. Wrappers (loss scaling, several optimizers in one) are walked, and what they wrap is prefixed with its attribute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np

from polyckpt import names, optimizers, residue
from polyckpt.adapter import Continuation, ContinuedGroup, ModelCapture, OptimizerCapture, Restore, StoredOptimizer
from polyckpt.adapters.keras import variables
from polyckpt.adapters.keras.continued import Continued
from polyckpt.checkpoint import StoredTensor
from polyckpt.errors import Problem, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.names import type_name
from polyckpt.schema import Hyperparameter, ParameterGroup, to_number
from polyckpt.updates import Form

_ADAM = {"momentums": "first_moment", "velocities": "second_moment", "velocity_hats": "max_second_moment"}
_ADAM_KEYS = {"beta1": "beta_1", "beta2": "beta_2", "epsilon": "epsilon"}
_WRAPPED = {"model_variables_moving_average": "parameter_average", "accumulated_gradients": "gradient_accumulator"}


@dataclass(frozen=True, slots=True)
class Row:
    """An optimizer class: family, slots as attribute -> meaning, hyperparameters as neutral name -> attribute.

    fixed: hyperparameters that Keras does not let one choose. beside: what becomes of variables that the class hands to another
    formula. rate, decay: where the learning rate of a row, relative to that of the optimizer, and its weight decay stand.
    factor: the former where it stands nowhere.
    """

    family: str
    slots: Mapping[str, str]
    keys: Mapping[str, str] = field(default_factory=dict)
    conventions: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    beside: Row | None = None
    rate: str = ""
    decay: str = "weight_decay"
    factor: float = 1.0


_ADAM_ROW = Row(
    "adam", _ADAM, {**_ADAM_KEYS, "amsgrad": "amsgrad"}, {"epsilon": "before_bias_correction", "max_second_moment": "raw"}
)

_ROWS: dict[str, Row] = {
    "SGD": Row(
        "sgd",
        {"momentums": "momentum"},
        {"momentum": "momentum", "nesterov": "nesterov"},
        {"momentum": "scaled_by_learning_rate"},
    ),
    "Adam": _ADAM_ROW,
    "AdamW": _ADAM_ROW,
    "Adamax": Row("adamax", {"m": "first_moment", "u": "infinity_norm"}, _ADAM_KEYS, {"epsilon": "outside_sqrt"}),
    "Nadam": Row(
        "nadam",
        _ADAM,
        _ADAM_KEYS,
        {"epsilon": "outside_sqrt", "momentum_schedule": "decaying"},
        {"momentum_decay": 1.0},
    ),
    "RMSprop": Row(
        "rmsprop",
        {"velocities": "second_moment", "momentums": "momentum", "average_gradients": "first_moment"},
        {"rho": "rho", "momentum": "momentum", "epsilon": "epsilon", "centered": "centered"},
        {"epsilon": "inside_sqrt", "momentum": "scaled_and_subtracted"},
    ),
    "Adagrad": Row(
        "adagrad",
        {"accumulators": "squared_sum"},
        {"epsilon": "epsilon", "initial_accumulator": "initial_accumulator_value"},
        {"epsilon": "inside_sqrt"},
    ),
    "Adadelta": Row(
        "adadelta",
        {"accumulated_grads": "second_moment", "accumulated_delta_vars": "squared_update"},
        {"rho": "rho", "epsilon": "epsilon"},
        {"epsilon": "inside_sqrt"},
    ),
    "Lion": Row("lion", {"momentums": "first_moment"}, {"beta1": "beta_1", "beta2": "beta_2"}),
    "Lamb": Row("lamb", _ADAM, _ADAM_KEYS, {"epsilon": "outside_sqrt"}),
    "Adafactor": Row(
        "adafactor",
        {"r": "row_second_moment", "c": "column_second_moment", "v": "second_moment"},
        {"beta2_decay": "beta_2_decay", "epsilon": "epsilon_1", "epsilon2": "epsilon_2", "clip_threshold": "clip_threshold"},
        {"epsilon": "in_square", "rate": "bounded"},
    ),
    "Muon": Row(
        "muon",
        {"momentums": "momentum"},
        {
            "momentum": "momentum",
            "nesterov": "nesterov",
            "iterations": "ns_steps",
            "coefficient1": "muon_a",
            "coefficient2": "muon_b",
            "coefficient3": "muon_c",
            "rms_rate": "rms_rate",
        },
        {"momentum": "unscaled", "epsilon": "beside_norm", "outputs": "last"},
        {"epsilon": 1e-7},
        Row(
            "adam",
            {"adam_momentums": "first_moment", "adam_velocities": "second_moment"},
            {"beta1": "adam_beta_1", "beta2": "adam_beta_2", "epsilon": "epsilon"},
            {"epsilon": "before_bias_correction"},
            rate="adam_lr_ratio",
            decay="adam_weight_decay",
        ),
    ),
    "Ftrl": Row(
        "ftrl", {"accumulators": "squared_sum", "linears": "linear"}, {"initial_accumulator": "initial_accumulator_value"}
    ),
}


@dataclass(frozen=True, slots=True)
class State:
    """All variables of an optimizer: `slots` as slot -> parameter -> variable, `others` by name."""

    slots: dict[str, dict[str, Any]]
    others: dict[str, Any]


def capture(optimizer: Any, parameters: Sequence[tuple[str, Any]]) -> OptimizerCapture:
    """Describe an optimizer as it stands; one that is not built yet has no slots.

    Of several, the main one is described; the others are native residue, their parameters by position.
    """
    if isinstance(optimizer, Several):
        trees = {name: capture_tree(each) for name, each in optimizer.owned.items()}
        if optimizer.main is None:
            return OptimizerCapture(type=_NONE, family=optimizers.CUSTOM, slots={}, native={_OWNED: trees})
        captured = capture(optimizer.main, parameters)
        return replace(captured, native={**captured.native, _OWNED: trees})
    state = read(optimizer, parameters)
    row = _row(optimizer)
    slots: dict[str, dict[str, Leaf]] = {
        slot: {name: variables.leaf(variable, f"optimizer: {slot} of {name}") for name, variable in entries.items()}
        for slot, entries in state.slots.items()
    }
    inner = _innermost(optimizer)
    trained = _trained(inner, parameters)
    scheduled = isinstance(getattr(inner, "_learning_rate", None), keras.optimizers.schedules.LearningRateSchedule)
    rate = frozenset() if scheduled else {"learning_rate"}
    free = not inner.built and not isinstance(inner, Continued)
    grouped = _grouped(optimizer, row, trained or _trainable(parameters))
    common = optimizers.common([group.conventions for _, group in grouped])
    family = grouped[0][1].family or optimizers.CUSTOM
    accumulates = {"accumulator": "sum"} if any("accumulated_gradients" in slot for slot in state.slots) else {}
    return OptimizerCapture(
        type=type_name(optimizer),
        family=family,
        slots=slots,
        meanings={slot: _meaning(slot, row) for slot in slots},
        groups=[optimizers.apart(group, family, common) for _, group in grouped],
        conventions={**common, **accumulates},
        step=int(keras.ops.convert_to_numpy(inner.iterations)),
        native={
            "built": bool(optimizer.built),
            "parameters": {name: variables.show(variable) for name, variable in trained},
            "settings": _settings(optimizer),
            "others": {name: variables.leaf(variable, f"optimizer: {name}") for name, variable in state.others.items()},
            **({_CONTINUED: inner.described()} if isinstance(inner, Continued) else {}),
        },
        learning_rate=_learning_rate(optimizer),
        settable=[
            frozenset({*rate, *(each.keys if free and each else ()), *(("weight_decay",) if free else ())})
            for each, _ in grouped
        ],
        choices=[{} if inner.built else _choices(each) for each, _ in grouped],
        wrappers=frozenset({"parameter_average"}) if inner.use_ema else frozenset(),
        rates=(lambda steps: _rates(inner._learning_rate, steps, [_factor(inner, each) for each, _ in grouped]))
        if scheduled
        else None,
    )


def _rates(schedule: Any, steps: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """What a schedule gives for each of `steps`, times the factor of each group."""
    try:
        found = keras.ops.convert_to_numpy(schedule(keras.ops.convert_to_tensor(steps)))
    except Exception:  # one that decides by the step, which must then be a single one
        found = np.array([float(keras.ops.convert_to_numpy(schedule(int(step)))) for step in steps])
    rates: np.ndarray = np.broadcast_to(found, steps.shape).astype(np.float64)[:, None] * np.array(factors)
    return rates


def _grouped(optimizer: Any, row: Row | None, trained: Sequence[tuple[str, Any]]) -> list[tuple[Row | None, ParameterGroup]]:
    """Parameters by what is computed for them and their weight decay: the optimizer's, or that of their L2 regularizer; each
    group with its row, and saying of itself all there is.
    """
    inner = _innermost(optimizer)
    groups: dict[tuple[int, float | None], tuple[Row | None, list[str]]] = {}
    for index, (name, variable) in enumerate(trained):
        kind, own = _row_of(inner, row, variable, index)
        groups.setdefault((kind, _decay(inner, row, own, variable, index)), (own, []))[1].append(name)
    decays = {}
    if not isinstance(inner, Continued):
        decays = {"weight_decay": "coupled"} if any(_penalty(variable) for _, variable in trained) else {}
        decays = {"weight_decay": "decoupled"} if _decouples(inner, row) else decays
    found = []
    for (_, decay), (own, inside) in (groups or {(0, None): (row, [])}).items():
        conventions = {**own.conventions, **decays} if own else {}
        if own and "rms_rate" in own.keys:
            conventions["scale"] = "none" if inner.rms_rate is None else "longer_axis"
        values = {**_values(optimizer, own), **({"weight_decay": decay} if decay is not None else {})}
        group = ParameterGroup(
            parameters=tuple(inside),
            hyperparameters=values,
            family=own.family if own else optimizers.CUSTOM,
            conventions=conventions,
        )
        found.append((own, group))
    return found


def _values(optimizer: Any, row: Row | None) -> dict[str, Hyperparameter]:
    """The hyperparameters of what a row computes, but for the weight decay."""
    inner = _innermost(optimizer)
    values: dict[str, Any] = {}
    if row:
        values |= {name: getattr(inner, attribute, None) for name, attribute in row.keys.items()} | dict(row.fixed)
    if (rate := _learning_rate(optimizer)) is not None:
        values["learning_rate"] = rate * _factor(inner, row)
    values |= {"clip_value": inner.clipvalue, "clip_norm": inner.clipnorm, "clip_global_norm": inner.global_clipnorm}
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        scale = optimizer.dynamic_scale if optimizer.built else optimizer.initial_scale
        values["loss_scale"] = float(keras.ops.convert_to_numpy(scale))
    return {name: to_number(value) for name, value in values.items() if isinstance(value, bool | int | float)}


def _row_of(inner: Any, row: Row | None, variable: Any, index: int) -> tuple[int, Row | None]:
    """What is computed for a variable, and its number among all that is computed."""
    if isinstance(inner, Continued):
        kind = inner.index_of(index)
        return kind, _continued_row(inner, kind)
    beside = row.beside if row and row.beside and inner._should_use_adamw(variable) else None
    return (1, beside) if beside else (0, row)


def _decouples(inner: Any, row: Row | None) -> bool:
    """Whether weight decay is the optimizer's, apart from the gradients."""
    rows = [each for each in (row, row.beside if row else None) if each]
    return (
        any(getattr(inner, each.decay, None) is not None for each in rows) or getattr(inner, "weight_decay", None) is not None
    )


def _factor(inner: Any, row: Row | None) -> float:
    """The learning rate of a row, relative to that of the optimizer."""
    if row is None:
        return 1.0
    return float(getattr(inner, row.rate)) if row.rate else row.factor


def _choices(row: Row | None) -> dict[str, frozenset[str]]:
    scale = {"scale": frozenset({"longer_axis", "none"})} if row and "rms_rate" in row.keys else {}
    return {"weight_decay": frozenset({"decoupled"}), **scale}


def _decay(inner: Any, row: Row | None, own: Row | None, variable: Any, index: int) -> float | None:
    """The weight decay of a variable, for which `own` is computed; None where there is none."""
    if isinstance(inner, Continued):
        decay = inner.form_of(index).value("weight_decay")
        return float(decay) if decay or not _penalty(variable) else _penalty(variable)
    if _decouples(inner, row):
        given = getattr(inner, own.decay if own else "weight_decay", None) or 0.0
        # Keras decays by the learning rate of the optimizer, whatever that of the variable.
        return float(given) / (_factor(inner, own) or 1.0) if inner._use_weight_decay(variable) else 0.0
    return _penalty(variable) or None


def _penalty(variable: Any) -> float:
    """The coupled decay that the L2 regularizer of a variable amounts to: its gradient is 2 * l2 * w."""
    regularizer = getattr(variable, "regularizer", None)
    return 2 * float(regularizer.l2) if isinstance(regularizer, keras.regularizers.L2) else 0.0


def _trainable(parameters: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What an optimizer that is not built yet will be built for."""
    return [(name, variable) for name, variable in parameters if isinstance(variable, keras.Variable) and variable.trainable]


def prepare(optimizer: Any, stored: StoredOptimizer, parameters: Sequence[tuple[str, Any]], section: str) -> Restore:
    """Compare an optimizer with a stored one.

    One that is not built yet is built for the parameters that the stored one had, as its first step would do; before the
    load is applied only where these fit, so that a refused load leaves it as it was.
    """
    if isinstance(optimizer, Several):
        return _prepare_several(optimizer, stored, parameters, section)
    if (told := stored.native.get(_CONTINUED)) and not isinstance(_innermost(optimizer), Continued):
        # It went on by another formula when it was saved, and goes on by it.
        going = Continued.instead_of(_innermost(optimizer), told["forms"], told["of"])
        return prepare(going, stored, parameters, section)
    if stored.type.rpartition(".")[2] != type(optimizer).__name__:
        problem = Problem("value", section, "class", stored=stored.type, live=type_name(optimizer))
        return Restore(apply=lambda: optimizer, problems=[problem])
    problems = list(_compare_settings(optimizer, stored.native.get("settings", {}), section))
    build_for: list[Any] = []
    if stored.native["built"] and not optimizer.built:
        build_for, unfit = _to_build(stored, parameters, section)
        problems += unfit
        if not problems:
            optimizer.build(build_for)
    if optimizer.built or not stored.native["built"]:
        problems += [problem for problem, _, _ in _pairs(optimizer, stored, parameters, section) if problem]

    def apply() -> Any:
        if build_for and not optimizer.built:
            optimizer.build(build_for)
        for problem, saved, live in _pairs(optimizer, stored, parameters, section):
            if problem is None and saved is not None and live is not None:
                live.assign(variables.tensor(saved))
        return optimizer

    slots = [tensor for entries in stored.slots.values() for tensor in entries.values()]
    return Restore(apply=apply, problems=problems, tensors=[*slots, *residue.tensors(stored.native)])


_CONTINUED = "continued"


def _pairs(
    optimizer: Any, stored: StoredOptimizer, parameters: Sequence[tuple[str, Any]], section: str
) -> list[tuple[Problem | None, StoredTensor | None, Any]]:
    """What keeps each stored tensor from its variable, if anything does, and both."""
    state = read(optimizer, parameters)
    others: dict[str, StoredTensor] = {name: ref.stored for name, ref in stored.native["others"].items()}
    pairs = [(name, others.get(name), state.others.get(name)) for name in {**others, **state.others}]
    for slot in {**stored.slots, **state.slots}:
        saved, live = stored.slots.get(slot, {}), state.slots.get(slot, {})
        pairs += [(f"{slot} of {name}", saved.get(name), live.get(name)) for name in {**saved, **live}]
    return [(variables.compare(section, name, saved, live), saved, live) for name, saved, live in pairs]


def _to_build(stored: StoredOptimizer, parameters: Sequence[tuple[str, Any]], section: str) -> tuple[list[Any], list[Problem]]:
    """The variables that an optimizer must be built for, and the stored parameters that they do not fit."""
    live = {name: variable for name, variable in parameters if isinstance(variable, keras.Variable)}
    wanted = stored.native.get("parameters", {name: variables.show(each) for name, each in live.items() if each.trainable})
    problems = []
    for name, shown in wanted.items():
        if name not in live:
            problems.append(Problem("unexpected", section, f"slots of {name}", stored=shown))
        elif variables.show(live[name]) != shown:
            problems.append(Problem("shape", section, f"slots of {name}", stored=shown, live=variables.show(live[name])))
    return [live[name] for name in wanted if name in live], problems


def _settings(optimizer: Any) -> dict[str, Any]:
    """What shapes an update beside the variables: hyperparameters, and the schedule of the learning rate."""
    found: dict[str, Any] = {}
    for prefix, part in _parts(optimizer, ()):
        public = {name: value for name, value in vars(part).items() if not name.startswith("_")}
        found |= _plain(public, prefix)
        found |= _schedule_settings(getattr(part, "_learning_rate", None), (*prefix, "learning_rate"))
    return found


def _schedule_settings(value: Any, prefix: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return {}
    found = {names.join((*prefix, "class")): type(value).__name__, **_plain(vars(value), prefix)}
    for attribute, item in vars(value).items():
        found |= _schedule_settings(item, (*prefix, attribute))
    return found


def _plain(attributes: Mapping[str, Any], prefix: tuple[str, ...]) -> dict[str, Any]:
    """Numbers, texts and lists of these, by attribute; the name that Keras gave and whether it is built do not count."""
    found = {}
    for attribute, value in attributes.items():
        plain = [item.item() if isinstance(item, np.generic) else item for item in _listed(value)]
        if attribute not in ("name", "built") and all(isinstance(item, bool | int | float | str | None) for item in plain):
            found[names.join((*prefix, attribute))] = plain if isinstance(value, list | tuple) else plain[0]
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _compare_settings(optimizer: Any, stored: Mapping[str, Any], section: str) -> Iterator[Problem]:
    # Keras bakes them into its compiled functions, so they are compared, not set. Other versions may have others.
    live = _settings(optimizer)
    for name, value in stored.items():
        if name in live and live[name] != value:
            yield Problem("value", section, name, stored=repr(value), live=repr(live[name]))


def continue_(optimizer: Any, continuation: Continuation, model: ModelCapture, section: str) -> Restore:
    """Prepare an optimizer to go on from a checkpoint of another framework.

    Where it is to follow another formula it is a new one that comes back, with the settings that the formula does not have.
    """
    if isinstance(optimizer, Several):
        problem = Problem(
            "value", section, "optimizers", stored="one", live=f"{len(optimizer.owned) + 1}, of a model of several"
        )
        return Restore(apply=lambda: optimizer, problems=[problem])
    inner, parameters = _innermost(optimizer), model.parameters
    trained = _trained(inner, parameters) if inner.built else _trainable(parameters)
    exact = any(group.form for group in continuation.groups)
    if exact and inner is not optimizer:
        raise UnsupportedError(f"{section}: a {type_name(optimizer)} cannot be given another formula: pass the optimizer in it")
    row = _row(inner)
    grouped = _grouped(optimizer, row, trained)
    rows = [each for each, _ in grouped]
    rates = [
        float(group.hyperparameters.get("learning_rate", held.hyperparameters.get("learning_rate", 0.0)))
        for group, (_, held) in zip(continuation.groups, grouped, strict=True)
    ]
    main = next((rate for rate, each in zip(rates, rows, strict=True) if not (each and each.rate)), rates[0])
    factors = [rate / main if main else _factor(inner, each) for rate, each in zip(rates, rows, strict=True)]
    problems = [] if exact else list(_at_odds(inner, continuation.groups, rows, factors, main, section))
    forms, of = _forms(continuation.groups, factors, trained)

    def apply() -> Any:
        going = Continued.instead_of(inner, forms, of) if exact else inner
        if not inner.built and not exact:
            for group, each, factor in zip(continuation.groups, rows, factors, strict=True):
                _set(inner, each, group, factor)
        if not going.built:
            going.build([variable for _, variable in trained])
        if any("learning_rate" in group.hyperparameters for group in continuation.groups):
            going.learning_rate = main
        going._iterations.assign(continuation.step * (going.gradient_accumulation_steps or 1))
        live = _row(going)
        for slot, entries in read(going, parameters).slots.items():
            meaning = _meaning(slot, live)
            for name, variable in entries.items():
                if (tensor := continuation.slots.get(meaning, {}).get(name)) is not None:
                    _fill(variable, tensor)
        if (product := getattr(going, "_u_product", None)) is not None:
            _fill(product, next(iter(continuation.slots["momentum_product"].values())))
        return going if exact else optimizer

    return Restore(apply=apply, problems=problems)


def _set(optimizer: Any, row: Row | None, group: ContinuedGroup, factor: float) -> None:
    """Give an optimizer that is not built yet the settings of a group."""
    if row is None:
        return
    if row.rate:
        setattr(optimizer, row.rate, factor)
    if group.conventions.get("scale") == "none":
        optimizer.rms_rate = None
    for name, value in group.hyperparameters.items():
        if name == "weight_decay":
            setattr(optimizer, row.decay, value * factor)
        elif name != "learning_rate":
            setattr(optimizer, row.keys[name], value)


def _at_odds(
    inner: Any,
    groups: Sequence[ContinuedGroup],
    rows: Sequence[Row | None],
    factors: Sequence[float],
    main: float,
    section: str,
) -> Iterator[Problem]:
    """What groups want otherwise than each other, although Keras has one for all that it computes alike: anything but a weight
    decay.
    """
    wanted: dict[tuple[str, str], list[Any]] = {}
    for group, row, factor in zip(groups, rows, factors, strict=True):
        for name, value in group.hyperparameters.items():
            of = wanted.setdefault((row.family if row else "", name), [])
            if name not in ("weight_decay", "learning_rate") and value not in of:
                of.append(value)
        held = _factor(inner, row)
        if not math.isclose(factor, held, rel_tol=1e-5) and (inner.built or not (row and row.rate)):
            live = (
                "one for all parameters"
                if held == 1
                else f"{held:g} times that of the others for {', '.join(group.parameters)}"
            )
            yield Problem("value", section, "learning_rate", stored=f"{main:g} and {main * factor:g}", live=live)
    for (_, name), values in wanted.items():
        if len(values) > 1:
            yield Problem("value", section, name, stored=" and ".join(map(str, values)), live="one for all parameters")


def _forms(
    groups: Sequence[ContinuedGroup], factors: Sequence[float], trained: Sequence[tuple[str, Any]]
) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The forms that a continued optimizer computes, and the place of that of each variable among them."""
    of = {name: (group.form, factor) for group, factor in zip(groups, factors, strict=True) for name in group.parameters}
    anything = next((group.form for group in groups if group.form), Form("sgd", {}, {}))
    forms: list[dict[str, Any]] = []
    places = []
    for name, variable in trained:
        form, factor = of.get(name, (None, 1.0))
        decay = float(form.value("weight_decay")) if form else 0.0
        if form and form.choice("weight_decay") == "coupled" and _penalty(variable):
            decay = 0.0  # the regularizer does it
        values = {name: value for name, value in (form or anything).hyperparameters.items() if name != "learning_rate"}
        told = {
            "family": (form or anything).family,
            "conventions": dict((form or anything).conventions),
            "hyperparameters": {**values, "weight_decay": decay},
            "rate_factor": factor,
        }
        if told not in forms:
            forms.append(told)
        places.append(forms.index(told))
    return forms, places if len(forms) > 1 else None


def use(model: Any, optimizer: Any) -> None:
    """Compile a model as it was, but with another optimizer."""
    model.compile(**{**model._compile_config.config, "optimizer": optimizer}, auto_scale_loss=False)


def _fill(variable: Any, stored: StoredTensor) -> None:
    if tuple(variable.shape) == tuple(stored.shape):  # the place of a factored slot that is not in use has another
        variable.assign(variables.tensor(stored))


def capture_tree(optimizer: Any, parameters: Sequence[tuple[str, Any]] = ()) -> dict[str, Any]:
    """An optimizer as one tree, for where it stands beside the main one; parameters without names go by their position."""
    captured = capture(optimizer, parameters)
    slots = {slot: dict(entries) for slot, entries in captured.slots.items()}
    return {"type": captured.type, "slots": slots, "native": captured.native}


def prepare_tree(optimizer: Any, tree: Mapping[str, Any], path: str, parameters: Sequence[tuple[str, Any]] = ()) -> Restore:
    """The counterpart of `capture_tree`."""
    if not parameters and tree["native"]["built"] and not optimizer.built:
        raise UnsupportedError(f"{path}: the optimizer is not built: call build(variables) before it is restored")
    slots = {slot: {name: ref.stored for name, ref in entries.items()} for slot, entries in tree["slots"].items()}
    return prepare(optimizer, StoredOptimizer(type=tree["type"], slots=slots, native=tree["native"]), parameters, path)


@dataclass(frozen=True, slots=True)
class Several:
    """The main optimizer of a model, if it has one, and those that its own `train_step` uses, by attribute."""

    main: Any | None
    owned: Mapping[str, Any]


def whole(model: Any, main: Any) -> Any:
    """The `main` optimizer, together with those among the model's attributes, as a GAN has for its second network."""
    others = _owned(model, main)
    return Several(main, others) if others else main


def _owned(model: Any, main: Any) -> dict[str, Any]:
    mains = [each for each in (main, getattr(model, "optimizer", None)) if isinstance(each, keras.optimizers.Optimizer)]
    covered = {id(part) for each in mains for _, part in _parts(each, ())}
    found: dict[str, Any] = {}
    for attribute, value in vars(model).items():
        for name, item in _items(attribute, value):
            if isinstance(item, keras.optimizers.Optimizer) and id(item) not in covered:
                found[name] = item
    return found


def _items(attribute: str, value: Any) -> list[tuple[str, Any]]:
    """What an attribute holds, by name: itself, or the members of a list or dict."""
    if isinstance(value, dict):
        return [(names.join((attribute, key)), item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(names.join((attribute, index)), item) for index, item in enumerate(value)]
    return [(attribute, value)]


def _prepare_several(several: Several, stored: StoredOptimizer, parameters: Sequence[tuple[str, Any]], section: str) -> Restore:
    trees = stored.native.get(_OWNED, {})
    parts = [prepare_tree(value, trees[name], f"{section} {name}") for name, value in several.owned.items() if name in trees]
    if several.main is not None:
        parts.insert(0, prepare(several.main, stored, parameters, section))
    problems = [problem for part in parts for problem in part.problems]
    problems += [
        Problem("missing", section, name, live=type_name(several.owned[name])) for name in several.owned if name not in trees
    ]
    problems += [
        Problem("unexpected", section, name, stored=trees[name]["type"]) for name in trees if name not in several.owned
    ]

    def apply() -> Several:
        for part in parts:
            part.apply()
        return several

    return Restore(apply=apply, problems=problems, tensors=[tensor for part in parts for tensor in part.tensors])


_OWNED = "owned by the model"
_NONE = "none"


def read(optimizer: Any, parameters: Sequence[tuple[str, Any]]) -> State:
    """Every variable of an optimizer, once."""
    slots: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {}
    taken: set[int] = set()
    for prefix, part in _parts(optimizer, ()):
        own = {id(variable): variable for variable in part.variables}
        trained = _trained(part, parameters)
        for attribute, value in vars(part).items():
            if attribute == "_variables":
                continue  # the list of all of them
            items = list(value) if isinstance(value, list | tuple) else [value]
            mine = [item for item in items if isinstance(item, keras.Variable) and id(item) in own and id(item) not in taken]
            name = names.join((*prefix, attribute.lstrip("_")))
            if not mine:
                continue
            if isinstance(value, list | tuple) and len(items) == len(trained):
                # None stands where a parameter has no such slot.
                slots[name] = {p: item for (p, _), item in zip(trained, items, strict=True) if isinstance(item, keras.Variable)}
            elif isinstance(value, list | tuple):
                others |= {f"{name}/{index}": item for index, item in enumerate(mine)}
            else:
                others[name] = value
            taken |= {id(item) for item in mine}
        _split_momenta(slots, prefix)
    rest = [variable for variable in optimizer.variables if id(variable) not in taken]
    others |= {f"variables/{index}": variable for index, variable in enumerate(rest)}
    return State(slots, others)


def _split_momenta(slots: dict[str, dict[str, Any]], prefix: tuple[str, ...]) -> None:
    """Muon's list of momenta holds the first moments of what it hands to Adam: they become a slot of their own."""
    momenta, velocities, own = (names.join((*prefix, name)) for name in ("momentums", "adam_velocities", "adam_momentums"))
    if velocities in slots and momenta in slots:
        slots[own] = {name: slots[momenta].pop(name) for name in slots[velocities]}


def _parts(optimizer: Any, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """An optimizer and all those it wraps, each with the attributes that lead to it; wrapped ones first."""
    for attribute, value in vars(optimizer).items():
        if isinstance(value, keras.optimizers.Optimizer):
            yield from _parts(value, (*prefix, attribute.lstrip("_")))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, keras.optimizers.Optimizer):
                    yield from _parts(item, (*prefix, attribute.lstrip("_"), str(index)))
    yield prefix, optimizer


def _trained(optimizer: Any, parameters: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The variables that an optimizer was built for, in its order, with the names of the model's weights."""
    known = {id(variable): name for name, variable in parameters}
    built_for = getattr(optimizer, "_trainable_variables", [])
    return [(known.get(id(variable), f"parameter {index}"), variable) for index, variable in enumerate(built_for)]


def _innermost(optimizer: Any) -> Any:
    while isinstance(inner := getattr(optimizer, "inner_optimizer", None), keras.optimizers.Optimizer):
        optimizer = inner
    return optimizer


def _row(optimizer: Any) -> Row | None:
    """The row of the built-in class whose `update_step` runs; a subclass that replaces it may mean anything."""
    inner = _innermost(optimizer)
    if isinstance(inner, Continued):
        return _continued_row(inner, 0)
    if not type(inner).update_step.__module__.startswith("keras."):
        return None
    return next((_ROWS[kind.__name__] for kind in type(inner).__mro__ if kind.__name__ in _ROWS), None)


def _continued_row(optimizer: Continued, index: int) -> Row:
    """One of the forms of a continued optimizer."""
    told = optimizer.forms[index]
    slots = {meaning: meaning for meaning in optimizers.MEANINGS}
    return Row(told["family"], slots, {}, told["conventions"], told["hyperparameters"], factor=told["rate_factor"])


def _meaning(slot: str, row: Row | None) -> str:
    attribute = names.split(slot)[-1]
    known = {**_WRAPPED, **(row.slots if row else {}), **(row.beside.slots if row and row.beside else {})}
    return known.get(attribute, optimizers.CUSTOM)


def _learning_rate(optimizer: Any) -> float | None:
    """The rate of the next update; None for an optimizer of several."""
    try:
        return float(keras.ops.convert_to_numpy(optimizer.learning_rate))
    except (ValueError, AttributeError):
        return None
