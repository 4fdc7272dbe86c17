"""What one update of each family computes, under every convention of the tables, for any library of arrays.

The formulas are those of torch.optim 2.13, keras.optimizers 3.15 and optax 0.2.8, each named after its convention. They serve
two purposes: telling by how much two optimizers differ, and going on exactly as another framework would.

`g` is a gradient, `w` a parameter, `t` the number of the update from 1, `lr` the learning rate, as in polyckpt.optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes

from polyckpt.optimizers import AVERAGED, UNUSED

Array = Any
Number = Any
"""A Python number, or a 0-d array where the library traces."""


Math = Any
"""A namespace with the functions that formulas need beside operators: abs, sqrt, sign, maximum, minimum, where, transpose and
sum (with axis and keepdims). numpy, jax.numpy and keras.ops are such.
"""


@dataclass(frozen=True)
class Form:
    """An optimizer as far as its formulas go: family, conventions and the hyperparameters of one group."""

    family: str
    conventions: Mapping[str, str]
    hyperparameters: Mapping[str, Any]

    def value(self, name: str) -> Any:
        """A hyperparameter, or the value that amounts to lacking it; None where there is none such."""
        found = self.hyperparameters.get(name)
        return UNUSED.get(name) if found is None else found

    def choice(self, name: str, default: str = "") -> str:
        """A convention, or `default` where the optimizer has none."""
        return self.conventions.get(name, default)


MOMENTA = {
    "unscaled": (1, 0, 0),
    "scaled_by_learning_rate": (-1, 1, 0),
    "scaled_and_subtracted": (1, 1, 0),
    "average": (1, 0, 1),
    "corrected_average": (1, 0, 1),
}
"""Convention `momentum` -> (sign, power of lr, power of 1 - momentum) of what is held beside the plain sum of gradients."""


def slots_of(form: Form, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], float]]:
    """The slots of a parameter of `shape`: meaning -> shape and first value."""
    factored = len(shape) > 1 and sorted(shape)[-2] >= form.value("factored_from")
    meanings = {
        "sgd": ["momentum"] if form.value("momentum") else [],
        "adam": ["first_moment", "second_moment", *(["max_second_moment"] if form.value("amsgrad") else [])],
        "nadam": ["first_moment", "second_moment", "momentum_product"],
        "radam": ["first_moment", "second_moment"],
        "adamax": ["first_moment", "infinity_norm"],
        "rmsprop": [
            "second_moment",
            *(["momentum"] if form.value("momentum") else []),
            *(["first_moment"] if form.value("centered") else []),
        ],
        "adagrad": ["squared_sum"],
        "adadelta": ["second_moment", "squared_update"],
        "lion": ["first_moment"],
        "lamb": ["first_moment", "second_moment"],
        "muon": ["momentum"],
        "adafactor": ["row_second_moment", "column_second_moment"] if factored else ["second_moment"],
    }[form.family]
    first = {"squared_sum": form.value("initial_accumulator") or 0.0, "momentum_product": 1.0}
    shapes = {
        "momentum_product": (),
        "row_second_moment": shape[:-1],
        "column_second_moment": (*shape[:-2], *shape[-1:]),
    }
    return {meaning: (shapes.get(meaning, shape), first.get(meaning, 0.0)) for meaning in meanings}


DERIVED = {
    "second_moment": frozenset({"row_second_moment", "column_second_moment"}),
    "row_second_moment": frozenset({"second_moment"}),
    "column_second_moment": frozenset({"second_moment"}),
}
"""Slots that `slot_from` makes -> of which."""


def slot_from(meaning: str, held: Mapping[str, Any], xp: Math) -> Any:
    """A slot of Adafactor that was factored otherwise: from the whole second moment, or from its rows and columns."""
    if meaning == "second_moment":
        rows, columns = held["row_second_moment"], held["column_second_moment"]
        return (rows / xp.maximum(_mean(xp, rows, -1, keepdims=True), 1e-300))[..., None] * columns[..., None, :]
    return _mean(xp, held["second_moment"], AVERAGED[meaning])


Slots = dict[str, Array]
Result = tuple[Array, Slots]


def update(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    """The parameter and its slots after one update.

    slots: meaning -> array, those of `slots_of`. lr: that of this update, before decays that the optimizer has of its own.

    >>> import numpy as np
    >>> adam = Form("adam", {"epsilon": "outside_sqrt"}, {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8})
    >>> zeros = {"first_moment": np.zeros(1), "second_moment": np.zeros(1)}
    >>> w, slots = update(adam, np, np.ones(1), np.ones(1), zeros, 1, 0.1)
    >>> float(w[0]), float(slots["first_moment"][0])
    (0.900000001, 0.09999999999999998)
    """
    decay = form.value("weight_decay")
    lr = lr / (1 + (t - 1) * form.value("learning_rate_decay")) if form.value("learning_rate_decay") else lr
    if form.value("maximize"):
        g = -g
    if decay and form.choice("weight_decay") == "coupled":
        g = g + decay * w
    elif decay and form.choice("weight_decay") == "decoupled" and form.family != "adafactor":
        w = w - lr * decay * w
    return _FORMULAS[form.family](form, xp, g, w, slots, t, lr)


def _sgd(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    if "momentum" not in slots:
        return w - lr * g, {}
    # torch starts with g itself, whatever the dampening.
    share = xp.where(t > 1, 1 - form.value("dampening"), 1.0) if form.value("dampening") else 1.0
    return _with_momentum(form, g, w, slots["momentum"], lr, share)


def _with_momentum(form: Form, x: Array, w: Array, held: Array, lr: Number, share: Number = 1.0) -> Result:
    momentum = form.value("momentum")
    sign, power, averaged = MOMENTA[form.choice("momentum", "unscaled")]
    factor = sign * (lr if power else 1.0)
    held = momentum * held + factor * share * (1 - momentum) ** averaged * x
    ahead = momentum * held + factor * x if form.value("nesterov") else held
    return w - sign * (1.0 if power else lr) * ahead, {"momentum": held}


def _moments(form: Form, g: Array, slots: Mapping[str, Array]) -> tuple[Array, Array]:
    b1, b2 = form.value("beta1"), form.value("beta2")
    first = b1 * slots["first_moment"] + (1 - b1) * g
    return first, b2 * slots["second_moment"] + (1 - b2) * g * g


def _root(form: Form, xp: Math, square: Array, correction: Number) -> Array:
    """The denominator: of a second moment that must be divided by `correction`."""
    epsilon = form.value("epsilon")
    if form.choice("epsilon") == "before_bias_correction":
        return (xp.sqrt(square) + epsilon) / correction**0.5
    if form.choice("epsilon") == "inside_sqrt":
        return xp.sqrt(square / correction + epsilon)
    return xp.sqrt(square / correction) + epsilon


def _adam(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    first, second = _moments(form, g, slots)
    new = {"first_moment": first, "second_moment": second}
    correction = 1 - form.value("beta2") ** t
    square = second
    if "max_second_moment" in slots:
        if form.choice("max_second_moment") == "bias_corrected":
            square, correction = second / correction, 1.0
        square = new["max_second_moment"] = xp.maximum(slots["max_second_moment"], square)
    return w - lr / (1 - form.value("beta1") ** t) * first / _root(form, xp, square, correction), new


def _nadam(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    first, second = _moments(form, g, slots)
    now, then = momentum_of(form, t), momentum_of(form, t + 1)
    product = slots["momentum_product"] * now
    ahead = then * first / (1 - product * then) + (1 - now) * g / (1 - product)
    step = lr * ahead / _root(form, xp, second, 1 - form.value("beta2") ** t)
    return w - step, {"first_moment": first, "second_moment": second, "momentum_product": product}


def momentum_of(form: Form, t: Number) -> Number:
    """NAdam's momentum at the update `t` (Dozat 2016)."""
    if form.choice("momentum_schedule") == "constant":
        return form.value("beta1") + 0 * t
    return form.value("beta1") * (1 - 0.5 * 0.96 ** (t * form.value("momentum_decay")))


def momentum_product(form: Form, step: int) -> float:
    """The product of NAdam's momenta of `step` updates."""
    # A product of a thousand factors below one is zero, or all of them are alike.
    return math.prod(float(momentum_of(form, t)) for t in range(1, min(step, 100_000) + 1))


def _radam(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    first, second = _moments(form, g, slots)
    b2 = form.value("beta2")
    correction = 1 - b2**t
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / correction
    # Where the length is short the root is of something else, and not used.
    safe = xp.where(length > 5, length, 6.0)
    tamed = ((safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)) ** 0.5
    mean = first / (1 - form.value("beta1") ** t)
    direction = xp.where(length > 5, tamed / _root(form, xp, second, correction), 1.0) * mean
    return w - lr * direction, {"first_moment": first, "second_moment": second}


def _adamax(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    b1, epsilon = form.value("beta1"), form.value("epsilon")
    first = b1 * slots["first_moment"] + (1 - b1) * g
    size, beside = (xp.abs(g) + epsilon, 0.0) if form.choice("epsilon") == "in_norm" else (xp.abs(g), epsilon)
    norm = xp.maximum(form.value("beta2") * slots["infinity_norm"], size)
    return w - lr / (1 - b1**t) * first / (norm + beside), {"first_moment": first, "infinity_norm": norm}


def _rmsprop(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    rho = form.value("rho")
    new = {"second_moment": rho * slots["second_moment"] + (1 - rho) * g * g}
    square = new["second_moment"]
    if "first_moment" in slots:
        new["first_moment"] = rho * slots["first_moment"] + (1 - rho) * g
        square = square - new["first_moment"] * new["first_moment"]
    x = g / _root(form, xp, square, 1.0)
    if "momentum" not in slots:
        return w - lr * x, new
    w, held = _with_momentum(form, x, w, slots["momentum"], lr)
    return w, {**new, **held}


def _adagrad(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    total = slots["squared_sum"] + g * g
    # An element that never had a gradient stays, also where there is no epsilon.
    step = xp.where(total > 0, lr * g / _root(form, xp, xp.where(total > 0, total, 1.0), 1.0), 0.0 * g)
    return w - step, {"squared_sum": total}


def _adadelta(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    rho, epsilon = form.value("rho"), form.value("epsilon")
    second = rho * slots["second_moment"] + (1 - rho) * g * g
    step = xp.sqrt(slots["squared_update"] + epsilon) / xp.sqrt(second + epsilon) * g
    squared = rho * slots["squared_update"] + (1 - rho) * step * step
    return w - lr * step, {"second_moment": second, "squared_update": squared}


def _lion(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    b1, b2, first = form.value("beta1"), form.value("beta2"), slots["first_moment"]
    return w - lr * xp.sign(b1 * first + (1 - b1) * g), {"first_moment": b2 * first + (1 - b2) * g}


def _lamb(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    first, second = _moments(form, g, slots)
    direction = first / (1 - form.value("beta1") ** t) / _root(form, xp, second, 1 - form.value("beta2") ** t)
    if form.choice("weight_decay") == "in_trust_ratio":
        direction = direction + form.value("weight_decay") * w
    size, length = xp.sqrt(xp.sum(w * w)), xp.sqrt(xp.sum(direction * direction))
    ratio = xp.where((size > 0) & (length > 0), size / xp.where(length > 0, length, 1.0), 1.0)
    return w - lr * ratio * direction, {"first_moment": first, "second_moment": second}


def _adafactor(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    epsilon, bound = form.value("epsilon"), form.choice("epsilon") == "as_bound"
    keep = 1 - t ** form.value("beta2_decay")
    square = g * g if bound else g * g + epsilon
    new: Slots = {}
    if "row_second_moment" in slots:
        rows, columns = (_mean(xp, square, axis) for axis in (-1, -2))
        new["row_second_moment"] = keep * slots["row_second_moment"] + (1 - keep) * rows
        new["column_second_moment"] = keep * slots["column_second_moment"] + (1 - keep) * columns
        whole = _mean(xp, new["row_second_moment"], -1, keepdims=True)
        if bound:
            whole = xp.maximum(whole, epsilon)
        estimate = (new["row_second_moment"] / whole)[..., None] * new["column_second_moment"][..., None, :]
    else:
        estimate = new["second_moment"] = keep * slots["second_moment"] + (1 - keep) * square
    if bound:
        estimate = xp.maximum(estimate, epsilon**2)
    direction = g / xp.sqrt(estimate)
    if form.value("clip_threshold"):
        direction = direction / xp.maximum(_norm(xp, direction) / form.value("clip_threshold"), 1.0)
    decay = form.value("weight_decay") if form.choice("weight_decay") == "decoupled" else 0.0
    before = form.choice("rate") == "bounded" and not bound  # Keras decays before it looks at the size of w, torch after
    if before and decay:
        w = w - lr * decay * w
    rate = lr
    if form.choice("rate") == "bounded":
        rate = xp.minimum(lr, 1 / t**0.5)
    if form.value("epsilon2") is not None:
        rate = rate * xp.maximum(_norm(xp, w), form.value("epsilon2"))
    if decay and not before:
        w = w - lr * decay * w
    return w - rate * direction, new


def _muon(form: Form, xp: Math, g: Array, w: Array, slots: Mapping[str, Array], t: Number, lr: Number) -> Result:
    momentum, choice = form.value("momentum"), form.choice("momentum")
    share = (1 - momentum) ** MOMENTA[choice][2]
    held = momentum * slots["momentum"] + share * g
    now, then = (1 - momentum**t, 1 - momentum ** (t + 1)) if choice == "corrected_average" else (1.0, 1.0)
    x = momentum * held / then + share * g / now if form.value("nesterov") else held / now
    return w - lr * _scale(form, tuple(w.shape)) * _orthogonal(form, xp, x), {"momentum": held}


def _scale(form: Form, shape: tuple[int, ...]) -> float:
    """What multiplies the orthogonal update of a matrix."""
    outputs, inputs = shape if form.choice("outputs") == "first" else shape[::-1]
    return {
        "width": math.sqrt(max(1.0, outputs / inputs)),
        "longer_axis": (form.value("rms_rate") or 0.0) * math.sqrt(max(shape)),
        "none": 1.0,
    }[form.choice("scale")]


def _orthogonal(form: Form, xp: Math, x: Array) -> Array:
    """A matrix with the singular vectors of `x` and singular values near one, by the iteration of Newton and Schulz.

    In bfloat16, which the convention `precision` may ask for, only NumPy computes it here: to tell what that amounts to.
    """
    rounded = _to_bfloat16 if form.choice("precision") == "bfloat16" else _as_it_is
    a, b, c = (form.value(f"coefficient{index}") for index in (1, 2, 3))
    tall = x.shape[0] > x.shape[1]
    x = rounded(xp.transpose(x) if tall else x)
    norm, epsilon = xp.sqrt(xp.sum(x * x)), form.value("epsilon")
    x = rounded(x / (xp.maximum(norm, epsilon) if form.choice("epsilon") == "bound_of_norm" else norm + epsilon))
    for _ in range(int(form.value("iterations"))):
        square = rounded(x @ xp.transpose(x))
        x = rounded(a * x + rounded(b * square + c * (square @ square)) @ x)
    return xp.transpose(x) if tall else x


def _to_bfloat16(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)


def _as_it_is(x: Array) -> Array:
    return x


def _mean(xp: Math, x: Array, axis: int, keepdims: bool = False) -> Array:
    return xp.sum(x, axis=axis, keepdims=keepdims) / x.shape[axis]


def _norm(xp: Math, x: Array) -> Array:
    """The root of the mean of squares."""
    return xp.sqrt(xp.sum(x * x) / math.prod(x.shape))


_Formula = Callable[[Form, Math, Array, Array, Mapping[str, Array], Number, Number], Result]

_FORMULAS: dict[str, _Formula] = {
    "sgd": _sgd,
    "adam": _adam,
    "nadam": _nadam,
    "radam": _radam,
    "adamax": _adamax,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "adadelta": _adadelta,
    "lion": _lion,
    "lamb": _lamb,
    "adafactor": _adafactor,
    "muon": _muon,
}

KNOWN = frozenset(_FORMULAS)
"""Families with formulas."""
