"""Flax nnx: modules in lists, activations as functions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.conversion.twins import BLOCKS, HEADS, HIDDEN, POSITIONS, VOCABULARY, WIDTH, Twin, causal


def twin(model: nnx.Module) -> Twin:
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
