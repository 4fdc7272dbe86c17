"""Haiku: parameters and state of transform_with_state in one dict, the optax state over the parameters."""

from __future__ import annotations

import functools
from typing import Any

from tests.adapters.cases.trees import Functional


def _run(seed: int, core: str) -> Functional:
    import jax

    init, tx, update = _compiled(core)
    key = jax.random.key(seed)
    params, state = init(key, jax.numpy.zeros((7, 2)))
    return Functional({"params": params, "state": state}, tx.init(params), key, update)


@functools.cache
def _compiled(core: str) -> tuple[Any, Any, Any]:
    """Initialisation, transformation and training step of a network, compiled once for all runs of this process."""
    import haiku as hk
    import jax
    import optax

    def forward(x: Any) -> Any:
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(6)(x), is_training=True)
        x = hk.nets.MLP([5, 4], name="mlp")(hk.dropout(hk.next_rng_key(), 0.3, x))
        cell = hk.LSTM(3) if core == "lstm" else hk.GRU(3)
        return hk.dynamic_unroll(cell, x[:, None], cell.initial_state(1))[0]

    transformed = hk.transform_with_state(forward)
    tx = optax.chain(optax.clip(1.0), optax.rmsprop(1e-2, momentum=0.9))

    @jax.jit
    def update(model: Any, opt_state: Any, key: Any) -> Any:
        key, data, dropout = jax.random.split(key, 3)

        def loss(params: Any) -> Any:
            y, state = transformed.apply(params, model["state"], dropout, jax.random.normal(data, (7, 2)))
            return (y**2).sum(), state

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(model["params"])
        updates, opt_state = tx.update(grads, opt_state, model["params"])
        return {"params": optax.apply_updates(model["params"], updates), "state": state}, opt_state, key, value

    return jax.jit(transformed.init), tx, update


CASES = {core: lambda seed, core=core: _run(seed, core) for core in ("lstm", "gru")}
