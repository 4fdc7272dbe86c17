"""What tracing Keras models tells, on the backend of this process: ``python -m tests.adapters.keras_tracing RESULTS``."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from polyckpt import UnsupportedError
from polyckpt.adapters.keras import KerasAdapter
from tests.adapters.checks import run_checks
from tests.adapters.traced import traced_by, values

traced = functools.partial(traced_by, KerasAdapter())


def array(tensor: Any) -> np.ndarray:
    return np.array(ops.convert_to_numpy(tensor))


def reference(model: Any, *arguments: Any) -> np.ndarray:
    return array(model(*map(ops.convert_to_tensor, arguments), training=False))


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and bool(np.allclose(found, expected, atol=1e-6))


def described(model: Any) -> list[str]:
    return [layer.path for layer in KerasAdapter().capture_model(model).layers]


def raises(match: str, function: Callable[..., Any], *arguments: Any) -> UnsupportedError:
    try:
        function(*arguments)
    except UnsupportedError as error:
        assert match in str(error), error
        return error
    raise AssertionError(f"nothing was raised: {match}")


def shuffled(model: Any) -> Any:
    """The model with random values in every weight."""
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(generator.uniform(0.5, 1.5, weight.shape))
    return model


def check_a_functional_model() -> None:
    image = keras.Input((5, 6, 2))
    conv = layers.Conv2D(3, 2, activation="relu", name="conv")
    inner = keras.Sequential([layers.Dropout(0.5, name="drop"), layers.Dense(4, name="wide")], name="inner")
    x = layers.Flatten()(layers.BatchNormalization(name="norm")(conv(image)))
    last = layers.Dense(2, name="last")
    model = shuffled(keras.Model(image, last(inner(x)), name="net"))
    x = values(7, 5, 6, 2)
    (output,), log = traced(model, x)
    assert same(output, reference(model, x)) and output.dtype == np.float32
    assert log.paths == ["conv", "norm", "drop", "inner/wide", "last"], log.paths
    assert log.paths == described(model)
    assert log.shapes == {"inner/wide": (4, 5, 3)}, log.shapes
    after_conv = reference(conv, x)
    assert same(log.outputs[0][1], after_conv)
    assert same(log.outputs[1][1], reference(model.get_layer("norm"), after_conv))
    assert same(log.outputs[-1][1], output)


def check_a_subclassed_model() -> None:
    class Block(layers.Layer):
        def __init__(self, units: int) -> None:
            super().__init__(name=f"block_of_{units}")
            self.dense = layers.Dense(units)
            self.scale = self.add_weight(shape=(units,), initializer="ones", name="scale")

        def call(self, x: Any) -> Any:
            return self.dense(self.dense(x)) * self.scale

    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = layers.Dense(2)
            self.block = Block(4)
            self.drop = layers.Dropout(0.5)

        def call(self, x: Any, y: Any, training: bool = True) -> Any:
            return {"z": self.head(self.drop(self.block(x), training=training)), "a": (y, None)}

    model = Net()
    x, y = values(3, 4), np.array([[3, 1]], np.int32)
    model(x, y)
    shuffled(model)
    outputs, log = traced(model, x, y)
    # As keras.tree orders them.
    assert [output.dtype.name for output in outputs] == ["int32", "float32"]
    assert np.array_equal(outputs[0], y)
    assert log.paths == ["net/block_of_4/dense"] * 2 + ["net/block_of_4", "dropout", "net/dense"], log.paths
    assert set(log.paths) == set(described(model))
    assert same(log.outputs[0][1], reference(model.block.dense, x))
    assert same(outputs[1], log.outputs[-1][1])


class Stateful(keras.Model):
    """It counts its calls, adds losses, and draws from every random state."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(3)
        self.norm = layers.BatchNormalization()
        self.recurrent = layers.LSTM(2, stateful=True)
        self.seed = keras.random.SeedGenerator(5)
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="calls")
        self.fails = False

    def call(self, x: Any) -> Any:
        self.calls.assign(self.calls + 1)
        x = self.norm(self.dense(x)) + keras.random.uniform((3,), seed=self.seed) + keras.random.uniform((3,))
        self.add_loss(ops.sum(x))
        x = x + random.random() + float(np.random.rand())
        if self.fails:
            raise RuntimeError("no such thing")
        return self.recurrent(x)


def check_afterwards_everything_is_as_before() -> None:
    keras.utils.set_random_seed(3)
    model = Stateful()
    x = values(2, 4, 5)
    model(x)
    keras.random.uniform((1,))
    for model.fails in (False, True):
        before = [array(variable).tobytes() for variable in model.variables]
        states = random.getstate(), np.random.get_state()[1].tolist()
        losses = model.losses
        function = keras.src.backend.numpy.reshape
        if model.fails:
            error = raises("no such thing", traced, model, x)
            assert "no such thing" in str(error.__cause__)
        else:
            assert traced(model, x)[1].paths == [
                "stateful/dense",
                "stateful/batch_normalization",
                "stateful/lstm/lstm_cell",
                "stateful",
            ]
        assert [array(variable).tobytes() for variable in model.variables] == before
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states
        assert len(losses) == len(model.losses) == 1 and all(a is b for a, b in zip(losses, model.losses, strict=True))
        assert keras.src.backend.numpy.reshape is function
        assert not any("call" in vars(layer) for layer in [model, model.dense, model.norm, model.recurrent])
    # The global generator, which the model draws from too, goes on where it was.
    first = array(keras.random.uniform((3,)))
    keras.utils.set_random_seed(3)
    again = Stateful()
    again(x)
    keras.random.uniform((1,))
    assert np.array_equal(array(keras.random.uniform((3,))), first)


def check_a_global_generator_that_was_not_in_use_is_not_made() -> None:
    from keras.src.backend.common import global_state
    from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR

    global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)

    class Noisy(layers.Layer):
        def call(self, x: Any) -> Any:
            return x + keras.random.uniform((3,))

    model = Noisy()
    model(values(2, 3))
    global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)
    traced(model, values(2, 3))
    assert global_state.get_global_attribute(GLOBAL_SEED_GENERATOR) is None


FLAT: dict[str, Callable[[Any], Any]] = {
    "flatten": lambda x: layers.Flatten()(x),
    "reshape": lambda x: layers.Reshape((-1,))(x),
    "operation": lambda x: ops.reshape(x, (-1, 60)),
    "layers between": lambda x: layers.Dropout(0.5)(layers.Activation("tanh")(layers.ReLU()(layers.Flatten()(x)))),
    "operations between": lambda x: ops.gelu(ops.reshape(x, (-1, 60))),
    "twice": lambda x: layers.Reshape((60,))(layers.Flatten()(x)),
    "another type": lambda x: layers.Activation("relu", dtype="float64")(layers.Flatten()(x)),
    "sum": lambda x: layers.Add()([layers.Flatten()(x), layers.Reshape((-1,))(layers.ReLU()(x))]),
}

MIXED: dict[str, Callable[[Any], Any]] = {
    "flipped": lambda x: ops.flip(layers.Flatten()(x), 1),
    "normalised": lambda x: layers.Softmax()(layers.Flatten()(x)),
    "added": lambda x: layers.Add()([layers.Flatten()(x), layers.Flatten()(layers.Permute((3, 1, 2))(x))]),
    "repeated": lambda x: ops.tile(layers.GlobalAveragePooling2D()(x), (1, 20)),
    "stacked": lambda x: ops.max(ops.stack([layers.Flatten()(x)] * 2, 1), 1),
}


def flattening(between: Callable[[Any], Any]) -> Any:
    image = keras.Input((5, 6, 2))
    x = layers.Conv2D(3, 2, name="conv")(image)
    return keras.Model(image, layers.Dense(2, name="dense")(between(x)))


def check_what_is_flattened_into_a_dense_layer() -> None:
    x = values(7, 5, 6, 2)
    for name, between in FLAT.items():
        model = flattening(between)
        (output,), log = traced(model, x)
        assert log.shapes == {"dense": (4, 5, 3)}, name
        assert same(output, reference(model, x)), name


def check_what_moves_or_mixes_features_is_not_called_flattened() -> None:
    for name, between in MIXED.items():
        assert traced(flattening(between), values(7, 5, 6, 2))[1].shapes == {}, name


def check_flattened_in_a_subclass() -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.drop, self.one, self.other = (
                layers.Flatten(),
                layers.Dropout(0.5),
                layers.Dense(4),
                layers.Dense(3),
            )

        def call(self, x: Any, training: bool = False) -> Any:
            return self.one(self.drop(self.flatten(x), training=training)) + ops.sum(
                self.other(ops.relu(ops.reshape(x, (7, -1))))
            )

    model = Net()
    x = values(7, 2, 3, 4)
    model(x)
    assert traced(model, x)[1].shapes == {"net/dense": (2, 3, 4), "net/dense_1": (2, 3, 4)}


def check_recurrent_layers_are_told_under_their_cells() -> None:
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(11, 3)(tokens)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True))(x)
    x = layers.RNN([layers.LSTMCell(3), layers.LSTMCell(2)], return_sequences=True)(x)
    x = layers.TimeDistributed(layers.Dense(6))(x)
    model = keras.Model(tokens, layers.TimeDistributed(layers.Dense(2))(x))
    batch = np.array([[3, 1, 10, 0, 7]])
    (output,), log = traced(model, batch)
    paths = described(model)
    assert log.paths == [path for path in paths if not path.endswith("/lstm_cell")], (log.paths, paths)
    assert [array.shape for _, array in log.outputs] == [(1, 5, 3), (1, 5, 4), (1, 5, 4), (1, 5, 2), (1, 5, 6), (1, 5, 2)]
    assert same(log.outputs[-1][1], output) and same(output, reference(model, batch))


def check_several_inputs_of_a_functional_model() -> None:
    left, right = keras.Input((3,)), keras.Input((2,), dtype="int32")
    x = layers.Concatenate()([layers.Dense(4)(left), layers.Flatten()(layers.Embedding(9, 4)(right))])
    model = keras.Model([left, right], [layers.Dense(2)(x), x])
    x, tokens = values(6, 3), np.arange(12).reshape(6, 2) % 9
    outputs, log = traced(model, x, tokens)
    again, _ = traced(model, [x, tokens])
    expected = model([x, tokens])
    assert all(same(found, array(wanted)) for found, wanted in zip(outputs, expected, strict=True))
    assert all(map(np.array_equal, outputs, again)) and len(log.paths) == 3


def check_attention_and_half_precision() -> None:
    sequence = keras.Input((4, 6))
    x = layers.MultiHeadAttention(2, 5, name="attention")(sequence, sequence, return_attention_scores=True)[0]
    model = keras.Model(sequence, layers.Dense(3, dtype="bfloat16", name="half")(x))
    (output,), log = traced(model, values(2, 4, 6))
    assert log.paths == ["attention", "half"] and output.dtype == log.outputs[1][1].dtype == np.float32
    assert log.outputs[0][1].shape == (2, 4, 6)
    assert same(output, array(ops.cast(model(values(2, 4, 6)), "float32")))


def check_a_batch_is_copied() -> None:
    class Writing(layers.Layer):
        def call(self, x: Any) -> Any:
            if keras.backend.backend() == "torch":
                x.zero_()
            return x * 0

    model, x = keras.Sequential([Writing()]), values(2, 3)
    model.build((2, 3))
    assert not traced(model, x)[0][0].any() and x.all()


def check_what_cannot_be_called_needs_a_function() -> None:
    x = values(4, 3)
    raises("pass apply=", traced, [ops.ones((3, 2))], x)
    outputs, _ = traced([ops.ones((3, 2))], x, apply=lambda model, batch: ops.matmul(batch, model[0]))
    assert same(outputs[0], x @ np.ones((3, 2), np.float32))
    raises("not built", traced, keras.Sequential([layers.Dense(2)]), x)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(2)])
    assert raises("model: it cannot be run on the batch", traced, model, x).__cause__ is not None
    (output,), log = traced(model, {"x": values(4, 5)}, apply=lambda net, batch: net(batch["x"]))
    assert same(output, reference(model, values(4, 5))) and len(log.paths) == 1


if __name__ == "__main__":
    run_checks(globals(), sys.argv[1])
