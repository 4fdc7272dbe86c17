"""What tf.train.Checkpoint wrote of Keras models on TensorFlow; run by test_tensorflow_files.py in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers

import polyckpt
from polyckpt import CorruptError, MismatchError
from tests.formats.keras_nets import make, same, train, values

CASES = [("sequential", "adam"), ("functional", "momentum"), ("subclassed", "schedule")]


@pytest.fixture(scope="module", params=CASES, ids=[kind for kind, _ in CASES])
def trained(request: pytest.FixtureRequest) -> tuple[str, str, Any]:
    """The names of a model, and itself after two steps."""
    kind, optimizer = request.param
    model = make(kind, optimizer)
    train(model, kind, range(2))
    return kind, optimizer, model


Write = Callable[[Any, Path], str]
WRITERS: dict[str, Write] = {
    "both": lambda model, path: tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(path / "ckpt"),
    "other names": lambda model, path: tf.train.Checkpoint(net=model, opt=model.optimizer, step=tf.Variable(7)).write(
        path / "m"
    ),
    "a model in an object": lambda model, path: tf.train.Checkpoint(trainer=tf.train.Checkpoint(net=model)).write(path / "m"),
    "the model itself": lambda model, path: tf.train.Checkpoint(model).write(path / "m"),
}


@pytest.mark.parametrize("how", WRITERS)
def test_all_that_it_holds_comes_back(trained: tuple[str, str, Any], tmp_path: Path, how: str) -> None:
    kind, optimizer, model = trained
    path = WRITERS[how](model, tmp_path)
    live = make(kind, optimizer, seed=1)
    restored = polyckpt.load(path, live)
    assert same(values(model), values(live)) and restored.optimizer is live.optimizer
    assert restored.checkpoint.left_out == () and restored.skipped == ()
    if kind == "sequential":
        for place in (f"{path}.index", tmp_path):
            live = make(kind, optimizer, seed=2)
            polyckpt.load(place, live)
            assert same(values(model), values(live))


def test_training_goes_on_as_after_a_restore_of_tensorflow(trained: tuple[str, str, Any], tmp_path: Path) -> None:
    kind, optimizer, model = trained
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ckpt")
    ours, theirs = make(kind, optimizer, seed=1), make(kind, optimizer, seed=2)
    theirs.optimizer.build(theirs.trainable_variables)
    tf.train.Checkpoint(model=theirs, optimizer=theirs.optimizer).restore(path).assert_consumed()
    polyckpt.load(path, ours)
    for each in (ours, theirs):
        train(each, kind, range(2, 5))
    assert same(values(ours), values(theirs)) and not same(values(ours), values(model))


def test_a_directory_of_a_manager_opens_its_latest(tmp_path: Path) -> None:
    model = make("sequential", "adam")
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=model, optimizer=model.optimizer), tmp_path / "run", 2)
    after = {}
    for step in range(4):
        train(model, "sequential", [step])
        after[manager.save(checkpoint_number=step)] = values(model)
    assert len(list((tmp_path / "run").glob("*.index"))) == 2
    live = make("sequential", "adam", seed=1)
    # Moved elsewhere, as a whole.
    shutil.move(tmp_path / "run", tmp_path / "moved")
    polyckpt.load(tmp_path / "moved", live)
    assert same(after[str(tmp_path / "run" / "ckpt-3")], values(live))
    polyckpt.load(tmp_path / "moved" / "ckpt-2", live)
    assert same(after[str(tmp_path / "run" / "ckpt-2")], values(live))
    with pytest.raises(polyckpt.NotACheckpointError):
        polyckpt.load(tmp_path / "moved" / "ckpt-1", live)


def test_without_a_model_it_goes_by_paths(tmp_path: Path) -> None:
    model = make("sequential", "adam")
    train(model, "sequential", [0])
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ckpt")
    opened = polyckpt.open(path)
    opened.verify()
    kernel = opened.weights["model/_functional/_operations/1/_kernel"]
    assert kernel.tobytes() == values(model)[0].tobytes() and opened.manifest.producer.adapter == "keras"
    assert int(opened.weights["optimizer/_variables/0"]) == 1
    assert len(opened.weights) == len(values(model)) and opened.manifest.optimizer is None
    described = polyckpt.open(path, like=(model, model.optimizer))
    assert [layer.kind for layer in described.manifest.model.layers] == ["conv", "batch_norm", "dropout", "linear", "linear"]
    assert described.manifest.optimizer.family == "adam" and described.manifest.optimizer.step == 1
    with pytest.raises(MismatchError, match=r"its variables are not those of `like`"):
        polyckpt.open(path, like=make("functional"))


def test_variables_that_are_no_layers(tmp_path: Path) -> None:
    variables = {"a": tf.Variable(np.arange(6, dtype="float32").reshape(2, 3)), "b.c/d": tf.Variable([1, 2], dtype="int64")}
    path = tf.train.Checkpoint(some=variables, half=tf.Variable([1.5, 2], dtype="bfloat16")).write(tmp_path / "m")
    found = polyckpt.open(path).weights
    assert np.array_equal(found["some/a"], variables["a"].numpy()) and found["half"].dtype.name == "bfloat16"
    assert np.array_equal(found["some/b..c.Sd"], [1, 2]) and len(found) == 3


def test_a_file_of_a_saver_has_names(tmp_path: Path) -> None:
    saver = tf.compat.v1.train.Saver({"w": tf.Variable(np.arange(6.0).reshape(3, 2)), "b/x": tf.Variable([True])})
    path = saver.save(None, str(tmp_path / "model.ckpt"), global_step=7)
    for each in (path, tmp_path):
        found = polyckpt.open(each).weights
        assert found.keys() == {"w", "b/x"} and np.array_equal(found["w"], np.arange(6.0).reshape(3, 2))


def test_of_two_models_the_one_that_fits_and_of_two_alike_none(tmp_path: Path) -> None:
    def build(width: int) -> Any:
        return keras.Sequential([keras.Input((4,)), layers.Dense(width), layers.Dense(2)])

    student, teacher = build(3), build(5)
    path = tf.train.Checkpoint(student=student, teacher=teacher).write(tmp_path / "m")
    live = build(5)
    polyckpt.load(path, live)
    assert same(values(teacher), values(live))
    path = tf.train.Checkpoint(student=build(3), teacher=build(3)).write(tmp_path / "n")
    with pytest.raises(MismatchError, match="which is meant is not known: student, teacher"):
        polyckpt.load(path, build(3))
    with pytest.raises(MismatchError, match=r"kernel: checkpoint has absent, live object has float32\[4, 7\]"):
        polyckpt.load(path, build(7))


def test_into_torch_with_the_optimizer(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5,)), layers.Dense(7, activation="tanh"), layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x = np.random.default_rng(0).random((4, 5), "float32")
    for _ in range(3):
        model.train_on_batch(x, np.ones((4, 3), "float32"))
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ckpt")
    there = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    optimizer = torch.optim.Adam(there.parameters(), lr=0.5)
    accepted = {"epsilon", "names and order"}
    polyckpt.load(path, there, optimizer, like=(model, model.optimizer), accept=accepted)
    assert np.allclose(there(torch.tensor(x)).detach().numpy(), model(x), rtol=1e-5, atol=1e-6)
    moment = optimizer.state[there[0].weight]["exp_avg"].numpy()
    assert np.array_equal(moment.T, model.optimizer._momentums[0].numpy())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_under_mixed_precision_the_loss_scale_comes_along(tmp_path: Path) -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, live = make("sequential", "adam"), make("sequential", "adam", seed=1)
    finally:
        keras.config.set_dtype_policy(before)
    train(model, "sequential", range(2))
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ckpt")
    polyckpt.load(path, live)
    assert same(values(model), values(live))


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    """TensorFlow keeps checksums of its own."""
    model = keras.Sequential([keras.Input((5,)), layers.Dense(7), layers.Dense(3)])
    model.compile("adam", "mse")
    path = Path(tf.train.Checkpoint(model=model).write(tmp_path / "m"))
    expected = dict(polyckpt.open(path).weights)
    damaged = 0
    for file in tmp_path.glob("m.*"):
        data = file.read_bytes()
        for offset in range(3, len(data), max(1, len(data) // 40)):
            for bad in (data[:offset] + bytes([data[offset] ^ 8]) + data[offset + 1 :], data[:offset]):
                file.write_bytes(bad)
                try:
                    opened = polyckpt.open(path)
                    opened.verify()
                    found = dict(opened.weights)
                except CorruptError:
                    damaged += 1
                else:
                    assert found.keys() == expected.keys()
                    assert all(np.array_equal(value, expected[name]) for name, value in found.items())
        file.write_bytes(data)
    assert damaged > 100
    (tmp_path / "m.data-00000-of-00001").unlink()
    with pytest.raises(polyckpt.NotACheckpointError):
        polyckpt.open(path)
