"""Optimizer families: what their slots hold, what their hyperparameters are called, and where conventions differ.

`g` is a gradient, `w` a parameter, `lr` the learning rate; an average is exponential.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from polyckpt.schema import Optimizer, ParameterGroup

CUSTOM = "custom"

MEANINGS: dict[str, str] = {
    "step": "completed updates of this parameter",
    "first_moment": "average of g",
    "second_moment": "average of g^2",
    "max_second_moment": "maximum of the second moment so far",
    "infinity_norm": "decayed maximum of |g|",
    "momentum": "decayed sum of g or of updates",
    "squared_sum": "sum of g^2",
    "squared_update": "average of squared updates",
    "row_second_moment": "average of g^2 over the last axis",
    "column_second_moment": "average of g^2 over the axis before the last",
    "longest_axis_second_moment": "average of g^2 over the longest axis (of equals the last)",
    "next_axis_second_moment": "average of g^2 over the longest axis but one",
    "momentum_product": "product of the momentum coefficients so far",
    "previous_gradient": "g of the update before, zero where its sign changed",
    "step_size": "step size of each element",
    "linear": "linear term of follow-the-regularised-leader",
    "parameter_average": "average of w",
    "gradient_accumulator": "gradients of an accumulation window under way",
    "schedule": "a coefficient that a formula derives from the step",
    CUSTOM: "known to the producer alone",
}
"""What a slot holds."""

_ADAM = frozenset({"first_moment", "second_moment"})

FAMILIES: dict[str, frozenset[str]] = {
    "sgd": frozenset({"momentum"}),
    "adam": _ADAM | {"max_second_moment"},
    "sparse_adam": _ADAM,
    "adamax": frozenset({"first_moment", "infinity_norm"}),
    "nadam": _ADAM | {"momentum_product"},
    "radam": _ADAM,
    "rmsprop": frozenset({"second_moment", "first_moment", "momentum"}),
    "adagrad": frozenset({"squared_sum"}),
    "adadelta": frozenset({"second_moment", "squared_update"}),
    "adafactor": frozenset(
        {
            "row_second_moment",
            "column_second_moment",
            "longest_axis_second_moment",
            "next_axis_second_moment",
            "second_moment",
            "first_moment",
        }
    ),
    "lion": frozenset({"first_moment"}),
    "lamb": _ADAM,
    # What is no matrix goes on by Adam in most.
    "muon": _ADAM | {"momentum"},
    "ftrl": frozenset({"squared_sum", "linear"}),
    "rprop": frozenset({"previous_gradient", "step_size"}),
    "asgd": frozenset({"parameter_average", "schedule"}),
    "lbfgs": frozenset({CUSTOM}),
}
"""Family -> meanings of its slots. Every family may also hold the meanings of `_ANY`; "custom" may hold any."""

_ANY = frozenset({"step", "parameter_average", "gradient_accumulator", CUSTOM})

HYPERPARAMETERS: dict[str, str] = {
    "learning_rate": "lr",
    "beta1": "decay of the first moment",
    "beta2": "decay of the second moment",
    "beta2_decay": "exponent by which the decay of the second moment approaches one",
    "epsilon": "added to a denominator; where is the convention `epsilon`",
    "epsilon2": "lower bound of the parameter scale (Adafactor)",
    "weight_decay": "weight decay; how is the convention `weight_decay`",
    "momentum": "decay of the momentum",
    "dampening": "share of g kept out of the momentum",
    "nesterov": "whether momentum looks ahead",
    "rho": "decay of the average of g^2 (RMSprop, Adadelta)",
    "centered": "whether the square of the average of g is subtracted",
    "amsgrad": "whether the maximum second moment divides",
    "learning_rate_decay": "lr / (1 + step * this)",
    "momentum_decay": "decay of the momentum schedule (NAdam)",
    "initial_accumulator": "first value of the squared sum",
    "iterations": "of Newton and Schulz (Muon)",
    "coefficient1": "of x in an iteration (Muon)",
    "coefficient2": "of (x x^T) x in an iteration (Muon)",
    "coefficient3": "of (x x^T)^2 x in an iteration (Muon)",
    "rms_rate": "factor of the convention `scale` where the longer axis is it (Muon)",
    "clip_threshold": "bound of the root mean square of an update (Adafactor)",
    "factored_from": "length of the longest axis but one from which the second moment is factored (Adafactor), none for any",
    "clip_value": "bound of each element of g",
    "clip_norm": "bound of the norm of each g",
    "clip_global_norm": "bound of the norm of all g together",
    "loss_scale": "factor of the loss, by which gradients were divided again",
    "maximize": "whether the objective is maximised, so that slots hold moments of -g",
}
"""Neutral names of hyperparameters. A producer's further ones stay in its native residue."""

CONVENTIONS: dict[str, dict[str, str]] = {
    "epsilon": {
        "outside_sqrt": "sqrt(second moment) + epsilon, after bias correction",
        "before_bias_correction": "sqrt(second moment) + epsilon, before bias correction (epsilon hat)",
        "inside_sqrt": "sqrt(second moment + epsilon)",
        "in_norm": "max(decayed norm, |g| + epsilon)",
        "in_square": "average of g^2 + epsilon",
        "as_bound": "max(average of g^2, epsilon)",
        "beside_norm": "norm of the momentum + epsilon",
        "bound_of_norm": "max(norm of the momentum, epsilon)",
    },
    "weight_decay": {
        "coupled": "g + weight_decay * w, before the slots",
        "decoupled": "w - lr * weight_decay * w, apart from the slots",
        "in_trust_ratio": "added to the update before its norm is taken (Lamb)",
    },
    "momentum": {
        "unscaled": "the momentum holds gradients; lr multiplies it at each update",
        "scaled_by_learning_rate": "the momentum holds updates, to be added: -lr was multiplied in when each came",
        "scaled_and_subtracted": "the momentum holds updates, to be subtracted: lr was multiplied in when each came",
        "average": "the momentum holds an average of gradients: each came with a share of 1 - momentum",
        "corrected_average": "as average, and divided by 1 - momentum ** step at each update",
    },
    "max_second_moment": {
        "raw": "maximum of the second moment",
        "bias_corrected": "maximum of the bias-corrected second moment",
    },
    "momentum_schedule": {
        "decaying": "beta1 * (1 - 0.96 ** (step * momentum_decay) / 2)",
        "constant": "beta1",
    },
    "rate": {
        "as_given": "lr",
        "bounded": "min(lr, 1 / sqrt(step))",
    },
    "scale": {
        "width": "sqrt(max(1, outputs / inputs)) multiplies an orthogonal update",
        "longer_axis": "rms_rate * sqrt(longer axis) does",
        "none": "nothing does",
    },
    "outputs": {"first": "the first axis of a matrix is that of outputs", "last": "the last one is"},
    "precision": {"of_weights": "orthogonal updates are computed in the type of the weights", "bfloat16": "in bfloat16"},
    "accumulator": {"sum": "the accumulator holds a sum of gradients", "mean": "their running mean"},
}
"""Convention -> choice -> formula."""


UNUSED: dict[str, float | bool] = {
    "weight_decay": 0.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "learning_rate_decay": 0.0,
    "factored_from": 0,
    "nesterov": False,
    "amsgrad": False,
    "centered": False,
    "maximize": False,
}
"""Hyperparameter -> the value that amounts to not having it."""

STRUCTURAL = frozenset({"nesterov", "amsgrad", "centered", "maximize"})
"""Hyperparameters that decide which slots there are or what they hold: compared, never set."""

CLIPS = frozenset({"clip_value", "clip_norm", "clip_global_norm", "loss_scale"})
"""Hyperparameters that only some frameworks leave to the optimizer, others to the training loop."""

AVERAGED = {"row_second_moment": -1, "column_second_moment": -2}
"""Slots that lack an axis of their parameter -> which."""

WHOLE = frozenset({"lamb", "adafactor", "muon"})
"""Families whose update of an element depends on all of its parameter, so that parts of one do not go on as the whole."""

KIN = frozenset({frozenset({"adam", "nadam"})})
"""Families with the same slots, of which one can go on where the other stopped, if not exactly."""

LINEAR = frozenset({"first_moment", "momentum", "previous_gradient", "linear", "gradient_accumulator", "parameter_average"})
"""Slots that change their sign with the parameter; the others are of even degree in g."""


def problems(optimizer: Optimizer) -> Iterator[str]:
    """What a described optimizer says that the tables do not know, one line each."""
    if optimizer.family != CUSTOM and optimizer.family not in FAMILIES:
        yield f"family {optimizer.family!r} is not in the table"
    families = {optimizer.family, *(group.family for group in optimizer.groups if group.family)}
    yield from (f"family {family!r} of a group is not in the table" for family in families - {optimizer.family, *FAMILIES})
    held = _ANY.union(*(FAMILIES.get(family, MEANINGS.keys()) for family in families))
    for slot, entry in optimizer.slots.items():
        if entry.meaning not in MEANINGS:
            yield f"slot {slot}: meaning {entry.meaning!r} is not in the table"
        elif entry.meaning not in held:
            yield f"slot {slot}: {' and '.join(sorted(families))} has no {entry.meaning}"
    for conventions in (optimizer.conventions, *(group.conventions for group in optimizer.groups)):
        for name, choice in conventions.items():
            if choice not in CONVENTIONS.get(name, {}):
                yield f"convention {name}: {choice!r} is not in the table"
    for group in optimizer.groups:
        for name in group.hyperparameters:
            if name not in HYPERPARAMETERS:
                yield f"hyperparameter {name!r} is not in the table"


def akin(one: str, other: str) -> bool:
    """Whether an optimizer of one family can go on where one of the other stopped."""
    return one == other or frozenset({one, other}) in KIN


def common(conventions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The conventions that all of several groups have."""
    first, *others = conventions or [{}]
    return {name: choice for name, choice in first.items() if all(each.get(name) == choice for each in others)}


def apart(group: ParameterGroup, family: str, conventions: Mapping[str, str]) -> ParameterGroup:
    """A group that says of itself only what its optimizer does not say."""
    own = {name: choice for name, choice in group.conventions.items() if conventions.get(name) != choice}
    return msgspec.structs.replace(group, family=group.family if group.family != family else None, conventions=own)


def factored(meaning: str, shape: tuple[int, ...]) -> str:
    """The meaning of a factored slot of a parameter of `shape` in terms of its last two axes, where they are the longest."""
    longest = sorted(range(len(shape)), key=lambda axis: shape[axis])[-2:]
    if meaning not in ("longest_axis_second_moment", "next_axis_second_moment") or len(longest) < 2:
        return meaning
    axis = longest[-1] if meaning == "longest_axis_second_moment" else longest[0]
    return next((name for name, lacks in AVERAGED.items() if axis == len(shape) + lacks), meaning)
