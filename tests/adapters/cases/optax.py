"""optax over a plain dict of parameters: every kind of state that a transformation keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tests.adapters.cases.trees import Functional


def _run(seed: int, make: Callable[[Any], Any]) -> Functional:
    import jax
    import jax.numpy as jnp

    init, update = _compiled(make)
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "hidden": {"w": jax.random.normal(keys[0], (5, 4)), "b": jax.random.normal(keys[1], (4,))},
        "out": {"w": jax.random.normal(keys[2], (4, 3))},
        "scale": jnp.float32(0.5 + seed),
    }
    return Functional(params, init(params), keys[3], update)


@functools.cache
def _compiled(make: Callable[[Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The init function of a transformation and a training step with it, compiled once for all runs of this process."""
    import jax
    import jax.numpy as jnp
    import optax

    tx = optax.with_extra_args_support(make(optax))

    @jax.jit
    def update(params: Any, state: Any, key: Any) -> Any:
        key, data = jax.random.split(key)
        x = jax.random.normal(data, (7, 5))

        def loss(params: Any) -> Any:
            hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
            return jnp.mean((params["scale"] * hidden @ params["out"]["w"] - x[:, :3]) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state, key, value

    return tx.init, update


def _labels(params: Any) -> Any:
    import jax

    return jax.tree_util.tree_map_with_path(lambda path, leaf: "matrix" if leaf.ndim == 2 else "rest", params)


def _matrices(params: Any) -> Any:
    import jax

    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def _schedule(optax: Any) -> Any:
    return optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 8)


_TRANSFORMATIONS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda optax: optax.sgd(1e-2),
    "sgd_nesterov": lambda optax: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adamw_schedule": lambda optax: optax.adamw(_schedule(optax), weight_decay=1e-2),
    "adam_bfloat16_moment": lambda optax: optax.adam(1e-2, mu_dtype="bfloat16"),
    "clip_adamw": lambda optax: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
    "amsgrad": lambda optax: optax.amsgrad(1e-2),
    "adamax": lambda optax: optax.adamax(1e-2),
    "nadam": lambda optax: optax.nadam(1e-2),
    "radam": lambda optax: optax.radam(1e-2, threshold=1.0),
    "lamb": lambda optax: optax.lamb(1e-2),
    "lion": lambda optax: optax.lion(1e-2),
    "adafactor": lambda optax: optax.adafactor(1e-2, min_dim_size_to_factor=2, momentum=0.9),
    "rmsprop_centered": lambda optax: optax.rmsprop(1e-2, centered=True, momentum=0.9),
    "adagrad": lambda optax: optax.adagrad(1e-2),
    "adadelta": lambda optax: optax.adadelta(1.0),
    "rprop": lambda optax: optax.rprop(1e-2),
    "lbfgs": lambda optax: optax.lbfgs(memory_size=2),
    "muon": lambda optax: optax.contrib.muon(1e-2, ns_steps=2),
    "schedule_free": lambda optax: optax.contrib.schedule_free_adamw(1e-2),
    "noise": lambda optax: optax.chain(optax.add_noise(0.1, 0.5, 3), optax.identity(), optax.sgd(1e-2)),
    "plateau": lambda optax: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1, cooldown=1)),
    "masked": lambda optax: optax.chain(optax.masked(optax.adam(1e-2), _matrices), optax.scale(0.5)),
    "multi_transform": lambda optax: optax.multi_transform(
        {"matrix": optax.adamw(1e-2), "rest": optax.sgd(1e-2, 0.9)}, _labels
    ),
    "multi_steps": lambda optax: optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(),  # saved mid-window
    "inject": lambda optax: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, weight_decay=0.1),
    "inject_schedule": lambda optax: optax.inject_hyperparams(optax.sgd)(learning_rate=_schedule(optax), momentum=0.9),
    "apply_if_finite": lambda optax: optax.apply_if_finite(optax.adam(1e-2), 2),
    "identity": lambda optax: optax.chain(optax.identity(), optax.scale(-1e-2), optax.keep_params_nonnegative()),
}

CASES = {name: lambda seed, make=make: _run(seed, make) for name, make in _TRANSFORMATIONS.items()}
