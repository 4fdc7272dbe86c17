"""The models of torch_models, written again as people write them in other frameworks: other names, another structure, the
same function. Converts each there and back with no rules and prints JSON.

Run as: python -m tests.conversion.twins, with KERAS_BACKEND set to jax.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch
from flax import nnx
from keras import layers
from torch import nn

import polyckpt
from tests.conversion.mutants import randomize
from tests.conversion.torch_models import MODELS

VOCABULARY, POSITIONS, WIDTH, HEADS, BLOCKS, HIDDEN = 41, 16, 24, 3, 3, 40
"""Those of BERT and GPT-2; the hidden layers of GPT-2 are four times as wide as the others."""


@dataclass(frozen=True)
class Twin:
    """model: what save and load take. call: a model and a batch -> output, or several. apply: as in `polyckpt.load`."""

    model: Any
    call: Callable[[Any, Any], Any]
    apply: Callable[[Any, Any], Any] | None = None


# Keras: functional models out of layers and small functions


def _keras_twin(model: Any) -> Twin:
    return Twin(model, lambda model, batch: model(batch, training=False))


def keras_unet() -> Twin:
    def stage(x: Any, filters: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same")(x)
            x = layers.BatchNormalization(epsilon=1e-5)(x)
            x = layers.ReLU()(x)
        return x

    image = x = keras.Input((16, 12, 3))
    skips = []
    for filters in (6, 10):
        x = stage(x, filters)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = stage(x, 14)
    for filters, skip in zip((10, 6), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(filters, 2, strides=2)(x)
        x = stage(layers.Concatenate()([skip, x]), filters)
    return _keras_twin(keras.Model(image, layers.Conv2D(4, 1, name="logits")(x)))


class TokensAndPositions(layers.Layer):  # type: ignore[misc]
    """What examples of Keras call it: tokens are looked up, and so are their places."""

    def __init__(self, segments: int = 0) -> None:
        super().__init__()
        self.token_emb = layers.Embedding(VOCABULARY, WIDTH)
        self.pos_emb = layers.Embedding(POSITIONS, WIDTH)
        self.segment_emb = layers.Embedding(segments, WIDTH) if segments else None

    def call(self, tokens: Any) -> Any:
        x = self.token_emb(tokens) + self.pos_emb(keras.ops.arange(keras.ops.shape(tokens)[-1]))
        return x if self.segment_emb is None else x + self.segment_emb(keras.ops.zeros_like(tokens))


def keras_bert() -> Twin:
    tokens = keras.Input((7,), dtype="int32")
    x = layers.LayerNormalization(epsilon=1e-12)(TokensAndPositions(segments=2)(tokens))
    for number in range(BLOCKS):
        attended = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"attention_{number}")(x, x)
        x = layers.LayerNormalization(epsilon=1e-12)(layers.Add()([x, attended]))
        hidden = layers.Dense(HIDDEN, activation="gelu")(x)
        x = layers.LayerNormalization(epsilon=1e-12)(layers.Add()([x, layers.Dense(WIDTH)(hidden)]))
    pooled = layers.Dense(WIDTH, activation="tanh", name="pooler")(x[:, 0])
    return _keras_twin(keras.Model(tokens, [x, pooled]))


class CausalAttention(layers.Layer):  # type: ignore[misc]
    """Queries, keys and values come of one layer."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.qkv = layers.Dense(3 * WIDTH)
        self.project = layers.Dense(WIDTH)

    def call(self, x: Any) -> Any:
        length = x.shape[1]
        query, key, value = (
            keras.ops.transpose(keras.ops.reshape(part, (-1, length, HEADS, WIDTH // HEADS)), (0, 2, 1, 3))
            for part in keras.ops.split(self.qkv(x), 3, axis=-1)
        )
        scores = query @ keras.ops.transpose(key, (0, 1, 3, 2)) / (WIDTH // HEADS) ** 0.5
        scores = keras.ops.where(keras.ops.tril(keras.ops.ones((length, length), "bool")), scores, -1e9)
        mixed = keras.ops.transpose(keras.ops.softmax(scores) @ value, (0, 2, 1, 3))
        return self.project(keras.ops.reshape(mixed, (-1, length, WIDTH)))


def keras_gpt() -> Twin:
    tokens = keras.Input((7,), dtype="int32")
    x = TokensAndPositions()(tokens)
    for number in range(BLOCKS):
        x = x + CausalAttention(f"self_attention_{number}")(layers.LayerNormalization(epsilon=1e-5)(x))
        y = layers.Dense(4 * WIDTH)(layers.LayerNormalization(epsilon=1e-5)(x))
        x = x + layers.Dense(WIDTH)(keras.activations.gelu(y, approximate=True))
    return _keras_twin(keras.Model(tokens, layers.LayerNormalization(epsilon=1e-5)(x)))


def keras_tagger() -> Twin:
    words = keras.Input((9,), dtype="int32")
    x = layers.Embedding(31, 7)(words)
    for _ in range(3):
        x = layers.Bidirectional(layers.LSTM(5, return_sequences=True))(x)
    for _ in range(2):
        x = layers.Dense(10, activation="tanh")(x)
    return _keras_twin(keras.Model(words, layers.Dense(6)(x)))


# Flax nnx: modules in lists, activations as functions


def _nnx_twin(model: nnx.Module) -> Twin:
    model.eval()
    return Twin(model, lambda model, batch: model(batch))


class ConvNormTwice(nnx.Module):
    """One stage of a U-Net."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.convs = nnx.List(nnx.Conv(size, outputs, (3, 3), rngs=rngs) for size in (inputs, outputs))
        self.norms = nnx.List(nnx.BatchNorm(outputs, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return x


class NnxUNet(nnx.Module):
    """All stages down before all stages up."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.output = nnx.Conv(6, 4, (1, 1), rngs=rngs)
        self.encoder = nnx.List(ConvNormTwice(*sizes, rngs) for sizes in ((3, 6), (6, 10)))
        self.bottleneck = ConvNormTwice(10, 14, rngs)
        self.decoder = nnx.List(ConvNormTwice(2 * size, size, rngs) for size in (10, 6))
        upsampling = ((14, 10), (10, 6))
        self.upsample = nnx.List(nnx.ConvTranspose(*sizes, (2, 2), strides=2, rngs=rngs) for sizes in upsampling)

    def __call__(self, x: jax.Array) -> jax.Array:
        skips = []
        for stage in self.encoder:
            skips.append(stage(x))
            x = nnx.max_pool(skips[-1], (2, 2), strides=(2, 2))
        x = self.bottleneck(x)
        for up, stage in zip(self.upsample, self.decoder, strict=True):
            x = stage(jnp.concatenate([skips.pop(), up(x)], -1))
        return self.output(x)


class NnxEncoderLayer(nnx.Module):
    """A norm after each of attention and feed-forward."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        norm = functools.partial(nnx.LayerNorm, WIDTH, epsilon=1e-12, use_fast_variance=False, rngs=rngs)
        self.ln1, self.ln2 = norm(), norm()
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.wi, self.wo = nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.ln1(x + self.attention(x))
        return self.ln2(x + self.wo(nnx.gelu(self.wi(x), approximate=False)))


class NnxBert(nnx.Module):
    """Its layers are made before its embeddings, which run first."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(NnxEncoderLayer(rngs) for _ in range(BLOCKS))
        self.pool = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.words, self.places, self.segments = (nnx.Embed(n, WIDTH, rngs=rngs) for n in (VOCABULARY, POSITIONS, 2))
        self.ln = nnx.LayerNorm(WIDTH, epsilon=1e-12, use_fast_variance=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = jnp.arange(tokens.shape[1])[None]
        x = self.ln(self.words(tokens) + self.places(places) + self.segments(jnp.zeros_like(tokens)))
        for layer in self.layers:
            x = layer(x)
        return x, jnp.tanh(self.pool(x[:, 0]))


class NnxDecoderLayer(nnx.Module):
    """A norm before each of attention and feed-forward."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List(nnx.LayerNorm(WIDTH, epsilon=1e-5, use_fast_variance=False, rngs=rngs) for _ in range(2))
        self.qkv_proj, self.out_proj = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs),
            nnx.gelu,  # by its tanh, as it stands
            nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = self.norms
        x = x + self.out_proj(causal(self.qkv_proj(first(x))))
        return x + self.mlp(second(x))


def causal(packed: jax.Array) -> jax.Array:
    """Attention of queries, keys and values that lie side by side."""
    heads = packed.reshape(*packed.shape[:-1], 3, HEADS, WIDTH // HEADS)
    query, key, value = (heads[..., part, :, :] for part in range(3))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return mixed.reshape(*packed.shape[:-1], WIDTH)


class NnxGpt(nnx.Module):
    """Tokens and places in embeddings of their own."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tok_embed, self.pos_embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(POSITIONS, WIDTH, rngs=rngs)
        self.layers = nnx.List(NnxDecoderLayer(rngs) for _ in range(BLOCKS))
        self.final_norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tok_embed(tokens) + self.pos_embed(jnp.arange(tokens.shape[-1]))
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)


class NnxTagger(nnx.Module):
    """Cells that are run both ways."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.lookup = nnx.Embed(31, 7, rngs=rngs)
        self.recurrent = nnx.List(
            nnx.Bidirectional(*(nnx.RNN(nnx.OptimizedLSTMCell(size, 5, rngs=rngs)) for _ in range(2))) for size in (7, 10, 10)
        )
        self.dense = nnx.List(nnx.Linear(10, size, rngs=rngs) for size in (10, 10, 6))

    def __call__(self, words: jax.Array) -> jax.Array:
        x = self.lookup(words)
        for layer in self.recurrent:
            x = layer(x)
        one, two, scores = self.dense
        return scores(jnp.tanh(two(jnp.tanh(one(x)))))


NNX = {"U-Net": NnxUNet, "BERT": NnxBert, "GPT-2": NnxGpt, "BiLSTM tagger": NnxTagger}


# Flax linen: layers are made where they are called, under automatic names; a model is a dict of its variables


def _linen_twin(module: linen.Module, batch: Any) -> Twin:
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


# Equinox: modules for one example


def _equinox_twin(model: Any) -> Twin:
    return Twin(model, lambda model, batch: jax.vmap(model)(batch))


class EqxEncoderLayer(eqx.Module):
    """A norm after each of attention and feed-forward."""

    attention: eqx.nn.MultiheadAttention
    attention_norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    output_norm: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array) -> None:
        biases = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key, **biases)
        self.attention_norm, self.output_norm = (eqx.nn.LayerNorm(WIDTH, eps=1e-12) for _ in range(2))
        self.up, self.down = eqx.nn.Linear(WIDTH, HIDDEN, key=key), eqx.nn.Linear(HIDDEN, WIDTH, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.vmap(self.attention_norm)(x + self.attention(x, x, x))
        y = jax.nn.gelu(jax.vmap(self.up)(x), approximate=False)
        return jax.vmap(self.output_norm)(x + jax.vmap(self.down)(y))


class EqxBert(eqx.Module):
    """Each position is looked up by itself."""

    words: eqx.nn.Embedding
    segments: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    layers: list[EqxEncoderLayer]
    pooler: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        sizes = (VOCABULARY, 2, POSITIONS)
        self.words, self.segments, self.positions = (eqx.nn.Embedding(size, WIDTH, key=key) for size in sizes)
        self.norm = eqx.nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = [EqxEncoderLayer(key) for _ in range(BLOCKS)]
        self.pooler = eqx.nn.Linear(WIDTH, WIDTH, key=key)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = jnp.arange(len(tokens))
        x = jax.vmap(self.words)(tokens) + jax.vmap(self.positions)(places) + jax.vmap(self.segments)(jnp.zeros_like(tokens))
        x = jax.vmap(self.norm)(x)
        for layer in self.layers:
            x = layer(x)
        return x, jnp.tanh(self.pooler(x[0]))


class EqxGptLayer(eqx.Module):
    """Linear layers in one list, norms in another."""

    norms: list[eqx.nn.LayerNorm]
    linears: list[eqx.nn.Linear]

    def __init__(self, key: jax.Array) -> None:
        sizes = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
        self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]
        self.linears = [eqx.nn.Linear(*size, key=key) for size in sizes]

    def __call__(self, x: jax.Array) -> jax.Array:
        attention_norm, norm = map(jax.vmap, self.norms)
        packed, project, up, down = map(jax.vmap, self.linears)
        x = x + project(causal(packed(attention_norm(x))))
        return x + down(jax.nn.gelu(up(norm(x))))


class EqxGpt(eqx.Module):
    """Tokens and places in embeddings of their own."""

    embeddings: list[eqx.nn.Embedding]
    layers: list[EqxGptLayer]
    norm: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array) -> None:
        self.embeddings = [eqx.nn.Embedding(size, WIDTH, key=key) for size in (VOCABULARY, POSITIONS)]
        self.layers = [EqxGptLayer(key) for _ in range(BLOCKS)]
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        words, places = map(jax.vmap, self.embeddings)
        x = words(tokens) + places(jnp.arange(len(tokens)))
        for layer in self.layers:
            x = layer(x)
        return jax.vmap(self.norm)(x)


class EqxTagger(eqx.Module):
    """Cells that are scanned over a sequence, forwards and backwards."""

    embed: eqx.nn.Embedding
    forward: list[eqx.nn.LSTMCell]
    backward: list[eqx.nn.LSTMCell]
    head: eqx.nn.Sequential

    def __init__(self, key: jax.Array) -> None:
        self.embed = eqx.nn.Embedding(31, 7, key=key)
        self.forward, self.backward = ([eqx.nn.LSTMCell(size, 5, key=key) for size in (7, 10, 10)] for _ in range(2))
        one, two, scores = (eqx.nn.Linear(10, size, key=key) for size in (10, 10, 6))
        tanh = eqx.nn.Lambda(jnp.tanh)
        self.head = eqx.nn.Sequential([one, tanh, two, tanh, scores])

    def __call__(self, words: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(words)
        for cells in zip(self.forward, self.backward, strict=True):
            x = jnp.concatenate([_scanned(cell, x, reverse=place == 1) for place, cell in enumerate(cells)], -1)
        return jax.vmap(self.head)(x)


def _scanned(cell: eqx.nn.LSTMCell, x: jax.Array, *, reverse: bool) -> jax.Array:
    def step(carry: tuple[jax.Array, jax.Array], each: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        carry = cell(each, carry)
        return carry, carry[0]

    return jax.lax.scan(step, (jnp.zeros(5), jnp.zeros(5)), x, reverse=reverse)[1]


EQUINOX: dict[str, Callable[[jax.Array], Any]] = {"BERT": EqxBert, "GPT-2": EqxGpt, "BiLSTM tagger": EqxTagger}


# Haiku: functions; a model is the dict of its parameters, beside that of its state where it has one


def _haiku_twin(function: Callable[[Any], Any], batch: Any) -> Twin:
    transformed = hk.without_apply_rng(hk.transform_with_state(function))
    params, state = transformed.init(jax.random.key(0), batch)

    def call(model: Any, batch: Any) -> Any:
        return transformed.apply(model["params"], model["state"], batch)[0]

    return Twin({"params": params, "state": state}, call, call)


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


HAIKU = {"BERT": haiku_bert, "GPT-2": haiku_gpt}


TWINS: dict[str, dict[str, Callable[[], Twin]]] = {
    "keras": {"U-Net": keras_unet, "BERT": keras_bert, "GPT-2": keras_gpt, "BiLSTM tagger": keras_tagger},
    "nnx": {name: lambda module=module: _nnx_twin(module(nnx.Rngs(0))) for name, module in NNX.items()},
    "linen": {name: lambda name=name: _linen_twin(LINEN[name](), example(name)) for name in LINEN},
    "equinox": {name: lambda make=make: _equinox_twin(make(jax.random.key(0))) for name, make in EQUINOX.items()},
    "haiku": {name: lambda name=name: _haiku_twin(HAIKU[name], example(name)) for name in HAIKU},
}
"""Framework -> model of torch_models -> its twin. Cells of linen are left out: tracing them takes too long."""


# There and back


def outcome(framework: str, name: str) -> dict[str, Any]:
    """unlike, there, back: how far outputs are from those of the torch model before, after, and in torch again, relative.

    agrees: what the reports of both loads say of it.
    """
    ours, batch = _torch_model(name, 1)
    twin = TWINS[framework][name]()
    turned = channels_last(batch)
    expected = _called(ours, batch)
    unlike = _apart(expected, _first(twin.call(twin.model, jnp.asarray(turned))))
    with tempfile.TemporaryDirectory() as directory:
        there = polyckpt.load(polyckpt.save(f"{directory}/there", ours, probe=batch), twin.model, apply=twin.apply)
        found = _first(twin.call(there.model, jnp.asarray(turned)))
        again, _ = _torch_model(name, 2)
        saved = polyckpt.save(f"{directory}/back", there.model, probe=turned, apply=twin.apply)
        back = polyckpt.load(saved, again)
    reports = [each.report.parity.agrees for each in (there, back) if each.report and each.report.parity]
    return {
        "unlike": unlike,
        "there": _apart(expected, found),
        "back": _apart(expected, _called(again, batch)),
        "agrees": len(reports) == 2 and all(reports),
    }


def example(name: str) -> jax.Array:
    """The batch of a model, with the channels last."""
    return jnp.asarray(channels_last(MODELS[name]()[1]))


def channels_last(batch: np.ndarray) -> np.ndarray:
    return np.moveaxis(batch, 1, -1) if batch.ndim == 4 else batch


def _torch_model(name: str, seed: int) -> tuple[nn.Module, np.ndarray]:
    model, batch = MODELS[name]()
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval(), batch


def _called(model: nn.Module, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        output = model(torch.from_numpy(batch))
    return getattr(output, "last_hidden_state", output).numpy()


def _first(outputs: Any) -> np.ndarray:
    return np.asarray(outputs[0] if isinstance(outputs, tuple | list) else outputs)


def _apart(expected: np.ndarray, found: np.ndarray) -> float:
    found = found if found.shape == expected.shape else np.moveaxis(found, -1, 1)
    assert expected.shape == found.shape
    return float(np.abs(expected - found).max() / np.abs(expected).max())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.stdout.write(json.dumps({name: {model: outcome(name, model) for model in twins} for name, twins in TWINS.items()}))
