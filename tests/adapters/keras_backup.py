"""Checks of BackupAndRestore on one backend: ``python -m tests.adapters.keras_backup FILE``. See keras_callbacks.py."""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

import polyckpt
from polyckpt.adapters.keras import BackupAndRestore, EarlyStopping, ModelCheckpoint
from tests.adapters.checks import run_checks

BACKEND = keras.backend.backend()
# TensorFlow shuffles arrays with a state inside its data pipeline that cannot be read.
SHUFFLE = BACKEND != "tensorflow"
EPOCHS, BATCH, SIZE = 4, 4, 27
X = np.random.default_rng(0).random((SIZE, 4), "float32")
Y = np.random.default_rng(1).random((SIZE, 2), "float32")


class Killed(BaseException):
    """A process that ends: no callback hears of it."""


class Kill(keras.callbacks.Callback):
    def __init__(self, epoch: int, batch: int | None) -> None:
        super().__init__()
        self.at, self.epoch = (epoch, batch), 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch) == self.at:
            raise Killed

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if (epoch, None) == self.at:
            raise Killed


class Tell(keras.callbacks.Callback):
    """The logs of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[int, Any] = {}

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.logs[epoch] = dict(logs or {})


class Shuffled(keras.utils.PyDataset):
    """Batches in an order that is drawn anew for each epoch, from NumPy's state."""

    def __init__(self) -> None:
        super().__init__()
        self.on_epoch_end()

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        rows = self.order[index * BATCH : (index + 1) * BATCH]
        return X[rows], Y[rows]

    def on_epoch_begin(self) -> None:
        self.order = np.random.permutation(SIZE)

    def on_epoch_end(self) -> None:
        self.order = np.arange(SIZE)


def build(seed: int, steps_per_execution: int = 1) -> Any:
    keras.utils.set_random_seed(seed)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])
    optimizer = keras.optimizers.AdamW(keras.optimizers.schedules.ExponentialDecay(0.01, 5, 0.9))
    model.compile(optimizer, "mse", metrics=["mae"], steps_per_execution=steps_per_execution)
    return model


def fit(model: Any, callbacks: list[Any], data: Any = None, **options: Any) -> tuple[dict[int, Any], bool]:
    """The logs of the epochs that ended, and whether the last did."""
    tell, arrays = Tell(), {"y": Y, "batch_size": BATCH, "shuffle": SHUFFLE} if data is None else {}
    options = {"epochs": EPOCHS, "validation_data": (X, Y), "verbose": 0, **arrays, **options}
    try:
        model.fit(X if data is None else data, callbacks=[tell, *callbacks], **options)
    except Killed:
        return tell.logs, False
    return tell.logs, True


def state(model: Any) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(variable) for variable in [*model.weights, *model.optimizer.variables]]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


def resumes_exactly(kills: list[tuple[int, int | None]], straight: Any, **options: Any) -> None:
    steps, data, more = options.pop("steps", 1), options.pop("data", lambda: None), options.pop("more", list)
    logs, expected = straight
    with tempfile.TemporaryDirectory() as place:
        directory, seen = place + "/backup", {}
        for seed, kill in enumerate([*kills, None], 1):
            others = more()
            backup = BackupAndRestore(directory, callbacks=others, **options)
            callbacks = [*others, backup, *([] if kill is None else [Kill(*kill)])]
            model = build(seed * 10 if seed > 1 else 1, steps)
            ended, done = fit(model, callbacks, data())
            seen |= ended
            assert done == (kill is None), kill
        assert seen == logs, (kills, options, seen, logs)
        assert same(state(model), expected), (kills, options)
        assert not Path(directory).exists(), "the backup of a finished training is deleted"


def straight(steps: int = 1, data: Any = None, more: Any = ()) -> Any:
    model = build(1, steps)
    logs, _ = fit(model, list(more), data)
    return logs, state(model)


def check_it_goes_on_at_the_very_batch() -> None:
    rng = random.Random(0)
    expected = straight()
    moments = [(epoch, batch) for epoch in range(EPOCHS) for batch in [*range(7), None]]
    for save_freq in (1, 3):
        kills = sorted(rng.sample(moments, 2), key=lambda at: (at[0], 99 if at[1] is None else at[1]))
        resumes_exactly(kills, expected, save_freq=save_freq)
    resumes_exactly([(0, 6), (1, 6)], expected, save_freq=7)
    resumes_exactly([(0, None), (2, 5)], expected, save_freq="epoch")
    resumes_exactly([(1, 4), (3, None)], expected, save_freq=2, async_save=True, double_checkpoint=True)


def check_several_steps_in_one_execution() -> None:
    if BACKEND != "torch":
        resumes_exactly([(0, 5), (2, 3)], straight(2), save_freq=2, steps=2)


def check_a_data_set_with_an_order_of_its_own() -> None:
    resumes_exactly([(0, 3), (2, 1)], straight(data=Shuffled()), save_freq=2, data=Shuffled)


def check_other_callbacks_go_on_too() -> None:
    def others() -> list[Any]:
        return [keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=0.2, cooldown=1)]

    def plain(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        model.compile(keras.optimizers.Adam(0.05), "mse")
        return model

    options: dict[str, Any] = {"epochs": 8, "batch_size": 9, "verbose": 0, "shuffle": False}
    expected = plain(1)
    expected.fit(X, Y, callbacks=others(), **options)
    assert float(keras.ops.convert_to_numpy(expected.optimizer.learning_rate)) < 0.05
    for epoch in (3, 6):
        with tempfile.TemporaryDirectory() as place:
            for seed, kill in ((1, [Kill(epoch, 1)]), (2, [])):
                model, watched = plain(seed), others()
                backup = BackupAndRestore(place + "/b", callbacks=watched)
                try:
                    model.fit(X, Y, callbacks=[*watched, backup, *kill], **options)
                except Killed:
                    continue
            assert same(state(model), state(expected)), epoch


def check_a_damaged_backup_gives_way_to_the_one_before() -> None:
    with tempfile.TemporaryDirectory() as place:
        fit(build(1), [BackupAndRestore(place + "/b", double_checkpoint=True), Kill(3, 0)])
        kept = sorted(Path(place, "b").glob("step-*"))
        assert len(kept) == 2
        newest = kept[-1] / "weights.safetensors"
        data = bytearray(newest.read_bytes())
        data[-1] ^= 1
        newest.write_bytes(data)
        model = build(2)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            logs, _ = fit(model, [BackupAndRestore(place + "/b", double_checkpoint=True)])
        assert any("skipped a damaged checkpoint" in str(each.message) for each in warned)
        expected_logs, expected = straight()
        assert logs == {epoch: expected_logs[epoch] for epoch in (2, 3)} and same(state(model), expected)
    with tempfile.TemporaryDirectory() as place:
        fit(build(1), [BackupAndRestore(place + "/b"), Kill(1, 0)])
        (only,) = Path(place, "b").glob("step-*")
        (only / "weights.safetensors").write_bytes(b"")
        try:
            fit(build(2), [BackupAndRestore(place + "/b")])
        except polyckpt.CorruptError as error:
            assert "must not begin anew unnoticed" in str(error)
        else:
            raise AssertionError("a damaged backup was ignored")


def check_only_its_own_files_are_deleted() -> None:
    with tempfile.TemporaryDirectory() as place:
        foreign = Path(place, "b", "notes.txt")
        foreign.parent.mkdir()
        foreign.write_text("mine")
        fit(build(1), [BackupAndRestore(place + "/b")], epochs=1)
        assert [path.name for path in Path(place, "b").iterdir()] == ["notes.txt"]
        fit(build(1), [BackupAndRestore(place + "/b", delete_checkpoint=False)], epochs=2)
        assert polyckpt.inspect(place + "/b/last").manifest.progress.epoch == 2
        model = build(2)
        logs, _ = fit(model, [BackupAndRestore(place + "/b")], epochs=3)
        assert sorted(logs) == [2] and model._initial_epoch is None


def check_a_second_fit_is_a_training_of_its_own() -> None:
    with tempfile.TemporaryDirectory() as place:
        model, backup = build(1), BackupAndRestore(place + "/b", save_freq=2)
        fit(model, [backup, Kill(2, 3)])
        logs, done = fit(model, [backup])
        assert done and sorted(logs) == [2, 3]
        logs, done = fit(model, [backup], epochs=2)
        assert done and sorted(logs) == [0, 1]


def check_a_fit_that_failed_while_it_skipped_trains_again() -> None:
    class Fail(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                raise Killed

    with tempfile.TemporaryDirectory() as place:
        fit(build(1), [BackupAndRestore(place + "/b", save_freq=4), Kill(1, 6)])
        model = build(2)
        fit(model, [BackupAndRestore(place + "/b", save_freq=4), Fail()])
        logs, done = fit(model, [BackupAndRestore(place + "/b", save_freq=4)])
        expected_logs, expected = straight()
        assert done and logs == {epoch: expected_logs[epoch] for epoch in (1, 2, 3)} and same(state(model), expected)


def check_bad_arguments_are_refused() -> None:
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    for make, words in [
        (lambda: BackupAndRestore(""), "Empty `backup_dir`"),
        (lambda: BackupAndRestore("x", save_freq="batch"), "'epoch' or a positive integer"),
        (lambda: BackupAndRestore("x", save_freq=0), "'epoch' or a positive integer"),
    ]:
        try:
            make()
        except ValueError as error:
            assert words in str(error)
        else:
            raise AssertionError(words)
    backup = BackupAndRestore("/nonexistent")
    backup.set_model(model)
    try:
        backup.on_train_begin()
    except ValueError as error:
        assert "must be built before you call `fit()`" in str(error)
    else:
        raise AssertionError("an unbuilt model was taken")


def check_all_three_together() -> None:
    """Early stopping, the best model and the backup of one fit, killed in the middle and started again."""

    def callbacks(place: str) -> list[Any]:
        best = ModelCheckpoint(place + "/best.keras", "val_loss", save_best_only=True, initial_value_threshold=None)
        stopping = EarlyStopping("val_loss", min_delta=0.01, patience=2, restore_best_weights=True, directory=place + "/stop")
        return [BackupAndRestore(place + "/b", save_freq=3), best, stopping]

    found = []
    for kills in ([], [(1, 4)], [(0, None), (2, 5)]):
        with tempfile.TemporaryDirectory() as place:
            logs: dict[int, Any] = {}
            for seed, kill in enumerate([*kills, None], 1):
                model = build(seed * 10 if seed > 1 else 1)
                trio = callbacks(place)
                ended, _ = fit(model, [*trio, *([] if kill is None else [Kill(*kill)])], epochs=9)
                logs |= ended
            best = keras.saving.load_model(place + "/best.keras")
            found.append((logs, trio[1].best, trio[2].stopped_epoch, best.predict(X, verbose=0), state(model)))
    for other in found[1:]:
        assert other[:3] == found[0][:3], (other[:3], found[0][:3])
        assert (other[3] == found[0][3]).all() and same(other[4], found[0][4])


if __name__ == "__main__":
    run_checks(globals(), sys.argv[1])
