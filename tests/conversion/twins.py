"""The models of torch_models, written again as people write them in other frameworks: other names, another structure, the
same function. Converts each there and back with no rules and prints JSON.

Run as: python -m tests.conversion.twins FRAMEWORK, with KERAS_BACKEND set to jax.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np
import torch
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


TWINS: dict[str, dict[str, Callable[[], Twin]]] = {
    "keras": {"U-Net": keras_unet, "BERT": keras_bert, "GPT-2": keras_gpt, "BiLSTM tagger": keras_tagger},
}
"""Framework -> model of torch_models -> its twin."""


# There and back


def outcome(framework: str, name: str) -> dict[str, Any]:
    """unlike, there, back: how far outputs are from those of the torch model before, after, and in torch again, relative.

    agrees: what the reports of both loads say of it.
    """
    ours, batch = _torch_model(name, 1)
    twin = TWINS[framework][name]()
    turned = np.moveaxis(batch, 1, -1) if name == "U-Net" and framework not in ("equinox",) else batch
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
    sys.stdout.write(json.dumps({name: outcome(sys.argv[1], name) for name in TWINS[sys.argv[1]]}))
