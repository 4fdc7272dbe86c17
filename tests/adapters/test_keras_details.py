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
    assert ("shape", "optimizer", "slots of sequential/dense/bias") in found
    assert not other.optimizer.built
    assert "float32[4, 5]" in str(caught.value) and "float32[4, 6]" in str(caught.value)
    assert [variable.numpy().tobytes() for variable in other.variables] == before
    restored = polyckpt.load(path, other, strict=False)
    assert {problem.kind for problem in restored.skipped} == {"shape"}
    assert int(other.optimizer.iterations) == 1
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
    table = keras.Variable(np.arange(6.0).reshape(2, 3))
    extra = {"generator": generator, "table": table, "ema": net(3, compiled=None), "tensor": table + 1}
    path = polyckpt.save(tmp_path / "c", model, extra=extra)
    expected = keras.ops.convert_to_numpy(keras.random.normal((3,), seed=generator))
    other, ema, zeros = keras.random.SeedGenerator(6), net(4, compiled=None), keras.Variable(np.zeros((2, 3)))
    restored = polyckpt.load(path, net(1), extra={"generator": other, "ema": ema, "table": zeros})
    assert np.array_equal(keras.ops.convert_to_numpy(keras.random.normal((3,), seed=other)), expected)
    assert restored.extra["table"] is zeros
    assert np.array_equal(keras.ops.convert_to_numpy(zeros), np.arange(6.0).reshape(2, 3))
    assert np.array_equal(keras.ops.convert_to_numpy(restored.extra["tensor"]), np.arange(6.0).reshape(2, 3) + 1)
    with pytest.raises(MismatchError, match=r"extra table: .*float64\[2, 3\].*float64\[2, 4\]"):
        polyckpt.load(path, net(1), extra={"table": keras.Variable(np.zeros((2, 4)))})
    assert values(ema) == values(extra["ema"])


def test_optimizers_that_a_model_holds_in_a_list_are_not_left_out_silently(tmp_path: Path) -> None:
    class Gan(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.critic = layers.Dense(3), layers.Dense(1)

        def compile(self, first: Any, second: Any) -> None:
            super().compile()
            self.first, self.others = first, [second]

        def call(self, x: Any) -> Any:
            return self.critic(self.generator(x))

    def make() -> Any:
        model = Gan()
        model(np.ones((1, 3)))
        model.compile(keras.optimizers.Adam(), keras.optimizers.SGD())
        return model

    model, other = make(), make()
    for each in (model, other):
        each.first.build(each.generator.trainable_variables)
        each.others[0].build(each.critic.trainable_variables)
    model.first.iterations.assign(3)
    model.others[0].iterations.assign(4)
    polyckpt.load(polyckpt.save(tmp_path / "c", model), other)
    assert [int(other.first.iterations), int(other.others[0].iterations)] == [3, 4]
    # The one that the compiled optimizer wraps is in it.
    wrapped = net(compiled=None)
    wrapped.inner = keras.optimizers.Adam()
    wrapped.compile(keras.optimizers.LossScaleOptimizer(wrapped.inner), "mse")
    path = polyckpt.save(tmp_path / "d", wrapped)
    assert "owned by the model" not in polyckpt.inspect(path).manifest.native["optimizer"]["state"]


def test_states_of_stateful_recurrent_layers_are_part_of_the_run(tmp_path: Path) -> None:
    def make() -> Any:
        model = keras.Sequential([keras.Input((4, 3), batch_size=2), layers.LSTM(5, stateful=True), layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    model, other, x = make(), make(), np.random.rand(2, 4, 3)
    model(x)
    path = polyckpt.save(tmp_path / "c", model)
    polyckpt.load(path, other, optimizer=False)
    assert not np.any(keras.ops.convert_to_numpy(other.layers[0].states[0]))
    polyckpt.load(path, other)
    assert np.array_equal(keras.ops.convert_to_numpy(other(x)), keras.ops.convert_to_numpy(model(x)))


def test_adapted_bin_boundaries_are_refused_by_name(tmp_path: Path) -> None:
    def make(**options: Any) -> Any:
        return keras.Sequential([keras.Input((3,)), layers.Discretization(**options), layers.Embedding(5, 2)])

    model = make(num_bins=4)
    model.layers[0].adapt(np.random.rand(50, 3).astype("float32"))
    with pytest.raises(UnsupportedError, match="bin_boundaries"):
        polyckpt.save(tmp_path / "c", model)
    polyckpt.save(tmp_path / "d", make(bin_boundaries=[0.1, 0.2]))


def test_layers_frozen_after_the_first_step(tmp_path: Path) -> None:
    model, other = net(), net(1)
    step(model)
    model.layers[0].trainable = False
    path = polyckpt.save(tmp_path / "c", model)
    assert "sequential/dense/kernel" in polyckpt.inspect(path).manifest.optimizer.groups[0].parameters  # type: ignore[union-attr]
    step(other)
    other.layers[0].trainable = False
    polyckpt.load(path, other)
    assert values(other) == values(model)


def test_a_fixed_name_beside_an_automatic_one(tmp_path: Path) -> None:
    def make() -> Any:
        cell = layers.RNN([layers.LSTMCell(3)], return_sequences=True)
        block = keras.Sequential([layers.Dense(2, name="dense")])
        return keras.Sequential([keras.Input((4, 3)), cell, layers.Bidirectional(layers.LSTM(2)), block, layers.Dense(1)])

    keras.backend.clear_session()  # counts names from zero again
    model = make()
    path = polyckpt.save(tmp_path / "c", model)
    other = make()
    polyckpt.load(path, other, rng=True)
    assert values(other) == values(model)
    assert list(polyckpt.inspect(path).weights) == list(polyckpt.inspect(polyckpt.save(tmp_path / "d", other)).weights)


def test_every_optimizer_of_a_model_is_saved(tmp_path: Path) -> None:
    class Adversarial(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.critic = layers.Dense(3), layers.Dense(1)
            self.critic_optimizer = keras.optimizers.RMSprop(0.1)

        def call(self, x: Any) -> Any:
            return self.critic(self.generator(x))

        def train_step(self, data: Any) -> dict[str, Any]:
            for layer, optimizer in ((self.critic, self.critic_optimizer), (self.generator, self.optimizer)):
                loss = self(data[0]).square().mean()
                self.zero_grad()
                loss.backward()
                variables = layer.trainable_variables
                with torch.no_grad():
                    optimizer.apply([variable.value.grad for variable in variables], variables)
            return {"loss": loss}

    def build(seed: int, compiled: bool = True) -> Any:
        keras.utils.set_random_seed(seed)
        model = Adversarial()
        model(np.zeros((1, 4), "float32"))
        if compiled:
            model.compile("adam", run_eagerly=True)
            model.optimizer.build(model.generator.trainable_variables)
        model.critic_optimizer.build(model.critic.trainable_variables)
        return model

    def train(model: Any) -> None:
        x = np.random.rand(6, 4).astype("float32")
        model.train_on_batch(x, x)

    def everything(model: Any) -> list[bytes]:
        return [*values(model), *(variable.numpy().tobytes() for variable in model.critic_optimizer.variables)]

    model, other = build(0), build(1)
    train(model)
    path = polyckpt.save(tmp_path / "c", model)
    train(model)
    restored = polyckpt.load(path, other)
    assert restored.optimizer is other.optimizer
    train(other)
    assert everything(other) == everything(model)
    bare = polyckpt.save(tmp_path / "bare", build(0, compiled=False))
    with pytest.raises(MismatchError, match="optimizer"):
        polyckpt.load(bare, other)
    polyckpt.load(bare, build(1, compiled=False))


def test_buffers_of_a_wrapped_torch_module(tmp_path: Path) -> None:
    def make(width: int = 3) -> Any:
        wrapped = layers.TorchModuleWrapper(torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width)))
        model = keras.Sequential([keras.Input((3,)), wrapped, layers.Dense(1)])
        model(np.ones((2, 3), "float32"))
        return model

    model, other = make(), make()
    model(np.random.rand(4, 3).astype("float32"), training=True)
    path = polyckpt.save(tmp_path / "c", model)
    polyckpt.load(path, other)
    mine, theirs = (each.layers[0].module.state_dict() for each in (model, other))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    with pytest.raises(MismatchError, match="running_mean"):
        polyckpt.load(path, make(4))
