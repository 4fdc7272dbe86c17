"""Every family from every framework to every other: trained here, converted through the disk, trained on there.

Run as: python -m tests.continuation.matrix float64 jax  (the type, and the backend of Keras); prints JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from polyckpt.moves import Exactness

HERE, THERE = 7, 7
"""Updates before and after the switch."""

FRAMEWORKS = ("torch", "keras", "optax")
SIZES = (6, 8, 3)
SCALES = (1.0, 1e-3)


@dataclass(frozen=True)
class Outcome:
    """What came of a switch. verdict: of the report, the worst. predicted: the size that it tells.

    weights: the largest difference from the run that stayed, relative to the largest weight; way: relative to the way that the
    weights went since the switch. steady: whether the verdict holds for this rate: what is exact while the rate stays says
    nothing of one that changes.
    """

    case: str
    pair: str
    scale: float
    rate: str
    continuation: str
    verdict: str
    items: tuple[str, ...]
    predicted: float
    weights: float
    way: float
    steady: bool = True
    refused: str = ""


def rates(base: float, changing: bool) -> np.ndarray:
    """The learning rate of each update: halved before the switch and at it, and a tenth after it."""
    table = np.full(HERE + THERE + 1, base)
    if changing:
        table[3:] *= 0.5
        table[HERE:] *= 0.5
        table[HERE + 3 :] *= 0.1
    return table


def start(seed: int, dtype: str) -> list[np.ndarray]:
    """The weights of two dense layers: kernel (in, out) and bias of each."""
    random = np.random.default_rng(seed)
    shapes = [(SIZES[0], SIZES[1]), (SIZES[1],), (SIZES[1], SIZES[2]), (SIZES[2],)]
    return [(0.5 * random.standard_normal(shape)).astype(dtype) for shape in shapes]


def batches(dtype: str) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(5)
    shapes = (16, SIZES[0]), (16, SIZES[2])
    return [tuple(random.standard_normal(shape).astype(dtype) for shape in shapes) for _ in range(HERE + THERE)]  # type: ignore[misc]


class TorchRun:
    """The network in torch."""

    def __init__(self, case: Any, weights: list[np.ndarray], table: np.ndarray, scale: float) -> None:
        import torch

        self.table, self.scale, self.t = table, scale, 0
        self.model = torch.nn.Sequential(torch.nn.Linear(*SIZES[:2]), torch.nn.ReLU(), torch.nn.Linear(*SIZES[1:]))
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(torch.tensor(value.T))
        self.share = 1 - case.dampening
        self.optimizer = case.torch(self.model.parameters(), float(table[0]))
        self.each = self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]
        self.tx = None

    def at(self, step: int) -> None:
        self.t = step
        for group in (group for each in self.each for group in each.param_groups):
            group["lr"] = float(self.table[step] * (self.share if not group.get("dampening") else 1))

    def train(self, step: int, x: np.ndarray, y: np.ndarray) -> None:
        import torch

        self.model.zero_grad()
        (self.scale * ((self.model(torch.tensor(x)) - torch.tensor(y)) ** 2).mean()).backward()
        for each in self.each:
            each.step()

    def weights(self) -> list[np.ndarray]:
        return [parameter.detach().numpy().T.copy() for parameter in self.model.parameters()]

    def load(self, path: str, **options: Any) -> Any:
        import polyckpt

        return polyckpt.load(path, self.model, self.optimizer, **options)


class KerasRun:
    """The network in Keras, on whatever backend."""

    def __init__(self, case: Any, weights: list[np.ndarray], table: np.ndarray, scale: float) -> None:
        import keras

        self.table, self.scale = table, scale
        l2 = {"kernel_regularizer": keras.regularizers.L2(case.l2 / 2), "bias_regularizer": keras.regularizers.L2(case.l2 / 2)}
        settings = l2 if case.l2 else {}
        self.l2, self.share = case.l2, 1 - case.dampening
        self.model = keras.Sequential(
            [
                keras.Input((SIZES[0],)),
                keras.layers.Dense(SIZES[1], activation="relu", **settings),
                keras.layers.Dense(SIZES[2], **settings),
            ]
        )
        self.model.set_weights(weights)
        self.optimizer = case.keras(float(table[0]) * self.share)
        self.tx = None

    def at(self, step: int) -> None:
        self.optimizer.learning_rate = float(self.table[step] * self.share)

    def train(self, step: int, x: np.ndarray, y: np.ndarray) -> None:
        values = [np.asarray(value) for value in self.weights()]
        gradients = gradient(values, x, y, self.scale)
        # What a regularizer adds to the gradient.
        gradients = [np.asarray(g + self.l2 * w, w.dtype) for g, w in zip(gradients, values, strict=True)]
        from keras import ops

        self.optimizer.apply([ops.convert_to_tensor(g) for g in gradients], self.model.trainable_variables)

    def weights(self) -> list[np.ndarray]:
        return [np.array(value) for value in self.model.get_weights()]

    def load(self, path: str, **options: Any) -> Any:
        import polyckpt

        restored = polyckpt.load(path, self.model, self.optimizer, **options)
        self.optimizer = restored.optimizer
        if any(form["hyperparameters"].get("dampening") for form in getattr(self.optimizer, "forms", ())):
            self.share = 1.0
        return restored


class OptaxRun:
    """The network as a tree of arrays, trained by optax."""

    def __init__(self, case: Any, weights: list[np.ndarray], table: np.ndarray, scale: float) -> None:
        import jax.numpy as jnp

        self.scale = scale
        constant = bool((table == table[0]).all())
        values = jnp.asarray(table, weights[0].dtype)
        self.tx = case.optax(float(table[0]) if constant else lambda count: values[count])
        names = ["kernel", "bias"] * 2
        self.model = {
            layer: {name: jnp.asarray(value) for name, value in zip(names, part, strict=False)}
            for layer, part in (("first", weights[:2]), ("second", weights[2:]))
        }
        self.optimizer = self.tx.init(self.model)

    def at(self, step: int) -> None:
        pass

    def train(self, step: int, x: np.ndarray, y: np.ndarray) -> None:
        import jax
        import optax

        made = gradient(self.weights(), x, y, self.scale)
        tree = {
            "first": dict(zip(("kernel", "bias"), made[:2], strict=True)),
            "second": dict(zip(("kernel", "bias"), made[2:], strict=True)),
        }
        tree = jax.tree.map(lambda g, w: jax.numpy.asarray(g, w.dtype), tree, self.model)
        changes, self.optimizer = self.tx.update(tree, self.optimizer, self.model)
        self.model = optax.apply_updates(self.model, changes)

    def weights(self) -> list[np.ndarray]:
        return [np.asarray(self.model[layer][name]) for layer in ("first", "second") for name in ("kernel", "bias")]

    def load(self, path: str, **options: Any) -> Any:
        import polyckpt

        restored = polyckpt.load(path, self.model, self.optimizer, tx=self.tx, **options)
        self.model, self.optimizer, self.tx = restored.model, restored.optimizer, restored.tx
        return restored


def gradient(weights: list[np.ndarray], x: np.ndarray, y: np.ndarray, scale: float) -> list[np.ndarray]:
    """That of the mean squared error, by JAX in the type of the weights."""
    import jax

    if "gradient" not in _MADE:

        def loss(weights: Any, x: Any, y: Any, scale: Any) -> Any:
            hidden = jax.numpy.maximum(x @ weights[0] + weights[1], 0)
            return scale * ((hidden @ weights[2] + weights[3] - y) ** 2).mean()

        _MADE["gradient"] = jax.jit(jax.grad(loss))
    return [np.asarray(each) for each in _MADE["gradient"](weights, x, y, np.asarray(scale, weights[0].dtype))]


_MADE: dict[str, Any] = {}
RUNS = {"torch": TorchRun, "keras": KerasRun, "optax": OptaxRun}


def outcomes(name: str, case: Any, one: str, dtype: str, scale: float, changing: bool) -> Iterator[Outcome]:
    """What comes of a run in `one` that goes on in each of the others."""
    import polyckpt

    table, data = rates(case.rate, changing), batches(dtype)
    stays = RUNS[one](case, start(1, dtype), table, scale)
    train(stays, range(HERE), data)
    stays.at(HERE)
    at_switch = stays.weights()
    beside: dict[str, Any] = {"tx": stays.tx} if one == "optax" else {}
    with tempfile.TemporaryDirectory() as directory:
        path = polyckpt.save(f"{directory}/switch", stays.model, stays.optimizer, step=HERE, **beside)
        train(stays, range(HERE, HERE + THERE), data)
        for other, continuation in itertools.product(FRAMEWORKS, ("stock", "exact")):
            if other == one or getattr(case, other) is None:
                continue
            key = {
                "case": name,
                "pair": f"{one} -> {other}",
                "scale": scale,
                "rate": "changing" if changing else "constant",
                "continuation": continuation,
            }
            goes = RUNS[other](case, start(2, dtype), table, scale)
            try:
                restored = goes.load(path, accept={"names and order", *ACCEPTED}, continuation=continuation)
            except polyckpt.PolyckptError as error:
                yield Outcome(**key, verdict="refused", items=(), predicted=0, weights=0, way=0, refused=str(error))
                continue
            train(goes, range(HERE, HERE + THERE), data)
            # The rates are set by hand here, whatever becomes of a schedule.
            told = [item for group in restored.report.optimizer for item in group.items]
            items = [item for item in told if item.name != "schedule"]
            yield Outcome(
                **key,
                verdict=max((str(item.exactness) for item in items), key=WORST.index, default="exact"),
                items=tuple(f"{item.name}: {item.exactness}" for item in items),
                predicted=sum(item.size for item in items if item.size is not None),
                weights=distance(stays.weights(), goes.weights()) / distance(stays.weights()),
                way=distance(stays.weights(), goes.weights()) / distance(stays.weights(), at_switch),
                steady=not changing or not any(item.exactness == Exactness.CONSTANT_RATE for item in items),
            )


def train(run: Any, steps: range, data: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    for step in steps:
        run.at(step)
        run.train(step, *data[step])


def distance(one: Sequence[np.ndarray], other: Sequence[np.ndarray] | None = None) -> float:
    """The largest difference of an element, or the largest element."""
    others = [np.zeros_like(each) for each in one] if other is None else other
    return max(float(np.abs(a - b).max()) for a, b in zip(one, others, strict=True))


WORST = ["exact", "exact with changed hyperparameter", "exact while the learning rate stays", "default", "approximate"]
"""Verdicts from the best on."""

ACCEPTED = (
    "epsilon",
    "momentum",
    "weight_decay",
    "max_second_moment",
    "momentum_decay",
    "rate",
    "learning_rate_decay",
    "factored",
    "family",
    "precision",
)


def main(dtype: str, backend: str, only: str = "") -> None:
    os.environ["KERAS_BACKEND"] = backend
    import jax

    jax.config.update("jax_enable_x64", dtype == "float64")
    import keras
    import torch

    keras.config.set_floatx(dtype)
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_num_threads(1)
    from tests.continuation.families import CASES

    found: list[dict[str, Any]] = []
    for (name, case), one in itertools.product(CASES.items(), FRAMEWORKS):
        if only in name and getattr(case, one) is not None:
            for scale, changing in itertools.product(SCALES, (False, True)):
                found += map(asdict, outcomes(name, case, one, dtype, scale, changing))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
