"""Flax linen: layers are made where they are called, under automatic names; a model is a dict of its variables."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp

from tests.conversion.twins import BLOCKS, HEADS, HIDDEN, POSITIONS, VOCABULARY, WIDTH, Twin, causal


def twin(module: linen.Module, batch: Any) -> Twin:
    variables = module.init(jax.random.key(0), batch)
    return Twin(variables, module.apply, module.apply)


class LinenUNet(linen.Module):
    """Stages are loops."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def stage(x: jax.Array, features: int) -> jax.Array:
            for _ in range(2):
                x = linen.relu(linen.BatchNorm(use_running_average=True)(linen.Conv(features, (3, 3))(x)))
            return x

        skips = []
        for features in (6, 10):
            skips.append(stage(x, features))
            x = linen.max_pool(skips[-1], (2, 2), strides=(2, 2))
        x = stage(x, 14)
        for features in (10, 6):
            x = linen.ConvTranspose(features, (2, 2), strides=(2, 2))(x)
            x = stage(jnp.concatenate([skips.pop(), x], -1), features)
        return linen.Conv(4, (1, 1))(x)


class LinenBlock(linen.Module):
    """A layer of BERT."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(linen.LayerNorm, epsilon=1e-12, use_fast_variance=False)
        x = norm()(x + linen.MultiHeadDotProductAttention(HEADS)(x))
        y = linen.gelu(linen.Dense(HIDDEN)(x), approximate=False)
        return norm()(x + linen.Dense(WIDTH)(y))


class LinenBert(linen.Module):
    """Three embeddings, which are added."""

    @linen.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = linen.Embed(VOCABULARY, WIDTH)(tokens)
        x += linen.Embed(POSITIONS, WIDTH)(jnp.arange(tokens.shape[1]))
        x += linen.Embed(2, WIDTH)(jnp.zeros_like(tokens))
        x = linen.LayerNorm(epsilon=1e-12, use_fast_variance=False)(x)
        for _ in range(BLOCKS):
            x = LinenBlock()(x)
        return x, linen.tanh(linen.Dense(WIDTH)(x[:, 0]))


class LinenGpt(linen.Module):
    """One flat module."""

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        norm = functools.partial(linen.LayerNorm, epsilon=1e-5, use_fast_variance=False)
        x = linen.Embed(VOCABULARY, WIDTH)(tokens) + linen.Embed(POSITIONS, WIDTH)(jnp.arange(tokens.shape[1]))
        for _ in range(BLOCKS):
            x += linen.Dense(WIDTH)(causal(linen.Dense(3 * WIDTH)(norm()(x))))
            x += linen.Dense(WIDTH)(linen.gelu(linen.Dense(4 * WIDTH)(norm()(x))))
        return norm()(x)


LINEN = {"U-Net": LinenUNet, "BERT": LinenBert, "GPT-2": LinenGpt}
