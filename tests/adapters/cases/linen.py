"""Flax linen: a TrainState with batch statistics and a dropout key, and plain variables beside an optax state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import polyckpt
from tests.adapters.cases.trees import Functional, leaves


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


class _TrainState:
    """Data come from np.random; the state holds its dropout key, and its step begins as a Python number."""

    def __init__(self, seed: int, tx: Any, key: Any) -> None:
        import jax
        from flax.training import train_state

        class State(train_state.TrainState):
            batch_stats: Any
            key: Any

        np.random.seed(seed)
        network = _network()
        variables = jax.jit(lambda key: network.init(key, np.zeros((1, 5, 4, 3), np.float32), False))(key(seed))
        self.train_state = State.create(
            apply_fn=network.apply,
            params=variables["params"],
            tx=tx,
            batch_stats=variables["batch_stats"],
            key=key(seed + 10),
        )

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

        self.update = update

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


def _train_state(seed: int) -> _TrainState:
    import jax
    import optax

    return _TrainState(seed, optax.adamw(optax.cosine_decay_schedule(1e-2, 10)), jax.random.key)


def _accumulating(seed: int) -> _TrainState:
    import jax
    import optax

    # A raw key, and a save in the middle of an accumulation window.
    return _TrainState(seed, optax.MultiSteps(optax.sgd(1e-2, 0.9), 2), jax.random.PRNGKey)


def _variables(seed: int) -> Functional:
    import jax
    import optax

    network, key = _network(), jax.random.key(seed)
    variables = jax.jit(lambda key: network.init(key, np.zeros((1, 5, 4, 3), np.float32), False))(key)
    tx = optax.adam(1e-2)

    @jax.jit
    def update(variables: Any, state: Any, key: Any) -> Any:
        key, data, dropout = jax.random.split(key, 3)
        x = jax.random.normal(data, (6, 5, 4, 3))

        def loss(params: Any) -> Any:
            y, updates = network.apply(
                {**variables, "params": params}, x, True, rngs={"dropout": dropout}, mutable=["batch_stats"]
            )
            return (y**2).mean(), updates

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        return {**changed, "params": optax.apply_updates(variables["params"], updates)}, state, key, value

    return Functional(variables, tx.init(variables["params"]), key, update)


CASES = {"train_state": _train_state, "accumulating": _accumulating, "variables": _variables}
