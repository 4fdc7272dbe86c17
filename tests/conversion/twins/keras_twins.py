"""Keras: functional models out of layers and small functions."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from tests.conversion.twins import BLOCKS, HEADS, HIDDEN, POSITIONS, VOCABULARY, WIDTH, Twin


def twin(model: Any) -> Twin:
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
    return twin(keras.Model(image, layers.Conv2D(4, 1, name="logits")(x)))


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
    return twin(keras.Model(tokens, [x, pooled]))


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
    return twin(keras.Model(tokens, layers.LayerNormalization(epsilon=1e-5)(x)))


def keras_tagger() -> Twin:
    words = keras.Input((9,), dtype="int32")
    x = layers.Embedding(31, 7)(words)
    for _ in range(3):
        x = layers.Bidirectional(layers.LSTM(5, return_sequences=True))(x)
    for _ in range(2):
        x = layers.Dense(10, activation="tanh")(x)
    return twin(keras.Model(words, layers.Dense(6)(x)))


KERAS = {"U-Net": keras_unet, "BERT": keras_bert, "GPT-2": keras_gpt, "BiLSTM tagger": keras_tagger}
