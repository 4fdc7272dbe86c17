"""Keras 3 runs, the same ones on every backend: every built-in optimizer, wrappers, and all ways to build a model."""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt


def _dense_net() -> Any:
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="tanh"),
            layers.Dropout(0.3),
            layers.BatchNormalization(),
            layers.Dense(3),
        ]
    )


def _functional_net() -> Any:
    import keras
    from keras import layers

    image = keras.Input((7, 6, 2))
    shared = layers.Conv2D(2, 3, padding="same", name="shared")
    x = shared(shared(image))
    x = layers.SeparableConv2D(4, 3)(x) + layers.Conv2D(4, 3, groups=2)(layers.PReLU(shared_axes=[1])(x))
    x = layers.GroupNormalization(2)(layers.DepthwiseConv2D(2)(layers.Conv2DTranspose(4, 2)(x)))
    inner = keras.Sequential([layers.Dense(5), layers.GaussianNoise(0.1)])
    x = layers.LayerNormalization()(inner(layers.Flatten()(x)))
    return keras.Model(image, layers.Dense(3)(x))


def _subclassed_net() -> Any:
    import keras
    from keras import layers

    class Scale(layers.Layer):
        """A custom layer with weights of several types, one without a name."""

        def build(self, shape: Any) -> None:
            self.factor = self.add_weight(shape=(shape[-1],), initializer="random_normal", name="factor")
            self.other = self.add_weight(shape=(shape[-1],), initializer="random_normal")
            self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="calls")

        def call(self, x: Any) -> Any:
            self.calls.assign(self.calls + 1)
            return x * self.factor + self.other

    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = layers.Embedding(11, 6)
            self.recurrent = [layers.LSTM(5, return_sequences=True), layers.Bidirectional(layers.GRU(3, return_sequences=True))]
            self.parts = {"attention": layers.MultiHeadAttention(2, 4, dropout=0.1), "scale": Scale()}
            self.head = layers.Dense(3)
            self.temperature = self.add_weight(shape=(1,), initializer="ones", name="temperature")

        def call(self, x: Any, training: bool = False) -> Any:
            x = self.embedding(x)
            for layer in self.recurrent:
                x = layer(x)
            x = self.parts["attention"](x, x, training=training)
            return self.head(self.parts["scale"](x)[:, -1]) * self.temperature

    net = Net()
    net(np.zeros((1, 4), "int32"))
    return net


def _half_net() -> Any:
    import keras
    from keras import layers

    return keras.Sequential([keras.Input((6,)), layers.Dense(5, dtype="bfloat16"), layers.Dense(3, dtype="mixed_bfloat16")])


def _mixed_net() -> Any:
    """Its optimizer is wrapped in a LossScaleOptimizer by `compile`."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return _dense_net()
    finally:
        keras.config.set_dtype_policy(before)


def _vector() -> np.ndarray:
    return (np.random.rand(8, 6) * random.random()).astype("float32")


def _image() -> np.ndarray:
    return np.random.rand(4, 7, 6, 2).astype("float32")


def _tokens() -> np.ndarray:
    return np.random.randint(0, 11, (4, 5)).astype("int32")


class KerasRun:
    """train_on_batch over random data."""

    def __init__(
        self,
        seed: int,
        optimizer: Callable[[], Any],
        net: Callable[[], Any] = _dense_net,
        data: Callable[[], np.ndarray] = _vector,
        eager: bool = True,
    ) -> None:
        import keras

        keras.utils.set_random_seed(seed)
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            # What a resume is compared with must itself be reproducible.
            tf.config.experimental.enable_op_determinism()
        self.keras, self.data = keras, data
        self.net = net()
        # Whichever is faster for a few steps; XLA on JAX, single operations elsewhere.
        jax = keras.backend.backend() == "jax"
        self.net.compile(optimizer(), "mse", run_eagerly=eager and not jax, jit_compile=jax)

    def step(self) -> float:
        x = self.data()
        self.net.reset_metrics()
        return float(self.net.train_on_batch(x, np.random.rand(len(x), 3).astype("float32")))

    def save(self, path: Path) -> None:
        polyckpt.save(path, self.net)

    def load(self, path: Path) -> None:
        polyckpt.load(path, self.net)

    def state(self) -> dict[str, Any]:
        arrays = {f"variable {i}": variable for i, variable in enumerate([*self.net.variables, *self.net.optimizer.variables])}
        return {
            **{name: np.asarray(self.keras.ops.convert_to_numpy(array)) for name, array in arrays.items()},
            "numpy": np.random.get_state()[1],
            "python": np.asarray(random.getstate()[1]),
        }


class ExtrasRun(KerasRun):
    """Custom steps with what lives beside a model: a generator, a second model and its optimizer, unseeded random calls."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, _optimizer("Adam", learning_rate=0.01))
        self.generator = self.keras.random.SeedGenerator(seed)
        self.critic = self.keras.Sequential([self.keras.Input((3,)), self.keras.layers.Dense(1)])
        self.second = self.keras.optimizers.SGD(0.1, momentum=0.9)
        self.second.build(self.critic.trainable_variables)
        self.mean = self.keras.metrics.Mean()

    def step(self) -> float:
        keras = self.keras
        noise = keras.random.normal((8, 6), seed=self.generator) + keras.random.uniform((8, 6))
        loss = float(self.net.train_on_batch(self.data() + keras.ops.convert_to_numpy(noise), np.random.rand(8, 3)))
        gradients = [keras.ops.ones(variable.shape) * loss for variable in self.critic.trainable_variables]
        self.second.apply(gradients, self.critic.trainable_variables)
        self.mean.update_state(loss)
        return loss

    def _extras(self) -> dict[str, Any]:
        return {"generator": self.generator, "critic": self.critic, "second": self.second, "mean": self.mean}

    def save(self, path: Path) -> None:
        polyckpt.save(path, self.net, extra=self._extras())

    def load(self, path: Path) -> None:
        polyckpt.load(path, self.net, extra=self._extras())

    def state(self) -> dict[str, Any]:
        others = [self.generator.state, *self.critic.variables, *self.second.variables, *self.mean.variables]
        extra = {f"extra {i}": self.keras.ops.convert_to_numpy(variable) for i, variable in enumerate(others)}
        return {**super().state(), **extra}


class FitRun(KerasRun):
    """`fit`, an epoch a step; what is saved is what a callback wrote at the end of its last epoch."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, _optimizer("AdamW", learning_rate=0.01), eager=False)
        self.x, self.y = np.random.rand(12, 6).astype("float32"), np.random.rand(12, 3).astype("float32")
        self.epoch = 0
        self.written: Path | None = None
        self.resume_from: Path | None = None

    def step(self) -> float:
        run = self

        class Checkpoint(self.keras.callbacks.Callback):  # type: ignore[name-defined, misc]
            def on_train_begin(self, logs: Any = None) -> None:
                # The first fit of a process draws from NumPy's state while it builds the model: exact is to load after that.
                if run.resume_from:
                    polyckpt.load(run.resume_from, self.model)
                    run.resume_from = None

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                run.written = Path(tempfile.mkdtemp()) / "epoch"
                polyckpt.save(run.written, self.model, epoch=epoch + 1, metrics=logs, extra={"data": [run.x, run.y]})

        # TensorFlow shuffles with a state inside its data pipeline that cannot be read.
        shuffle = self.keras.backend.backend() != "tensorflow"
        options = {"initial_epoch": self.epoch, "epochs": self.epoch + 1, "shuffle": shuffle}
        history = self.net.fit(self.x, self.y, batch_size=5, verbose=0, callbacks=[Checkpoint()], **options)
        self.epoch += 1
        return float(history.history["loss"][-1])

    def save(self, path: Path) -> None:
        shutil.copytree(self.written, path)

    def load(self, path: Path) -> None:
        restored = polyckpt.load(path, self.net)
        self.epoch, (self.x, self.y) = restored.epoch, restored.extra["data"]
        self.resume_from = path


def _optimizer(name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import keras

        return getattr(keras.optimizers, name)(**options)

    return make


def _scheduled() -> Any:
    import keras

    return keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 9), momentum=0.9)


def _scaled() -> Any:
    import keras

    return keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01, use_ema=True), initial_scale=1024.0, dynamic_growth_steps=2
    )


def _several() -> Any:
    import keras

    rules = {".*kernel": keras.optimizers.SGD(0.1, momentum=0.9)}
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.01), rules))


_LR = {"learning_rate": 0.01}

CASES: dict[str, Callable[[int], Any]] = {
    **{
        name: functools.partial(KerasRun, optimizer=_optimizer(kind, **options))
        for name, kind, options in [
            ("SGD", "SGD", _LR),
            ("SGD-nesterov", "SGD", {**_LR, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
            ("Adam-amsgrad", "Adam", {**_LR, "amsgrad": True}),
            ("AdamW", "AdamW", {**_LR, "clipnorm": 1.0}),
            ("Adamax", "Adamax", _LR),
            ("Nadam", "Nadam", _LR),
            ("RMSprop-centered-momentum", "RMSprop", {**_LR, "momentum": 0.5, "centered": True}),
            ("Adagrad", "Adagrad", _LR),
            ("Adadelta", "Adadelta", {"learning_rate": 1.0}),
            ("Lion", "Lion", _LR),
            ("Lamb", "Lamb", _LR),
            ("Adafactor", "Adafactor", _LR),
            ("Muon", "Muon", _LR),
            ("Ftrl", "Ftrl", _LR),
            ("ScheduleFreeAdamW", "ScheduleFreeAdamW", _LR),
            ("Adam-ema-accumulation", "Adam", {**_LR, "use_ema": True, "gradient_accumulation_steps": 2}),
        ]
    },
    "MultiOptimizer": functools.partial(KerasRun, optimizer=_several),
    "LossScaleOptimizer": functools.partial(KerasRun, optimizer=_scaled, eager=False),
    "schedule": functools.partial(KerasRun, optimizer=_scheduled),
    "compiled": functools.partial(KerasRun, optimizer=_optimizer("Adam", **_LR), eager=False),
    "functional": functools.partial(KerasRun, optimizer=_optimizer("Adam", **_LR), net=_functional_net, data=_image),
    "subclassed": functools.partial(KerasRun, optimizer=_optimizer("Adam", **_LR), net=_subclassed_net, data=_tokens),
    "bfloat16": functools.partial(KerasRun, optimizer=_optimizer("Adam", **_LR), net=_half_net),
    "mixed_float16": functools.partial(KerasRun, optimizer=_optimizer("Adam", **_LR), net=_mixed_net, eager=False),
    "extras": ExtrasRun,
    "fit": FitRun,
}
