"""What Keras users run into beside a plain resume. Nothing here depends on the backend, so one is enough."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import pytest
import torch
from keras import layers

import polyckpt
from polyckpt import MismatchError, UnsupportedError


def net(seed: int = 0, wide: int = 5, compiled: Any = "adam") -> Any:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(wide), layers.Dropout(0.5), layers.BatchNormalization(), layers.Dense(2)]
    )
    if compiled:
        model.compile(compiled, "mse", run_eagerly=True)
    return model


def step(model: Any) -> float:
    return float(model.train_on_batch(np.random.rand(6, 4), np.random.rand(6, 2)))


def values(model: Any) -> list[bytes]:
    optimizer = getattr(model, "optimizer", None)
    everything = [*model.variables, *(optimizer.variables if optimizer else [])]
    return [keras.ops.convert_to_numpy(variable).tobytes() for variable in everything]


def test_backend() -> None:
    assert keras.backend.backend() == "torch"


def test_names_do_not_depend_on_what_else_the_process_built(tmp_path: Path) -> None:
    model = net()
    for _ in range(3):
        net()
    later = net()
    assert later.layers[0].name != model.layers[0].name
    path = polyckpt.save(tmp_path / "c", model)
    assert list(polyckpt.inspect(path).weights) == list(polyckpt.inspect(polyckpt.save(tmp_path / "d", later)).weights)
    assert "sequential/dense_1/kernel" in polyckpt.inspect(path).weights
    other = net(1)
    polyckpt.load(path, other)
    assert values(other) == values(model)


def test_names_that_the_user_chose_must_agree(tmp_path: Path) -> None:
    def named(first: str, second: str) -> Any:
        return keras.Sequential([keras.Input((3,)), layers.Dense(3, name=first), layers.Dense(3, name=second)])

    path = polyckpt.save(tmp_path / "c", named("query", "key"))
    swapped = named("key", "query")
    before = values(swapped)
    polyckpt.load(path, swapped)  # by name, not by place
    assert np.array_equal(swapped.layers[1].kernel.numpy(), polyckpt.inspect(path).weights["sequential/query/kernel"])
    assert values(swapped) != before
    other = named("query", "value")
    before = values(other)
    with pytest.raises(MismatchError) as caught:
        polyckpt.load(path, other)
    found = {(problem.kind, problem.name) for problem in caught.value.problems}
    assert {("missing", "sequential/value/kernel"), ("unexpected", "sequential/key/bias")} <= found
    assert values(other) == before


def test_a_mismatch_names_every_entry_and_writes_nothing(tmp_path: Path) -> None:
    model = net()
    step(model)
    path = polyckpt.save(tmp_path / "c", model)
    other = net(1, wide=6)
    before = [variable.numpy().tobytes() for variable in other.variables]
    with pytest.raises(MismatchError) as caught:
        polyckpt.load(path, other)
    found = {(problem.kind, problem.section, problem.name) for problem in caught.value.problems}
    assert ("shape", "weights", "sequential/dense/kernel") in found
    assert ("shape", "optimizer", "momentums of sequential/dense/bias") in found
    assert "float32[4, 5]" in str(caught.value) and "float32[4, 6]" in str(caught.value)
    assert [variable.numpy().tobytes() for variable in other.variables] == before
    restored = polyckpt.load(path, other, strict=False)
    assert {problem.kind for problem in restored.skipped} == {"shape"}
    assert np.array_equal(other.layers[-1].bias.numpy(), model.layers[-1].bias.numpy())


def test_weights_alone(tmp_path: Path) -> None:
    model = net()
    step(model)
    path = polyckpt.save(tmp_path / "c", model, epoch=2)
    plain = net(1, compiled=None)
    np.random.seed(3)
    state = np.random.get_state()[1].tolist()
    seeds = [variable.numpy().tolist() for variable in plain.variables if "seed" in variable.path]
    restored = polyckpt.load(path, plain)
    assert restored.epoch == 2 and restored.optimizer is None
    assert np.random.get_state()[1].tolist() == state
    assert [variable.numpy().tolist() for variable in plain.variables if "seed" in variable.path] == seeds
    compiled = net(1)
    step(compiled)
    slots = [variable.numpy().tobytes() for variable in compiled.optimizer.variables]
    polyckpt.load(path, compiled, optimizer=False)
    assert [variable.numpy().tobytes() for variable in compiled.optimizer.variables] == slots
    assert np.array_equal(compiled.layers[0].kernel.numpy(), model.layers[0].kernel.numpy())
    bare = polyckpt.save(tmp_path / "bare", model, optimizer=False)
    assert polyckpt.inspect(bare).manifest.optimizer is None
    with pytest.raises(MismatchError, match="optimizer=False"):
        polyckpt.load(bare, compiled)


def test_what_is_not_built_yet_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"dense.* is not built"):
        polyckpt.save(tmp_path / "c", keras.Sequential([layers.Dense(3)]))
    assert not (tmp_path / "c").exists()
    path = polyckpt.save(tmp_path / "d", net())
    with pytest.raises(UnsupportedError, match="not built"):
        polyckpt.load(path, keras.Sequential([layers.Dense(3)]))


def test_an_optimizer_without_slots_is_restored_only_into_one_without(tmp_path: Path) -> None:
    fresh = net()
    path = polyckpt.save(tmp_path / "c", fresh)
    assert not fresh.optimizer.built
    polyckpt.load(path, net(1))
    trained = net(1)
    step(trained)
    with pytest.raises(MismatchError, match="momentums of"):
        polyckpt.load(path, trained)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = net()
    step(model)
    path = polyckpt.save(tmp_path / "c", model)
    with pytest.raises(MismatchError, match=r"Adam.*RMSprop"):
        polyckpt.load(path, net(1, compiled="rmsprop"))


def test_a_learning_rate_that_a_callback_changed(tmp_path: Path) -> None:
    model = net()
    step(model)
    model.optimizer.learning_rate = 0.125
    path = polyckpt.save(tmp_path / "c", model)
    other = net(1)
    assert polyckpt.load(path, other).lr == 0.125
    assert float(other.optimizer.learning_rate) == 0.125


def test_a_shared_layer_is_stored_once(tmp_path: Path) -> None:
    def shared() -> Any:
        inputs, layer = keras.Input((3,)), layers.Dense(3)
        return keras.Model(inputs, layers.Dense(1)(layer(layer(inputs))))

    path = polyckpt.save(tmp_path / "c", shared())
    assert sorted(polyckpt.inspect(path).weights) == ["dense/bias", "dense/kernel", "dense_1/bias", "dense_1/kernel"]
    polyckpt.load(path, shared())


def test_quantized_weights_come_back(tmp_path: Path) -> None:
    model, other = net(compiled=None), net(1, compiled=None)
    model.quantize("int8")
    other.quantize("int8")
    path = polyckpt.save(tmp_path / "c", model)
    assert polyckpt.inspect(path).weights["sequential/dense/kernel"].dtype == np.int8
    polyckpt.load(path, other)
    assert [weight.numpy().tobytes() for weight in other.weights] == [weight.numpy().tobytes() for weight in model.weights]


def test_a_torch_optimizer_over_a_keras_model(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        model = net(seed, compiled=None)
        return model, torch.optim.AdamW(model.parameters())

    def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(3, 4), training=True).square().mean().backward()
        optimizer.step()

    model, optimizer = make(0)
    train(model, optimizer)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    assert "exp_avg/sequential/dense/kernel" in polyckpt.inspect(path).optimizer
    train(model, optimizer)
    other, second = make(1)
    train(other, second)
    polyckpt.load(path, other, second)
    train(other, second)
    assert values(other) == values(model)


def test_a_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    layer = layers.IntegerLookup(vocabulary=[1, 2, 3])
    model = keras.Sequential([keras.Input((1,), dtype="int64"), layer, layers.Embedding(5, 2)])
    with pytest.raises(UnsupportedError, match="vocabulary"):
        polyckpt.save(tmp_path / "c", model)


def test_extras_of_keras(tmp_path: Path) -> None:
    model, generator = net(), keras.random.SeedGenerator(5)
    extra = {"generator": generator, "table": keras.Variable(np.arange(6.0).reshape(2, 3)), "ema": net(3, compiled=None)}
    path = polyckpt.save(tmp_path / "c", model, extra=extra)
    expected = keras.ops.convert_to_numpy(keras.random.normal((3,), seed=generator))
    other, ema = keras.random.SeedGenerator(6), net(4, compiled=None)
    restored = polyckpt.load(path, net(1), extra={"generator": other, "ema": ema})
    assert np.array_equal(keras.ops.convert_to_numpy(keras.random.normal((3,), seed=other)), expected)
    assert np.array_equal(keras.ops.convert_to_numpy(restored.extra["table"]), np.arange(6.0).reshape(2, 3))
    assert values(ema) == values(extra["ema"])
