"""Flax linen: a TrainState with batch statistics and a dropout key, and plain variables beside an optax state."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt
from tests.adapters.cases.trees import Functional, leaves


@functools.cache
def _network() -> Any:
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = nn.Conv(4, (3, 2))(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x).reshape(x.shape[0], -1))
            return nn.Dense(2)(nn.LayerNorm()(x))

    return Network()


@functools.cache
def _initialise() -> Any:
    import jax

    return jax.jit(lambda key: _network().init(key, np.zeros((1, 5, 4, 3), np.float32), False))


@functools.cache
def _state_and_update() -> tuple[Any, Any]:
    """The class of train states and a training step, compiled once for all runs of this process."""
    import jax
    from flax.training import train_state

    class State(train_state.TrainState):
        batch_stats: Any
        key: Any

    @jax.jit
    def update(state: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            y, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                True,
                rngs={"dropout": jax.random.fold_in(state.key, state.step)},
                mutable=["batch_stats"],
            )
            return (y**2).mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"]), value

    return State, update


class _TrainState:
    """Data come from np.random; the state holds its dropout key, and its step begins as a Python number."""

    def __init__(self, seed: int, tx: Any, key: Any) -> None:
        np.random.seed(seed)
        state, self.update = _state_and_update()
        variables = _initialise()(key(seed))
        self.train_state = state.create(
            apply_fn=_network().apply,
            params=variables["params"],
            tx=tx,
            batch_stats=variables["batch_stats"],
            key=key(seed + 10),
        )

    def step(self) -> float:
        x = np.random.randn(6, 5, 4, 3).astype(np.float32)
        self.train_state, loss = self.update(self.train_state, x)
        return float(loss)

    def save(self, path: Path) -> None:
        polyckpt.save(path, self.train_state, epoch=3)

    def load(self, path: Path) -> None:
        self.train_state = polyckpt.load(path, self.train_state).model

    def state(self) -> dict[str, Any]:
        return {**leaves(state=self.train_state), "numpy": np.random.get_state()[1]}


@functools.cache
def _scheduled() -> Any:
    import optax

    return optax.adamw(optax.cosine_decay_schedule(1e-2, 10))


@functools.cache
def _accumulated() -> Any:
    import optax

    return optax.MultiSteps(optax.sgd(1e-2, 0.9), 2)


def _train_state(seed: int) -> _TrainState:
    import jax

    return _TrainState(seed, _scheduled(), jax.random.key)


def _accumulating(seed: int) -> _TrainState:
    import jax

    # A raw key, and a save in the middle of an accumulation window.
    return _TrainState(seed, _accumulated(), jax.random.PRNGKey)


@functools.cache
def _update() -> Any:
    import jax
    import optax

    tx = _scheduled()

    @jax.jit
    def update(variables: Any, state: Any, key: Any) -> Any:
        key, data, dropout = jax.random.split(key, 3)
        x = jax.random.normal(data, (6, 5, 4, 3))

        def loss(params: Any) -> Any:
            y, updates = _network().apply(
                {**variables, "params": params}, x, True, rngs={"dropout": dropout}, mutable=["batch_stats"]
            )
            return (y**2).mean(), updates

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        return {**changed, "params": optax.apply_updates(variables["params"], updates)}, state, key, value

    return update


def _variables(seed: int) -> Functional:
    import jax

    key = jax.random.key(seed)
    variables = _initialise()(key)
    return Functional(variables, _scheduled().init(variables["params"]), key, _update())


CASES = {"train_state": _train_state, "accumulating": _accumulating, "variables": _variables}
