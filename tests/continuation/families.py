"""Every optimizer family in every framework that has it, with the same hyperparameters wherever these can be said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import optax
import torch

Rate = Callable[[Any], Any]
"""Completed updates -> learning rate."""

EPSILON = 1e-7
DECAY = 0.05


@dataclass(frozen=True)
class Case:
    """An optimizer of one family. torch, keras, optax: how it is made there, None where there is none; torch may have several.

    l2: coupled weight decay that Keras leaves to the regularizers of the model. rate: the learning rate. dampening: that of
    torch, for which the others have a smaller rate.
    """

    torch: Callable[[Any, float], Any] | None = None
    keras: Callable[[float], Any] | None = None
    optax: Callable[[Rate], Any] | None = None
    l2: float = 0.0
    dampening: float = 0.0
    rate: float = 0.01


def adam(**values: Any) -> Callable[[Any, float], torch.optim.Optimizer]:
    return lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, eps=EPSILON, **values)


def muon(**values: Any) -> Callable[[Any, float], Sequence[torch.optim.Optimizer]]:
    """Muon for the matrices, AdamW for the rest, as its paper has it."""
    settings = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": DECAY, **values}

    def make(parameters: Any, lr: float) -> Sequence[torch.optim.Optimizer]:
        held = list(parameters)
        matrices, others = ([each for each in held if (each.ndim == 2) is flat] for flat in (True, False))
        adamw = torch.optim.AdamW(others, lr=lr, eps=EPSILON, weight_decay=0.004 if settings["weight_decay"] == 0.004 else 0.0)
        return [torch.optim.Muon(matrices, lr=lr, eps=EPSILON, **settings), adamw]

    return make


def optax_muon(*, nesterov: bool) -> Callable[[Rate], Any]:
    return lambda lr: optax.contrib.muon(
        lr, nesterov=nesterov, consistent_rms=0.2, weight_decay=0.004, adam_weight_decay=0.004, eps=EPSILON
    )


T, K = torch.optim, keras.optimizers

CASES: Mapping[str, Case] = {
    "SGD": Case(lambda p, lr: T.SGD(p, lr=lr), lambda lr: K.SGD(lr), lambda lr: optax.sgd(lr)),
    "SGD, weight decay": Case(
        lambda p, lr: T.SGD(p, lr=lr, weight_decay=DECAY),
        lambda lr: K.SGD(lr, weight_decay=DECAY),
        lambda lr: optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(lr)),
    ),
    "SGD, momentum": Case(
        lambda p, lr: T.SGD(p, lr=lr, momentum=0.9), lambda lr: K.SGD(lr, momentum=0.9), lambda lr: optax.sgd(lr, 0.9)
    ),
    "SGD, Nesterov": Case(
        lambda p, lr: T.SGD(p, lr=lr, momentum=0.9, nesterov=True),
        lambda lr: K.SGD(lr, momentum=0.9, nesterov=True),
        lambda lr: optax.sgd(lr, 0.9, nesterov=True),
    ),
    "SGD, momentum of updates": Case(
        None, lambda lr: K.SGD(lr, momentum=0.9), lambda lr: optax.chain(optax.scale_by_learning_rate(lr), optax.trace(0.9))
    ),
    "SGD, dampening": Case(
        lambda p, lr: T.SGD(p, lr=lr, momentum=0.9, dampening=0.3),
        lambda lr: K.SGD(lr, momentum=0.9),
        lambda lr: optax.sgd((lambda count: lr(count) * 0.7) if callable(lr) else lr * 0.7, 0.9),
        dampening=0.3,
    ),
    "SGD, momentum, L2": Case(
        lambda p, lr: T.SGD(p, lr=lr, momentum=0.9, weight_decay=DECAY),
        lambda lr: K.SGD(lr, momentum=0.9),
        lambda lr: optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(lr, 0.9)),
        l2=DECAY,
    ),
    "SGD, momentum, decoupled decay": Case(
        lambda p, lr: T.SGD(p, lr=lr, momentum=0.9, weight_decay=DECAY),
        lambda lr: K.SGD(lr, momentum=0.9, weight_decay=DECAY),
        lambda lr: optax.chain(optax.trace(0.9), optax.add_decayed_weights(DECAY), optax.scale_by_learning_rate(lr)),
    ),
    "Adam": Case(adam(), lambda lr: K.Adam(lr), lambda lr: optax.adam(lr, eps=EPSILON)),
    "AdamW": Case(
        lambda p, lr: T.AdamW(p, lr=lr, eps=EPSILON, weight_decay=DECAY),
        lambda lr: K.AdamW(lr, weight_decay=DECAY),
        lambda lr: optax.adamw(lr, eps=EPSILON, weight_decay=DECAY),
    ),
    "Adam, L2": Case(
        adam(weight_decay=DECAY),
        lambda lr: K.Adam(lr),
        lambda lr: optax.chain(optax.add_decayed_weights(DECAY), optax.adam(lr, eps=EPSILON)),
        l2=DECAY,
    ),
    "AMSGrad": Case(adam(amsgrad=True), lambda lr: K.Adam(lr, amsgrad=True), lambda lr: optax.amsgrad(lr, eps=EPSILON)),
    "Adamax": Case(
        lambda p, lr: T.Adamax(p, lr=lr, eps=EPSILON), lambda lr: K.Adamax(lr), lambda lr: optax.adamax(lr, eps=EPSILON)
    ),
    "Nadam": Case(
        lambda p, lr: T.NAdam(p, lr=lr, eps=EPSILON), lambda lr: K.Nadam(lr), lambda lr: optax.nadam(lr, eps=EPSILON)
    ),
    "RAdam": Case(
        lambda p, lr: T.RAdam(p, lr=lr, eps=EPSILON, betas=(0.9, 0.99)),
        None,
        lambda lr: optax.radam(lr, eps=EPSILON, b2=0.99),
    ),
    "RMSprop": Case(
        lambda p, lr: T.RMSprop(p, lr=lr, alpha=0.9, eps=EPSILON),
        lambda lr: K.RMSprop(lr),
        lambda lr: optax.rmsprop(lr, eps=EPSILON),
    ),
    "RMSprop, epsilon outside": Case(
        lambda p, lr: T.RMSprop(p, lr=lr, alpha=0.9, eps=EPSILON),
        None,
        lambda lr: optax.rmsprop(lr, eps=EPSILON, eps_in_sqrt=False),
    ),
    "RMSprop, momentum": Case(
        lambda p, lr: T.RMSprop(p, lr=lr, alpha=0.9, eps=EPSILON, momentum=0.9),
        lambda lr: K.RMSprop(lr, momentum=0.9),
        lambda lr: optax.rmsprop(lr, eps=EPSILON, momentum=0.9),
    ),
    "RMSprop, centered": Case(
        lambda p, lr: T.RMSprop(p, lr=lr, alpha=0.9, eps=EPSILON, centered=True),
        lambda lr: K.RMSprop(lr, centered=True),
        lambda lr: optax.rmsprop(lr, eps=EPSILON, centered=True),
    ),
    "Adagrad": Case(
        lambda p, lr: T.Adagrad(p, lr=lr, eps=EPSILON),
        lambda lr: K.Adagrad(lr),
        lambda lr: optax.adagrad(lr, eps=EPSILON),
    ),
    "Adadelta": Case(
        lambda p, lr: T.Adadelta(p, lr=lr, rho=0.95, eps=EPSILON),
        lambda lr: K.Adadelta(lr),
        lambda lr: optax.adadelta(lr, rho=0.95, eps=EPSILON),
        rate=1.0,
    ),
    "Lion": Case(None, lambda lr: K.Lion(lr), lambda lr: optax.lion(lr, weight_decay=0.0), rate=0.001),
    "Lion, weight decay": Case(
        None, lambda lr: K.Lion(lr, weight_decay=DECAY), lambda lr: optax.lion(lr, weight_decay=DECAY), rate=0.001
    ),
    "Lamb": Case(None, lambda lr: K.Lamb(lr), lambda lr: optax.lamb(lr, eps=EPSILON)),
    "Lamb, weight decay": Case(
        None, lambda lr: K.Lamb(lr, weight_decay=DECAY), lambda lr: optax.lamb(lr, eps=EPSILON, weight_decay=DECAY)
    ),
    "Adafactor": Case(
        lambda p, lr: T.Adafactor(p, lr=lr, eps=(1e-15, 1e-3)),
        lambda lr: K.Adafactor(lr),
        lambda lr: optax.adafactor(lr, min_dim_size_to_factor=1, decay_rate=0.8),
    ),
    "Muon": Case(muon(nesterov=False, weight_decay=0.004), lambda lr: K.Muon(lr, nesterov=False), optax_muon(nesterov=False)),
    "Muon, Nesterov": Case(muon(nesterov=True, weight_decay=0.004), lambda lr: K.Muon(lr), optax_muon(nesterov=True)),
    "Muon, by width": Case(
        muon(nesterov=False, adjust_lr_fn="original"),
        None,
        lambda lr: optax.contrib.muon(lr, nesterov=False, weight_decay=DECAY, adam_weight_decay=0.0, eps=EPSILON),
    ),
    "Adafactor, not factored": Case(
        None, lambda lr: K.Adafactor(lr), lambda lr: optax.adafactor(lr, min_dim_size_to_factor=128, decay_rate=0.8)
    ),
}
