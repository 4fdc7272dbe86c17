"""What a Keras load must notice before it writes: layers, settings and states that are not those of the checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import pytest
from keras import layers

import polyckpt
from polyckpt import MismatchError, UnsupportedError
from tests.adapters.suite import check_description, run_python
from tests.adapters.test_keras_details import net, step, values


def array(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable))


def autoencoder(first: str, second: str, names: tuple[str | None, str | None] = (None, None)) -> Any:
    """The same class written with its lines in either order."""

    class Autoencoder(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            for attribute, name in zip((first, second), names, strict=True):
                setattr(self, attribute, layers.Dense(4, name=name))
            self.heads = {"a": [layers.Dense(4)], "b": [layers.Dense(4)]}
            self.scale = self.add_weight(shape=(4,), initializer="random_normal")

        def call(self, x: Any) -> Any:
            x = self.decoder(self.encoder(x))
            return self.heads["b"][0](self.heads["a"][0](x)) * self.scale

    model = Autoencoder()
    model(np.ones((1, 4), "float32"))
    return model


def test_layers_with_automatic_names_are_told_apart_by_their_attributes(tmp_path: Path) -> None:
    model, swapped = autoencoder("encoder", "decoder"), autoencoder("decoder", "encoder")
    path = polyckpt.save(tmp_path / "c", model)
    places = polyckpt.inspect(path).manifest.native["model"]["attributes"]
    assert places == {
        "autoencoder/variable": "scale",
        **{
            f"autoencoder/{layer}/{weight}": place
            for weight in ("kernel", "bias")
            for layer, place in [
                ("dense", "encoder"),
                ("dense_1", "decoder"),
                ("dense_2", "heads/a/0"),
                ("dense_3", "heads/b/0"),
            ]
        },
    }
    before = values(swapped)
    with pytest.raises(MismatchError, match="the attribute encoder, live object has the attribute decoder"):
        polyckpt.load(path, swapped)
    assert values(swapped) == before
    same = autoencoder("encoder", "decoder")
    polyckpt.load(path, same)
    assert values(same) == values(model)
    # With names of the user's own the order does not matter.
    named = autoencoder("encoder", "decoder", ("e", "d"))
    path = polyckpt.save(tmp_path / "d", named)
    other = autoencoder("decoder", "encoder", ("d", "e"))
    polyckpt.load(path, other)
    assert np.array_equal(array(other.encoder.kernel), array(named.encoder.kernel))


def test_a_layer_under_two_attributes(tmp_path: Path) -> None:
    class Tied(keras.Model):
        def __init__(self, attributes: tuple[str, str]) -> None:
            super().__init__()
            shared = layers.Dense(3)
            for attribute in attributes:
                setattr(self, attribute, shared)

        def call(self, x: Any) -> Any:
            return self.left(x)

    model, other = Tied(("left", "right")), Tied(("right", "left"))
    for each in (model, other):
        each(np.ones((1, 2), "float32"))
    polyckpt.load(polyckpt.save(tmp_path / "c", model), other)
    assert values(other) == values(model)


def test_hyperparameters_that_differ_are_named(tmp_path: Path) -> None:
    model = net(compiled=keras.optimizers.Adam(0.1, beta_1=0.8, clipnorm=1.0))
    step(model)
    path = polyckpt.save(tmp_path / "c", model)
    other = net(1, compiled=keras.optimizers.Adam(0.2, beta_1=0.9))
    with pytest.raises(MismatchError) as caught:
        polyckpt.load(path, other)
    found = {(problem.kind, problem.name, problem.stored, problem.live) for problem in caught.value.problems}
    # Not the learning rate, which is a variable and comes back.
    assert found == {("value", "beta_1", "0.8", "0.9"), ("value", "clipnorm", "1.0", "None")}
    assert not other.optimizer.built
    polyckpt.load(path, other, strict=False)
    assert values(other) == values(model)
    wrapped = keras.optimizers.LossScaleOptimizer
    scaled = net(compiled=wrapped(keras.optimizers.Adam(beta_2=0.5), dynamic_growth_steps=3))
    path = polyckpt.save(tmp_path / "d", scaled)
    with pytest.raises(MismatchError, match=r"inner_optimizer/beta_2: checkpoint has 0\.5, live object has 0\.75"):
        polyckpt.load(path, net(compiled=wrapped(keras.optimizers.Adam(beta_2=0.75), dynamic_growth_steps=3)))


def test_schedules_that_differ_are_named(tmp_path: Path) -> None:
    schedules = keras.optimizers.schedules

    class Warmup(schedules.LearningRateSchedule):
        """One without a config of its own, around another."""

        def __init__(self, after: Any) -> None:
            self.after = after

        def __call__(self, step: Any) -> Any:
            return self.after(step)

    def make(schedule: Any) -> Any:
        model = net(compiled=keras.optimizers.SGD(schedule))
        step(model)
        return model

    path = polyckpt.save(tmp_path / "c", make(Warmup(schedules.CosineDecay(0.1, 9))))
    polyckpt.load(path, make(Warmup(schedules.CosineDecay(0.1, 9))))
    with pytest.raises(MismatchError, match="learning_rate/after/decay_steps: checkpoint has 9, live object has 90"):
        polyckpt.load(path, make(Warmup(schedules.CosineDecay(0.1, 90))))
    with pytest.raises(MismatchError, match="learning_rate/class: checkpoint has 'Warmup', live object has 'CosineDecay'"):
        polyckpt.load(path, make(schedules.CosineDecay(0.1, 9)))
    with pytest.raises(MismatchError, match="learning_rate"):
        polyckpt.load(path, make(0.1))


def test_a_fresh_optimizer_is_built_for_what_the_saved_one_trained(tmp_path: Path) -> None:
    model = net()
    step(model)
    model.layers[0].trainable = False  # after the first step: the optimizer keeps its slots
    path = polyckpt.save(tmp_path / "c", model)
    other = net(1)
    other.layers[0].trainable = False
    polyckpt.load(path, other)
    assert values(other) == values(model)
    # An optimizer of some of the weights.
    head, rest = keras.optimizers.SGD(momentum=0.9), keras.optimizers.SGD(momentum=0.9)
    head.build(model.layers[-1].trainable_variables)
    head.apply([keras.ops.ones(variable.shape) for variable in model.layers[-1].trainable_variables])
    polyckpt.load(polyckpt.save(tmp_path / "d", model, head), other, rest)
    assert [array(variable).tobytes() for variable in rest.variables] == [array(each).tobytes() for each in head.variables]


def test_the_optimizer_of_a_model_among_the_extras(tmp_path: Path) -> None:
    critic, other, plain = net(), net(1), net(1, compiled=None)
    step(critic)
    path = polyckpt.save(tmp_path / "c", net(), extra={"critic": critic})
    polyckpt.load(path, net(), extra={"critic": other})
    assert values(other) == values(critic)
    polyckpt.load(path, net(), extra={"critic": plain})
    assert [array(weight).tobytes() for weight in plain.weights] == [array(weight).tobytes() for weight in critic.weights]
    path = polyckpt.save(tmp_path / "d", net(), extra={"critic": plain})
    with pytest.raises(MismatchError, match="missing    extra critic: optimizer"):
        polyckpt.load(path, net(), extra={"critic": other})


def test_a_normalization_works_with_the_statistics_that_were_loaded(tmp_path: Path) -> None:
    def make(scale: float) -> Any:
        model = keras.Sequential([keras.Input((3,)), layers.Normalization(), layers.Dense(1)])
        model.layers[0].adapt(np.arange(12, dtype="float32").reshape(4, 3) * scale)
        return model

    model, other, x = make(1), make(5), np.ones((2, 3), "float32")
    polyckpt.load(polyckpt.save(tmp_path / "c", model), other)
    assert np.array_equal(array(other(x)), array(model(x)))
    assert np.array_equal(array(other.layers[0].mean), array(model.layers[0].mean))


def test_assets_of_a_custom_layer_are_refused_by_name(tmp_path: Path) -> None:
    class Lookup(layers.Layer):
        def save_assets(self, directory: str) -> None:
            raise AssertionError("not called")

    model = keras.Sequential([keras.Input((3,)), Lookup(name="lookup")])
    with pytest.raises(UnsupportedError, match="lookup is a Lookup, which saves assets"):
        polyckpt.save(tmp_path / "c", model)


def test_axes_of_attention_layers(tmp_path: Path) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = layers.GroupQueryAttention(3, 4, 2)
            self.plain = layers.MultiHeadAttention(2, 5)
            self.wide = layers.MultiHeadAttention(2, 3, output_shape=(2, 3))

        def call(self, x: Any) -> Any:
            return self.wide(self.plain(self.grouped(x, x), x), x)

    model = Net()
    model(np.ones((1, 4, 6), "float32"))
    checkpoint = polyckpt.inspect(polyckpt.save(tmp_path / "c", model))
    check_description(checkpoint)
    found = {layer.path: layer for layer in checkpoint.manifest.model.layers}
    assert found["net/grouped_query_attention"].roles["query_kernel"].axes == "in (head group) hd"
    assert found["net/grouped_query_attention"].roles["value_kernel"].axes == "in head hd"
    assert found["net/multi_head_attention"].roles["output_kernel"].axes == "head hd out"
    # What has more axes than the table knows is described by its equations.
    assert "net/multi_head_attention_1" not in found
    assert found["net/multi_head_attention_1/attention_output"].config["equation"]


def test_random_states_of_another_backend_are_refused(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", keras.Sequential([keras.Input((3,)), layers.Dense(1)]))
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    script = f"""
import keras, polyckpt
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
polyckpt.load({str(path)!r}, model)
try:
    polyckpt.load({str(path)!r}, model, rng=True)
except polyckpt.MismatchError as error:
    assert "rng: backend: checkpoint has torch, live object has tensorflow" in str(error), error
else:
    raise AssertionError("loaded")
"""
    run_python("-c", script, env={"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"})
    polyckpt.load(path, model, rng=True)
