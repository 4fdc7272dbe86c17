"""Haiku: functions; a model is the dict of its parameters, beside that of its state where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from tests.conversion.twins import BLOCKS, HEADS, HIDDEN, POSITIONS, VOCABULARY, WIDTH, Twin, causal


def twin(function: Callable[[Any], Any], batch: Any) -> Twin:
    transformed = hk.without_apply_rng(hk.transform_with_state(function))
    params, state = transformed.init(jax.random.key(0), batch)

    def call(model: Any, batch: Any) -> Any:
        return transformed.apply(model["params"], model["state"], batch)[0]

    return Twin({"params": params, "state": state}, call, call)


def haiku_unet(x: jax.Array) -> jax.Array:
    def stage(x: jax.Array, channels: int) -> jax.Array:
        for _ in range(2):
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Conv2D(channels, 3)(x), is_training=hk.running_init()))
        return x

    skips = []
    for channels in (6, 10):
        skips.append(stage(x, channels))
        x = hk.max_pool(skips[-1], 2, 2, "VALID", channel_axis=-1)
    x = stage(x, 14)
    for channels in (10, 6):
        x = stage(jnp.concatenate([skips.pop(), hk.Conv2DTranspose(channels, 2, stride=2)(x)], -1), channels)
    return hk.Conv2D(4, 1)(x)


def haiku_bert(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    def norm(x: jax.Array) -> jax.Array:
        return hk.LayerNorm(-1, True, True, eps=1e-12)(x)

    x = hk.Embed(VOCABULARY, WIDTH, name="token_embedding")(tokens)
    x += hk.Embed(POSITIONS, WIDTH, name="position_embedding")(jnp.arange(tokens.shape[1]))
    x += hk.Embed(2, WIDTH, name="segment_embedding")(jnp.zeros_like(tokens))
    x = norm(x)
    initial = hk.initializers.VarianceScaling(1.0)
    for _ in range(BLOCKS):
        x = norm(x + hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=initial, model_size=WIDTH)(x, x, x))
        x = norm(x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(HIDDEN)(x), approximate=False)))
    return x, jnp.tanh(hk.Linear(WIDTH, name="pooler")(x[:, 0]))


def haiku_gpt(tokens: jax.Array) -> jax.Array:
    def norm(x: jax.Array) -> jax.Array:
        return hk.LayerNorm(-1, True, True)(x)

    x = hk.Embed(VOCABULARY, WIDTH)(tokens) + hk.Embed(POSITIONS, WIDTH)(jnp.arange(tokens.shape[1]))
    for _ in range(BLOCKS):
        x += hk.Linear(WIDTH, name="project")(causal(hk.Linear(3 * WIDTH, name="qkv")(norm(x))))
        x += hk.nets.MLP([4 * WIDTH, WIDTH], activation=jax.nn.gelu)(norm(x))
    return norm(x)


HAIKU = {"U-Net": haiku_unet, "BERT": haiku_bert, "GPT-2": haiku_gpt}
