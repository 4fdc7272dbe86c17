"""What files of Keras mean where the file alone does not say it: whose the optimizer's variables are, and conversions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx

os.environ["KERAS_BACKEND"] = "torch"
import keras
from keras import layers

import polyckpt
from polyckpt import MismatchError, UnsupportedError
from tests.formats.keras_nets import make, same, train, values

CASES = [("sequential", "adam"), ("functional", "momentum"), ("subclassed", "schedule")]


@pytest.fixture(scope="module", params=CASES, ids=[kind for kind, _ in CASES])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str, Any]:
    """A directory with the weights of a model after two steps, whole and in shards, its names, and itself."""
    kind, optimizer = request.param
    directory = tmp_path_factory.mktemp(kind)
    model = make(kind, optimizer)
    train(model, kind, range(2))
    model.save_weights(directory / "m.weights.h5")
    model.save_weights(directory / "m.weights.json", max_shard_size=4e-6 if kind == "sequential" else 1e-6)
    return directory, kind, optimizer, model


def test_a_group_of_variables_spans_shards(written: tuple[Path, str, str, Any]) -> None:
    directory = written[0]
    told = json.loads((directory / "m.weights.json").read_text())["weight_map"]
    assert any(len(files) > 1 for files in told.values() if isinstance(files, list))
    opened = polyckpt.open(directory / "m.weights.json")
    whole = polyckpt.open(directory / "m.weights.h5")
    assert opened.weights.keys() == whole.weights.keys()
    assert all(np.array_equal(opened.weights[name], value) for name, value in whole.weights.items())


def test_training_goes_on_as_after_load_weights(written: tuple[Path, str, str, Any]) -> None:
    directory, kind, optimizer, model = written
    theirs, ours = make(kind, optimizer, seed=2), make(kind, optimizer, seed=1)
    theirs.optimizer.build(theirs.trainable_variables)
    theirs.load_weights(directory / "m.weights.json")
    polyckpt.load(directory / "m.weights.json", ours)
    for each in (theirs, ours):
        train(each, kind, range(2, 4))
    assert same(values(theirs), values(ours)) and not same(values(ours), values(model))


def test_weights_alone_go_by_the_paths_of_their_datasets(written: tuple[Path, str, str, Any]) -> None:
    directory, kind, _, model = written
    opened = polyckpt.open(directory / "m.weights.h5")
    opened.verify()
    first = {"sequential": "layers/conv2d/vars/0", "functional": "layers/embedding/vars/0", "subclassed": "embedding/vars/0"}
    assert np.array_equal(opened.weights[first[kind]], values(model)[0])
    assert opened.manifest.model.layers == () and opened.manifest.optimizer is None
    count = len(model.optimizer.variables)
    assert opened.left_out == (
        f"optimizer: {count} variables: whose they are, only a live model and its optimizer tell (like=)",
    )
    told = polyckpt.open(directory / "m.weights.h5", like=(model, model.optimizer))
    assert told.manifest.optimizer.step == 2 and [layer.kind for layer in told.manifest.model.layers]


class TorchNet(torch.nn.Module):
    """The same as the one that `convertible` makes, in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, (3, 2))
        self.norm = torch.nn.BatchNorm2d(3, eps=1e-3, momentum=0.01)
        self.hidden = torch.nn.Linear(3, 4)
        self.out = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x.permute(0, 3, 1, 2))).mean((2, 3))
        return self.out(torch.tanh(self.hidden(x)))


class FlaxNet(nnx.Module):
    """The same in Flax."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 3, (3, 2), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(3, epsilon=1e-3, momentum=0.99, use_running_average=True, rngs=rngs)
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.out = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(nnx.tanh(self.hidden(self.norm(self.conv(x)).mean((1, 2)))))


def convertible() -> Any:
    model = keras.Sequential(
        [
            keras.Input((7, 6, 2)),
            layers.Conv2D(3, (3, 2)),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, activation="tanh"),
            layers.Dense(5),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
    return model


@pytest.fixture(scope="module")
def to_convert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, np.ndarray, np.ndarray]:
    """Files of a trained model in a directory, itself, inputs, and what it makes of them."""
    keras.utils.set_random_seed(0)
    model = convertible()
    rng = np.random.default_rng(0)
    inputs = rng.random((4, 7, 6, 2), "float32")
    for _ in range(3):
        model.train_on_batch(inputs, rng.random((4, 5), "float32"))
    directory = tmp_path_factory.mktemp("convert")
    model.save(directory / "m.keras")
    model.save_weights(directory / "m.weights.h5")
    return directory, model, inputs, np.asarray(keras.ops.convert_to_numpy(model(inputs, training=False)))


@pytest.mark.parametrize("file", ["m.keras", "m.weights.h5"])
def test_into_torch_with_the_optimizer(to_convert: tuple[Path, Any, np.ndarray, np.ndarray], file: str) -> None:
    directory, model, inputs, outputs = to_convert
    there = TorchNet()
    optimizer = torch.optim.Adam(there.parameters(), lr=0.5)
    more: dict[str, Any] = {} if file == "m.keras" else {"like": (model, model.optimizer)}
    restored = polyckpt.load(directory / file, there, optimizer, accept={"epsilon", "names and order"}, **more)
    assert restored.report is not None
    there.eval()
    assert np.allclose(there(torch.tensor(inputs)).detach().numpy(), outputs, rtol=1e-5, atol=1e-6)
    moment = optimizer.state[there.conv.weight]["exp_avg"].numpy()
    assert np.array_equal(moment, keras.ops.convert_to_numpy(model.optimizer._momentums[0]).transpose(3, 2, 0, 1))
    assert int(optimizer.state[there.out.bias]["step"]) == 3 and optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_into_flax(to_convert: tuple[Path, Any, np.ndarray, np.ndarray]) -> None:
    directory, _, inputs, outputs = to_convert
    there = FlaxNet()
    polyckpt.load(directory / "m.keras", there, accept={"names and order"})
    assert np.allclose(np.asarray(there(inputs)), outputs, rtol=1e-5, atol=1e-6)


def test_weights_alone_are_converted_only_with_a_model_that_describes_them(
    to_convert: tuple[Path, Any, np.ndarray, np.ndarray],
) -> None:
    with pytest.raises(MismatchError, match=r"not what the layers are: pass like= a live model"):
        polyckpt.load(to_convert[0] / "m.weights.h5", TorchNet())


@pytest.mark.parametrize(
    "build",
    [
        lambda seed: compiled(seed, keras.optimizers.Adam(0.01, use_ema=True, gradient_accumulation_steps=2)),
        lambda seed: compiled(seed, keras.optimizers.RMSprop(0.01, momentum=0.9, centered=True)),
    ],
    ids=["average and accumulation", "rmsprop"],
)
@pytest.mark.parametrize("file", ["m.keras", "m.weights.h5"])
def test_optimizers_that_hold_more(tmp_path: Path, build: Callable[[int], Any], file: str) -> None:
    model, live = build(0), build(1)
    train(model, "sequential", range(3))
    model.save(tmp_path / file) if file == "m.keras" else model.save_weights(tmp_path / file)
    polyckpt.load(tmp_path / file, live)
    assert same(values(model), values(live))
    if file == "m.keras":
        opened = polyckpt.open(tmp_path / file)
        assert opened.left_out == () and opened.manifest.optimizer.type.endswith(type(model.optimizer).__name__)


def compiled(seed: int, optimizer: Any) -> Any:
    model = make("sequential", seed=seed)
    model.compile(optimizer, "mse", run_eagerly=True)
    return model


def test_another_optimizer_than_the_one_of_the_file_is_refused(tmp_path: Path) -> None:
    model = compiled(0, keras.optimizers.Adam(0.01))
    model.save(tmp_path / "fresh.keras")
    for other, why in [
        (keras.optimizers.SGD(0.01), r"class: checkpoint has .*Adam, live object has .*SGD"),
        (keras.optimizers.AdamW(0.01), r"class: checkpoint has .*Adam, live object has .*AdamW"),
        (keras.optimizers.Adam(0.01, beta_1=0.8), r"beta_1: checkpoint has 0.9, live object has 0.8"),
    ]:
        live = compiled(1, other)
        before = values(live)
        with pytest.raises(MismatchError, match=why):
            polyckpt.load(tmp_path / "fresh.keras", live)
        assert same(before, values(live))
        polyckpt.load(tmp_path / "fresh.keras", live, False)
        assert same(values(model)[: len(model.weights)], values(live)[: len(live.weights)])
    # An optimizer that has made no step yet.
    live = compiled(1, keras.optimizers.Adam(0.3))
    polyckpt.load(tmp_path / "fresh.keras", live)
    assert float(keras.ops.convert_to_numpy(live.optimizer.learning_rate)) == pytest.approx(0.01)


def test_bfloat16_and_adapted_layers(tmp_path: Path) -> None:
    def build() -> Any:
        inner = layers.Normalization()
        model = keras.Sequential([keras.Input((6,)), inner, layers.Dense(5, dtype="bfloat16"), layers.Dense(3)])
        return model, inner

    model, inner = build()
    inner.adapt(np.random.default_rng(0).random((20, 6)))
    live, _ = build()
    for file in ("m.keras", "m.weights.h5"):
        model.save(tmp_path / file) if file == "m.keras" else model.save_weights(tmp_path / file)
        polyckpt.load(tmp_path / file, live)
        assert same(values(model), values(live))
        x = np.ones((2, 6), "float32")
        assert np.array_equal(model.predict(x, verbose=0), live.predict(x, verbose=0))


def test_what_is_written_beside_the_weights_is_named(tmp_path: Path) -> None:
    """A model that owns an optimizer of its own, as a GAN does."""
    model, live = TwoOptimizers(), TwoOptimizers()
    for each in (model, live):
        each(np.zeros((1, 4), "float32"))
        each.compile("sgd", "mse")
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(MismatchError, match="second_optimizer: checkpoint has absent"):
        polyckpt.load(tmp_path / "m.weights.h5", live)
    restored = polyckpt.load(tmp_path / "m.weights.h5", live, False)
    assert same(values(model), values(live))
    assert restored.checkpoint.left_out[0] == "second_optimizer: is no weight of the model, and its variables are not read"


class TwoOptimizers(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers.Dense(3), layers.Dense(2)
        self.second_optimizer = keras.optimizers.Adam(0.1)

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.second.build((None, 3))
        self.second_optimizer.build(self.second.trainable_variables)
        self.built = True


def test_a_class_that_nobody_registered_needs_the_live_model(tmp_path: Path) -> None:
    class Unknown(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x: Any) -> Any:
            return self.dense(x)

    model, live = Unknown(), Unknown()
    for each in (model, live):
        each(np.zeros((1, 4), "float32"))
    model.save(tmp_path / "m.keras")
    with pytest.raises(UnsupportedError, match=r"register_keras_serializable\(\)\), or pass like= a model that is built"):
        polyckpt.open(tmp_path / "m.keras")
    polyckpt.load(tmp_path / "m.keras", live)
    assert same(values(model), values(live))
