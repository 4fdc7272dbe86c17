"""What Keras wrote, read and continued, and what it reads of ours, on one backend; run by test_keras_files.py in a process.

The continued run is compared with that of Keras's own loader, bit for bit.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import polyckpt
from polyckpt.errors import MismatchError
from tests.formats.keras_nets import batch, make, same, train, values
from tests.sealing import REPOSITORY

CASES = [("sequential", "adam"), ("functional", "momentum"), ("subclassed", "schedule")]
FILES = ["m.keras", "m.weights.h5", "m.weights.json"]


@functools.cache
def trained(kind: str, optimizer: str) -> Any:
    """A model after two steps."""
    model = make(kind, optimizer)
    train(model, kind, range(2))
    return model


@pytest.fixture(scope="module", params=CASES, ids=[kind for kind, _ in CASES])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str, Any]:
    """A directory with a trained model in every format that Keras writes, its names, and itself."""
    kind, optimizer = request.param
    directory = tmp_path_factory.mktemp(kind)
    model = trained(kind, optimizer)
    model.save(directory / "m.keras")
    model.save_weights(directory / "m.weights.h5")
    # Of a size that a group of variables does not fit into.
    model.save_weights(directory / "m.weights.json", max_shard_size=4e-6 if kind == "sequential" else 1e-6)
    model.save(directory / "folder", zipped=False)
    return directory, kind, optimizer, model


@pytest.mark.parametrize("file", [*FILES, "folder"])
def test_all_that_it_holds_comes_back(written: tuple[Path, str, str, Any], file: str) -> None:
    directory, kind, optimizer, model = written
    live = make(kind, optimizer, seed=1)
    assert not same(values(model), values(live))
    restored = polyckpt.load(directory / file, live)
    assert same(values(model), values(live))
    assert restored.model is live and restored.optimizer is live.optimizer and restored.skipped == ()
    assert restored.checkpoint is not None and restored.checkpoint.left_out == ()


def test_training_goes_on_as_after_load_model(written: tuple[Path, str, str, Any]) -> None:
    directory, kind, optimizer, model = written
    theirs = keras.saving.load_model(directory / "m.keras")
    ours = make(kind, optimizer, seed=1)
    polyckpt.load(directory / "m.keras", ours)
    for each in (theirs, ours):
        train(each, kind, range(2, 5))
    assert same(values(theirs), values(ours)) and not same(values(ours), values(model))


@pytest.mark.parametrize("made_by_keras", ["saved", "live"])
def test_a_model_that_keras_made_of_the_configuration_is_the_same(
    written: tuple[Path, str, str, Any], made_by_keras: str, tmp_path: Path
) -> None:
    """Its variables have other paths: without the names of the models around their layers."""
    directory, kind, optimizer, _ = written
    ours, theirs = make(kind, optimizer, seed=1), keras.saving.load_model(directory / "m.keras")
    train(ours, kind, [7])
    train(theirs, kind, [8])
    source, target = (theirs, ours) if made_by_keras == "saved" else (ours, theirs)
    assert not same(values(source), values(target))
    path = polyckpt.save(tmp_path / "run", source)
    polyckpt.load(path, target)
    for each in (source, target):
        train(each, kind, range(2, 4))
    assert same(values(source), values(target))


def test_a_model_of_other_names_is_another_one(tmp_path: Path) -> None:
    def net(*names: str, around: bool) -> Any:
        dense = [keras.layers.Dense(4, name=name) for name in names]
        if around:
            return keras.Sequential([keras.Input((4,)), *dense])
        x = inputs = keras.Input((4,))
        for layer in dense:
            x = layer(x)
        return keras.Model(inputs, x)

    path = polyckpt.save(tmp_path / "run", net("first", "second", around=True))
    polyckpt.load(path, net("first", "second", around=False))
    for names in (("second", "first"), ("first", "third")):
        with pytest.raises(MismatchError):
            polyckpt.load(path, net(*names, around=False))


def test_the_model_is_described_by_the_configuration(written: tuple[Path, str, str, Any]) -> None:
    directory, kind, _, model = written
    opened = polyckpt.open(directory / "m.keras")
    opened.verify()
    kinds = [layer.kind for layer in opened.manifest.model.layers]
    expected = {
        "sequential": ["conv", "batch_norm", "dropout", "linear", "linear"],
        "functional": ["embedding", "attention", "dropout", "linear", "batch_norm", "layer_norm", "linear"],
        "subclassed": ["embedding", "lstm", "gru", "gru", "dropout", "linear"],
    }[kind]
    # What is made in the lines of a class has the order of the lines; the rest that of its execution.
    order = "definition" if kind == "subclassed" else "execution"
    assert opened.manifest.model.order == order
    assert sorted(kinds) == sorted(expected) and (kind == "functional" or kinds == expected)
    assert same([opened.weights[name] for name in opened.weights], values(model)[: len(model.weights)])
    assert opened.manifest.optimizer.family == {"functional": "sgd"}.get(kind, "adam")
    assert opened.manifest.optimizer.step == 2 and len(opened.optimizer) > 0
    assert opened.left_out == ()


@pytest.mark.parametrize("weights_only", [False, True])
def test_what_the_callback_of_keras_wrote(tmp_path: Path, weights_only: bool) -> None:
    model = make("sequential", "adam")
    inputs, targets = batch("sequential", 0)
    path = tmp_path / ("e-{epoch}.weights.h5" if weights_only else "e-{epoch}.keras")
    saving = keras.callbacks.ModelCheckpoint(path, save_weights_only=weights_only)
    model.fit(inputs, targets, batch_size=2, epochs=2, verbose=0, callbacks=[saving])
    after = values(model)
    files = sorted(tmp_path.iterdir())
    assert [each.name.split(".")[0] for each in files] == ["e-1", "e-2"]
    live = make("sequential", "adam", seed=1)
    polyckpt.load(files[0], live)
    assert not same(after, values(live))
    # Once more into a model that has been trained, and whose optimizer is built.
    polyckpt.load(files[1], live)
    assert same(after, values(live))
    # Nobody is kept from writing to a file that was read.
    restored = polyckpt.load(files[1], live)
    train(live, "sequential", [7])
    live.save_weights(files[1]) if weights_only else live.save(files[1])
    with pytest.raises(polyckpt.CorruptError, match="was written to after it had been opened"):
        restored.checkpoint.weights[next(iter(restored.checkpoint.weights))]
    again = make("sequential", "adam", seed=2)
    polyckpt.load(files[1], again)
    assert same(values(live), values(again))


def test_automatic_names_of_another_process_do_not_matter(written: tuple[Path, str, str, Any], tmp_path: Path) -> None:
    directory, kind, optimizer, model = written
    other = make(kind, optimizer, seed=3)
    assert {each.path for each in other.weights} != {each.path for each in model.weights}
    polyckpt.load(directory / "m.keras", other)
    other.save(tmp_path / "again.keras")
    live = make(kind, optimizer, seed=4)
    polyckpt.load(tmp_path / "again.keras", live)
    assert same(values(model), values(live))


READ_BACK = """
import sys
sys.modules["polyckpt"] = None
import keras, numpy as np
from pathlib import Path
from tests.formats.keras_nets import make, values
for each in sys.argv[2:]:
    kind, optimizer = each.split("+")
    where = Path(sys.argv[1]) / kind
    model = make(kind, optimizer, seed=9)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(where / "out.weights.h5")
    np.savez(where / "weights.npz", *values(model))
    np.savez(where / "archive.npz", *values(keras.saving.load_model(where / "out.keras")))
"""


def test_keras_reads_what_is_exported_without_us(tmp_path: Path) -> None:
    """From checkpoints of ours, with the optimizer."""
    for kind, optimizer in CASES:
        ours = polyckpt.save(tmp_path / kind / "ours", trained(kind, optimizer))
        for file in ("out.keras", "out.weights.h5"):
            polyckpt.export(ours, tmp_path / kind / file, make(kind, optimizer, seed=5))
        assert sorted(each.name for each in (tmp_path / kind).iterdir()) == ["ours", "out.keras", "out.weights.h5"]
    command = [sys.executable, "-c", READ_BACK, str(tmp_path), *(f"{kind}+{optimizer}" for kind, optimizer in CASES)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, optimizer in CASES:
        for read in ("weights.npz", "archive.npz"):
            with np.load(tmp_path / kind / read) as found:
                assert same([found[name] for name in found.files], values(trained(kind, optimizer))), (kind, read)


def test_a_file_of_another_backend(tmp_path: Path) -> None:
    """One that was written on torch, whose optimizer Keras itself cannot load elsewhere."""
    path = Path(os.environ["WRITTEN_ON_TORCH"])
    live = make("sequential", "adam", seed=1)
    polyckpt.load(path / "m.keras", live)
    with np.load(path / "values.npz") as expected:
        assert all(np.array_equal(expected[name], value) for name, value in zip(expected.files, values(live), strict=True))
    opened = polyckpt.open(path / "m.keras")
    assert opened.manifest.optimizer.family == "adam" and opened.left_out == ()


def half(seed: int) -> Any:
    """Under mixed precision, for which `compile` wraps the optimizer into one that scales the loss."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return make("sequential", "adam", seed)
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("file", ["m.keras", "m.weights.h5"])
def test_the_loss_scale_comes_along(tmp_path: Path, file: str) -> None:
    model, live = half(0), half(1)
    train(model, "sequential", range(3))
    model.save(tmp_path / file) if file == "m.keras" else model.save_weights(tmp_path / file)
    polyckpt.load(tmp_path / file, live)
    assert same(values(model), values(live))
    if file == "m.keras":
        opened = polyckpt.open(tmp_path / file)
        assert opened.left_out == () and opened.manifest.optimizer.type.endswith("LossScaleOptimizer")
