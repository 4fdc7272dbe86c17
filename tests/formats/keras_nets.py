"""Small Keras models that hold every kind of layer with unequal dimensions, and their training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # What a continued run is compared with must itself be reproducible.
    tf.config.experimental.enable_op_determinism()


def sequential() -> Any:
    return keras.Sequential(
        [
            keras.Input((7, 6, 2)),
            layers.Conv2D(3, (3, 2)),
            layers.BatchNormalization(),
            layers.Dropout(0.3, seed=5),
            layers.Flatten(),
            layers.Dense(4, activation="tanh"),
            layers.Dense(3),
        ]
    )


def functional() -> Any:
    """With a model in a model, and two inputs."""
    words, numbers = keras.Input((5,), dtype="int32"), keras.Input((7,))
    inner = keras.Sequential([layers.Dense(6), layers.BatchNormalization()])
    attended = layers.Embedding(11, 6)(words)
    attended = layers.MultiHeadAttention(2, 4, dropout=0.1, seed=3)(attended, attended)
    joined = layers.Concatenate()([layers.GlobalAveragePooling1D()(attended), inner(numbers)])
    return keras.Model([words, numbers], layers.Dense(3)(layers.LayerNormalization()(joined)))


@keras.saving.register_keras_serializable("formats")
class Net(keras.Model):
    """A class of the user's, whose attributes say where Keras keeps its variables."""

    def __init__(self, width: int = 5, **more: Any) -> None:
        super().__init__(**more)
        self.width = width
        self.embedding = layers.Embedding(11, 6)
        self.recurrent = [layers.LSTM(width, return_sequences=True), layers.Bidirectional(layers.GRU(4))]
        self.drop = layers.Dropout(0.2, seed=9)
        self.head = layers.Dense(3)

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.embedding(x)
        for layer in self.recurrent:
            x = layer(x)
        return self.head(self.drop(x, training=training))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


def subclassed() -> Any:
    net = Net()
    net(np.zeros((1, 5), "int32"))
    return net


NETS = {"sequential": sequential, "functional": functional, "subclassed": subclassed}
OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
    "schedule": lambda: keras.optimizers.AdamW(keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.7), weight_decay=0.1),
}


def make(kind: str, optimizer: str = "", seed: int = 0) -> Any:
    """A model, compiled where an optimizer is named."""
    keras.utils.set_random_seed(seed)
    model = NETS[kind]()
    if optimizer:
        model.compile(OPTIMIZERS[optimizer](), "mse", run_eagerly=keras.backend.backend() != "jax")
    return model


def batch(kind: str, seed: int) -> tuple[Any, np.ndarray]:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 11, (4, 5)).astype("int32")
    inputs = {
        "sequential": rng.random((4, 7, 6, 2), "float32"),
        "functional": [words, rng.random((4, 7), "float32")],
        "subclassed": words,
    }
    return inputs[kind], rng.random((4, 3), "float32")


def train(model: Any, kind: str, seeds: Sequence[int]) -> None:
    for seed in seeds:
        model.train_on_batch(*batch(kind, seed))


def values(model: Any) -> list[np.ndarray]:
    """All that the model and its optimizer hold, bit for bit."""
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.weights, *(optimizer.variables if optimizer else ())]
    return [np.array(keras.ops.convert_to_numpy(each)) for each in variables]


def same(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True)
    )
