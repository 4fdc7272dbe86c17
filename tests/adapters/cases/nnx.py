"""Flax nnx: modules and optimizers updated in place, random states in the model, metrics; and the functional form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt
from tests.adapters.cases.trees import Functional, leaves


@functools.cache
def _convolutional_class() -> Any:
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.conv = nnx.Conv(3, 4, (3, 2), rngs=rngs)
            self.up = nnx.ConvTranspose(4, 5, (2, 2), rngs=rngs)
            self.norms = nnx.List([nnx.BatchNorm(5, rngs=rngs), nnx.GroupNorm(5, 5, rngs=rngs), nnx.InstanceNorm(5, rngs=rngs)])
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(5, 2, rngs=rngs)
            self.scale = nnx.Param(rngs.params.normal((2,)))
            self.seen = nnx.BatchStat(np.zeros((), np.int32) + 0)

        def __call__(self, x: Any) -> Any:
            x = self.up(self.conv(x))
            for norm in self.norms:
                x = norm(x)
            self.seen.set_value(self.seen.get_value() + 1)
            return self.head(self.dropout(x.mean((1, 2)))) * self.scale

    return Network


def _convolutional(rngs: Any) -> Any:
    return _convolutional_class()(rngs)


@functools.cache
def _sequential_class() -> Any:
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.embed = nnx.Embed(9, 6, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                2, 6, dropout_rate=0.1, decode=False, deterministic=False, normalize_qk=True, rngs=rngs
            )
            self.norms = nnx.Dict(layer=nnx.LayerNorm(6, rngs=rngs), rms=nnx.RMSNorm(6, rngs=rngs))
            self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(6, 4, rngs=rngs))
            self.slow = nnx.RNN(nnx.LSTMCell(4, 3, rngs=rngs))
            self.gru = nnx.RNN(nnx.GRUCell(3, 5, rngs=rngs))
            self.simple = nnx.RNN(nnx.SimpleCell(5, 6, rngs=rngs))
            self.wide = nnx.LinearGeneral((3, 6), (2, 4), axis=(-2, -1), rngs=rngs)
            self.head = nnx.Einsum("abc,cbd->ad", (4, 2, 9), (9,), rngs=rngs)
            self.slope = nnx.PReLU()
            # One Variable under two paths.
            self.table = self.embed.embedding

        def __call__(self, x: Any) -> Any:
            x = self.embed((abs(x[:, :, 0, 0]) * 3).astype(int)[:, :3] % 9)
            x = self.norms["rms"](self.norms["layer"](self.attention(x)))
            x = self.slope(self.simple(self.gru(self.slow(self.lstm(x)))))
            return self.head(self.wide(x)) @ self.table.get_value()

    return Network


def _sequential(rngs: Any) -> Any:
    return _sequential_class()(rngs)


# What is compiled serves all runs of this process: the step, and transformations that are one and the same object.


@functools.cache
def _update() -> Callable[..., Any]:
    from flax import nnx

    @nnx.jit
    def update(model: Any, optimizer: Any, metrics: Any, data: Any) -> Any:
        x = data.params.normal((4, 5, 4, 3))
        value, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        metrics.update(loss=value)
        return value

    return update


@functools.cache
def _scheduled() -> Any:
    import optax

    return optax.adamw(optax.linear_schedule(1e-2, 0, 9))


@functools.cache
def _accumulated() -> Any:
    import optax

    return optax.MultiSteps(optax.inject_hyperparams(optax.adam)(1e-2), 2)


class _Run:
    """Module, optimizer, metrics and the Rngs that data come from, all updated in place."""

    def __init__(self, seed: int, build: Callable[[Any], Any], make: Callable[[], Any]) -> None:
        from flax import nnx

        self.model = build(nnx.Rngs(seed, dropout=seed + 1))
        self.optimizer = nnx.Optimizer(self.model, make(), wrt=nnx.Param)
        self.metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), spread=nnx.metrics.Welford("loss"))
        self.data = nnx.Rngs(seed + 2)

    def step(self) -> float:
        return float(_update()(self.model, self.optimizer, self.metrics, self.data))

    def save(self, path: Path) -> None:
        polyckpt.save(path, self.model, self.optimizer, extra={"metrics": self.metrics, "data": self.data})

    def load(self, path: Path) -> None:
        restored = polyckpt.load(path, self.model, self.optimizer, extra={"metrics": self.metrics, "data": self.data})
        assert restored.model is self.model and restored.optimizer is self.optimizer

    def state(self) -> dict[str, Any]:
        from flax import nnx

        objects = {"model": self.model, "optimizer": self.optimizer, "metrics": self.metrics, "data": self.data}
        return leaves(**{name: nnx.to_pure_dict(nnx.state(each)) for name, each in objects.items()})


def _functional(seed: int) -> Functional:
    import jax
    import optax
    from flax import nnx

    graph, params, others = nnx.split(_convolutional(nnx.Rngs(seed)), nnx.Param, ...)
    tx = optax.adamw(1e-2)

    @jax.jit
    def update(model: Any, opt_state: Any, key: Any) -> Any:
        key, data = jax.random.split(key)

        def loss(params: Any) -> Any:
            # Variables that a step changes must be of this trace.
            module = nnx.merge(graph, params, model["others"], copy=True)
            value = (module(jax.random.normal(data, (4, 5, 4, 3))) ** 2).mean()
            return value, nnx.split(module, nnx.Param, ...)[2]

        (value, others), grads = jax.value_and_grad(loss, has_aux=True)(model["params"])
        updates, opt_state = tx.update(grads, opt_state, model["params"])
        return {"params": optax.apply_updates(model["params"], updates), "others": others}, opt_state, key, value

    return Functional({"params": params, "others": others}, tx.init(params), jax.random.key(seed), update)


CASES = {
    "convolutional": lambda seed: _Run(seed, _convolutional, _scheduled),
    "sequential": lambda seed: _Run(seed, _sequential, _accumulated),
    "functional": _functional,
}
