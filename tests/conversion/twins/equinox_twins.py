"""Equinox: modules for one example, with the channels first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.conversion.twins import BLOCKS, HEADS, HIDDEN, POSITIONS, VOCABULARY, WIDTH, Twin, causal


def twin(model: Any) -> Twin:
    """Of a module, or of one with its state."""

    def call(model: Any, batch: jax.Array) -> Any:
        module, state = model
        return jax.vmap(lambda example: eqx.nn.inference_mode(module)(example, state)[0])(batch)

    if isinstance(model, tuple):
        return Twin(model, call, call, channels_last=False)
    return Twin(model, lambda model, batch: jax.vmap(model)(batch))


class EqxConv(eqx.Module):
    """A convolution with its norm."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm

    def __init__(self, inputs: int, outputs: int, key: jax.Array) -> None:
        self.conv = eqx.nn.Conv2d(inputs, outputs, 3, padding=1, key=key)
        self.norm = eqx.nn.BatchNorm(outputs, axis_name="batch", eps=1e-5, mode="ema")

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        x, state = self.norm(self.conv(x), state)
        return jax.nn.relu(x), state


class EqxUNet(eqx.Module):
    """Lists by the kind of what is in them."""

    upsample: list[eqx.nn.ConvTranspose2d]
    convs: list[EqxConv]
    head: eqx.nn.Conv2d

    def __init__(self, key: jax.Array) -> None:
        sizes = ((3, 6), (6, 6), (6, 10), (10, 10), (10, 14), (14, 14), (20, 10), (10, 10), (12, 6), (6, 6))
        self.upsample = [eqx.nn.ConvTranspose2d(*size, 2, stride=2, key=key) for size in ((14, 10), (10, 6))]
        self.convs = [EqxConv(*size, key) for size in sizes]
        self.head = eqx.nn.Conv2d(6, 4, 1, key=key)

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        skips: list[jax.Array] = []
        for number, conv in enumerate(self.convs):
            if number in (2, 4):
                skips.append(x)
                x = eqx.nn.MaxPool2d(2, 2)(x)
            if number in (6, 8):
                x = jnp.concatenate([skips.pop(), self.upsample[(number - 6) // 2](x)])
            x, state = conv(x, state)
        return self.head(x), state


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


EQUINOX: dict[str, Callable[[jax.Array], Any]] = {
    "U-Net": eqx.nn.make_with_state(EqxUNet),
    "BERT": EqxBert,
    "GPT-2": EqxGpt,
    "BiLSTM tagger": EqxTagger,
}
