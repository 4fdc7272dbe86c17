"""Equinox modules: functions among the leaves, state beside the model, the optax state over the filtered model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tests.adapters.cases.trees import Functional


def _run(seed: int, define: Callable[[], tuple[Any, tuple[int, ...], Any]]) -> Functional:
    """`define` returns a class of modules that are called with (x, state, key), the shape of an x, and a transformation."""
    import equinox as eqx
    import jax

    build, transformation, update = _compiled(define)
    key = jax.random.key(seed)
    model = eqx.nn.make_with_state(build)(key)
    return Functional(model, transformation.init(eqx.filter(model[0], eqx.is_inexact_array)), key, update)


@functools.cache
def _compiled(define: Callable[[], tuple[Any, tuple[int, ...], Any]]) -> tuple[Any, Any, Any]:
    """The class, the transformation and a training step, compiled once for all runs of this process."""
    import equinox as eqx
    import jax

    build, shape, transformation = define()

    @eqx.filter_jit
    def update(pair: Any, opt_state: Any, key: Any) -> Any:
        key, data, dropout = jax.random.split(key, 3)
        x = jax.random.normal(data, (6, *shape))

        @eqx.filter_value_and_grad(has_aux=True)
        def loss(model: Any, state: Any) -> Any:
            y, state = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(
                x, state, jax.random.split(dropout, 6)
            )
            return (y**2).mean(), state

        (value, state), grads = loss(*pair)
        updates, opt_state = transformation.update(grads, opt_state, eqx.filter(pair[0], eqx.is_inexact_array))
        return (eqx.apply_updates(pair[0], updates), state), opt_state, key, value

    return build, transformation, update


def _convolutional() -> tuple[Any, tuple[int, ...], Any]:
    import equinox as eqx
    import jax
    import optax

    class Network(eqx.Module):
        conv: Any
        norm: Any
        transposed: Any
        group: Any
        dropout: Any
        mlp: Any
        activation: Callable[..., Any]

        def __init__(self, key: Any) -> None:
            keys = jax.random.split(key, 3)
            self.conv = eqx.nn.Conv2d(2, 4, (3, 2), groups=2, key=keys[0])
            self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
            self.transposed = eqx.nn.ConvTranspose1d(4, 6, 3, key=keys[1])
            self.group = eqx.nn.GroupNorm(3, 6)
            self.dropout = eqx.nn.Dropout(0.4)
            self.mlp = eqx.nn.MLP(6, 2, 5, 1, key=keys[2])
            self.activation = jax.nn.gelu

        def __call__(self, x: Any, state: Any, key: Any) -> Any:
            x, state = self.norm(self.conv(x), state)
            x = self.group(self.transposed(self.activation(x).mean(-1))).mean(-1)
            return self.mlp(self.dropout(x, key=key)), state

    return Network, (2, 5, 4), optax.adamw(1e-2)


def _sequential() -> tuple[Any, tuple[int, ...], Any]:
    import equinox as eqx
    import jax
    import optax

    class Network(eqx.Module):
        embedding: Any
        attention: Any
        norms: list[Any]
        cells: tuple[Any, ...]
        slope: Any
        head: Any

        def __init__(self, key: Any) -> None:
            keys = jax.random.split(key, 5)
            self.embedding = eqx.nn.Embedding(9, 6, key=keys[0])
            self.attention = eqx.nn.MultiheadAttention(2, 6, use_output_bias=True, dropout_p=0.2, key=keys[1])
            self.norms = [eqx.nn.LayerNorm(6), eqx.nn.RMSNorm(6), eqx.nn.RMSNorm(6, use_bias=False)]
            self.cells = (eqx.nn.LSTMCell(6, 4, key=keys[2]), eqx.nn.GRUCell(6, 4, key=keys[3]))
            self.slope = eqx.nn.PReLU()
            self.head = eqx.nn.Linear(4, "scalar", key=keys[4])

        def __call__(self, x: Any, state: Any, key: Any) -> Any:
            x = jax.vmap(self.embedding)(jax.numpy.abs(x * 3).astype(int) % 9)
            for norm in self.norms:
                x = jax.vmap(norm)(x)
            x = self.attention(x, x, x, key=key)
            carry, hidden = (jax.numpy.zeros(4), jax.numpy.zeros(4)), jax.numpy.zeros(4)
            for each in x:
                carry, hidden = self.cells[0](each, carry), self.cells[1](each, hidden)
            return self.head(self.slope(carry[0] + hidden)), state

    return Network, (3,), optax.chain(optax.clip(1.0), optax.lion(1e-3))


CASES = {
    "convolutional": lambda seed: _run(seed, _convolutional),
    "sequential": lambda seed: _run(seed, _sequential),
}
