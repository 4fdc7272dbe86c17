"""Checks of the Keras callbacks on one backend: ``python -m tests.adapters.keras_callbacks FILE``.

Each function `check_...` is one; the process runs them all and writes a JSON object to FILE: name -> "" or a traceback.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

import polyckpt
from polyckpt.adapters.keras import BackupAndRestore, EarlyStopping, ModelCheckpoint, written
from tests.adapters.checks import run_checks

Original = keras.callbacks.ModelCheckpoint
X = np.random.default_rng(0).random((24, 4), "float32")
Y = np.random.default_rng(1).random((24, 2), "float32")


def build(seed: int = 0) -> Any:
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dropout(0.3), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile(keras.optimizers.AdamW(0.01), "mse", metrics=["mae"])
    return model


MODEL = build()
MODEL.fit(X, Y, epochs=1, batch_size=12, verbose=0)


@contextlib.contextmanager
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def drive(
    callback: Any, logs: list[dict[str, Any]], *, model: Any = MODEL, batches: int = 3, first: int = 0
) -> tuple[str, list[str]]:
    """What a callback prints and warns of in epochs with these logs, whose batches know the training metrics only."""
    callback.set_model(model)
    callback.set_params({"epochs": first + len(logs), "steps": batches, "verbose": 0})
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        callback.on_train_begin()
        for epoch, each in enumerate(logs, first):
            callback.on_epoch_begin(epoch)
            for batch in range(batches):
                callback.on_train_batch_end(batch, {name: v for name, v in each.items() if not name.startswith("val_")})
            callback.on_epoch_end(epoch, each)
            if getattr(model, "stop_training", False):
                break
        callback.on_train_end()
    return printed.getvalue(), [str(each.message) for each in warned if each.category is UserWarning]


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def raised(kind: type[BaseException], function: Any) -> str:
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def losses(*values: float, name: str = "val_loss") -> list[dict[str, Any]]:
    return [{"loss": value + 1, "mae": 0.5, name: value} for value in values]


def check_random_histories_are_those_of_keras() -> None:
    rng = random.Random(0)
    for _ in range(25):
        weights_only, best_only = rng.random() < 0.8, rng.random() < 0.6
        options: dict[str, Any] = {
            "monitor": rng.choice(["val_loss", "loss", "val_mae", "mae", "val_absent"]),
            "verbose": 1,
            "save_best_only": best_only,
            "save_weights_only": weights_only,
            "mode": rng.choice(["min", "max"]),
            "save_freq": "epoch" if best_only else rng.choice(["epoch", 1, 2, 4]),
            "initial_value_threshold": rng.choice([None, None, 0.5]),
        }
        batch = "-{batch}" if options["save_freq"] != "epoch" else ""
        name = rng.choice(["m", "m-{epoch:02d}" + batch, "sub/m-{epoch}" + batch + "-{loss:.2f}"])
        name += ".weights.h5" if weights_only else ".keras"
        logs = [{n: round(rng.random(), 1) for n in ("loss", "mae", "val_loss", "val_mae")} for _ in range(5)]
        told = []
        for kind in (Original, ModelCheckpoint):
            with place() as directory:
                # Ours would go on from the steps that the model has made, so both begin a new run.
                more = {} if kind is Original else {"resume": False}
                callback = kind(str(directory / name), **options, **more)
                printed, warned = drive(callback, logs)
                told.append((printed.replace(str(directory), "D"), warned, files(directory), callback.best))
        assert told[0][0] == told[1][0] and told[0][2:] == told[1][2:], (options, name, told)
        assert len(told[0][1]) == len(told[1][1]), told
        assert all(ours.startswith(theirs) for theirs, ours in zip(told[0][1], told[1][1], strict=True)), told


def check_the_examples_run() -> None:
    for kind in (ModelCheckpoint, BackupAndRestore, EarlyStopping):
        result = doctest.testmod(sys.modules[kind.__module__])
        assert result.attempted > 2 and not result.failed, kind


def check_arguments_are_refused_as_by_keras() -> None:
    for arguments, options in [
        (("m.keras",), {"save_weights_only": True}),
        (("m.h5",), {"save_weights_only": True}),
        (("m.ckpt",), {}),
        (("m.pth",), {}),
        (("m.tf",), {}),
        (("m.keras",), {"save_freq": "batch"}),
        (("m.keras",), {"save_freq": 1.5}),
    ]:
        assert raised(ValueError, lambda a=arguments, o=options: Original(*a, **o)) == raised(
            ValueError, lambda a=arguments, o=options: ModelCheckpoint(*a, **o)
        )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert ModelCheckpoint("m.keras", mode="best").mode == "auto"
    assert "ModelCheckpoint mode 'best' is unknown, fallback to auto mode." in str(warned[0].message)
    assert isinstance(ModelCheckpoint("m.keras"), Original)
    for options in ({"keep_best": 0}, {"keep_last": True}, {"keep_last": 1}, {"minutes": 0}, {"min_delta": -1}):
        raised(ValueError, lambda o=options: ModelCheckpoint("m.keras" if "keep_last" in o else "{epoch}.keras", **o))


def check_errors_in_fit_are_those_of_keras() -> None:
    for name, logs, kind, options in [
        ("{absent}.keras", losses(1.0), KeyError, {}),
        ("m.keras", losses(1.0), ValueError, {"monitor": "val_los"}),
        ("d.keras", losses(1.0), OSError, {}),
    ]:
        told = []
        for each in (Original, ModelCheckpoint):
            with place() as directory:
                (directory / "d.keras").mkdir()
                callback = each(str(directory / name), **options)
                told.append(raised(kind, lambda c=callback, lg=logs: drive(c, lg)).replace(str(directory), "D"))
        if kind is OSError:
            assert "existing directory" in told[1] and "non-directory filepath" in told[1], told
        else:
            assert told[0] == told[1], told


def check_nan_is_never_best() -> None:
    nan, inf = float("nan"), float("inf")
    logs = losses(nan, 0.5, -inf, 0.6, 0.4)
    with place() as directory:
        callback = Original(str(directory / "m.weights.h5"), save_best_only=True, save_weights_only=True, mode="min")
        drive(callback, logs)
        assert np.isnan(callback.best), "Keras has mended this; say so in the docstring"
        callback = ModelCheckpoint(
            directory / "n.weights.h5", verbose=1, save_best_only=True, save_weights_only=True, mode="min"
        )
        printed, _ = drive(callback, logs)
        assert callback.best == 0.4
        assert re.findall(r"did not improve from (\S+)|improved from (\S+) to (\S+),", printed) == [
            ("None", "", ""),
            ("", "None", "0.50000"),
            ("0.50000", "", ""),
            ("0.50000", "", ""),
            ("", "0.50000", "0.40000"),
        ]


def check_best_by_loss_within_an_epoch() -> None:
    with place() as directory:
        options: dict[str, Any] = {"monitor": "loss", "save_best_only": True, "save_weights_only": True, "save_freq": 1}
        raised(TypeError, lambda: drive(Original(str(directory / "m.weights.h5"), mode="min", **options), losses(2.0, 1.0)))
        callback = ModelCheckpoint(directory / "n-{epoch}-{batch}.weights.h5", **options)
        drive(callback, losses(2.0, 1.0, 3.0))
        assert files(directory)[1:] == ["n-1-1.weights.h5", "n-2-1.weights.h5"] and callback.best == 2.0


def check_validation_metrics_decide_at_the_end_of_the_epoch() -> None:
    with place() as directory:
        callback = ModelCheckpoint(directory / "m-{epoch}.weights.h5", save_best_only=True, save_weights_only=True, save_freq=4)
        _, warned = drive(callback, losses(2.0, 1.0, 0.5, 0.7, 0.2))
        # 3 batches an epoch: the 4th, 8th and 12th are due in epochs 2, 3 and 4.
        assert files(directory) == ["m-2.weights.h5", "m-3.weights.h5"] and not warned and callback.best == 0.5


def check_names_are_made_only_to_save() -> None:
    logs = losses(1.0, 2.0)
    del logs[1]["mae"]
    with place() as directory:
        callback = ModelCheckpoint(directory / "{mae:.1f}.weights.h5", save_best_only=True, save_weights_only=True)
        drive(callback, logs)
        assert files(directory) == ["0.5.weights.h5"]
        raised(KeyError, lambda: drive(callback, [{"val_loss": 0.5}], first=2))
        assert callback.best == 1.0, "what could not be saved is not best"


def check_a_failing_save_leaves_the_old_file() -> None:
    class Failing:
        optimizer = None

        def save_weights(self, path: str, overwrite: bool) -> None:
            Path(path).write_bytes(b"half")
            raise RuntimeError("in the middle")

    with place() as directory:
        path = directory / "m.weights.h5"
        options: dict[str, Any] = {"save_best_only": True, "save_weights_only": True}
        callback = ModelCheckpoint(path, **options)
        drive(callback, losses(1.0))
        before = path.read_bytes()
        raised(RuntimeError, lambda: drive(callback, losses(0.5), model=Failing(), first=1))
        assert path.read_bytes() == before and files(directory) == ["m.weights.h5"] and callback.best == 1.0
        drive(callback, losses(0.8), first=1)
        assert callback.best == 0.8 and path.read_bytes() != before
        MODEL.load_weights(path)


def check_keras_reads_what_is_written() -> None:
    expected = MODEL.predict(X, verbose=0)
    with place() as directory:
        for name in ("m.keras", "m.h5", "m.weights.h5"):
            callback = ModelCheckpoint(directory / name, save_weights_only=name == "m.weights.h5")
            drive(callback, losses(1.0, 2.0))
            note = written.read(str(directory / name))
            assert note is not None and note.record.metrics["val_loss"] == 2.0 and note.record.epoch == 2
            if name == "m.weights.h5":
                other = build(3)
                other.load_weights(directory / name)
            else:
                # Keras writes the loss "mse" to a .h5 file in a way that it cannot read.
                other = keras.saving.load_model(directory / name, compile=name != "m.h5")
                if name != "m.h5":
                    assert int(other.optimizer.iterations) == int(MODEL.optimizer.iterations) > 0
            np.testing.assert_array_equal(other.predict(X, verbose=0), expected)


def check_the_best_and_the_last_are_kept() -> None:
    values = (5.0, 3.0, float("nan"), 4.0, 2.0, 6.0, 3.5)
    for suffix in (".weights.h5", ""):
        weights = {"save_weights_only": True}
        with place() as directory:
            (directory / f"m-99{suffix}").write_text("of somebody else")
            drive(ModelCheckpoint(directory / f"m-{{epoch:02d}}{suffix}", keep_best=2, **weights), losses(*values))
            assert files_of(directory) == ["m-02", "m-05", "m-99"]
        with place() as directory:
            drive(ModelCheckpoint(directory / f"m-{{epoch:02d}}{suffix}", keep_last=2, **weights), losses(*values))
            assert files_of(directory) == ["m-06", "m-07"]
        with place() as directory:
            both = ModelCheckpoint(directory / f"m-{{epoch:02d}}{suffix}", keep_best=2, keep_last=1, async_save=True, **weights)
            printed, _ = drive(both, losses(*values))
            assert files_of(directory) == ["m-02", "m-05", "m-07"]
    with place() as directory:
        told = ModelCheckpoint(directory / "{epoch}.weights.h5", keep_best=1, verbose=1, save_weights_only=True)
        printed, _ = drive(told, losses(1.0, 2.0))
        assert "Epoch 2: val_loss is not among the 1 best" in printed


def files_of(directory: Path) -> list[str]:
    return sorted(path.name.removesuffix(".weights.h5") for path in directory.iterdir())


def check_a_later_process_goes_on_with_the_best() -> None:
    for suffix in (".keras", ".weights.h5", ""):
        options: dict[str, Any] = {"save_best_only": True, "save_weights_only": suffix != ".keras"}
        with place() as directory:
            path = directory / f"m{suffix}"
            drive(ModelCheckpoint(path, **options), losses(3.0, 1.0, 2.0))
            later = ModelCheckpoint(path, **options)
            drive(later, losses(1.5), first=3)
            assert later.best == 1.0 and written.read(str(path)).record.epoch == 2
            threshold = ModelCheckpoint(path, initial_value_threshold=0.5, **options)
            drive(threshold, losses(0.7), first=3)
            assert threshold.best == 0.5
            drive(again := ModelCheckpoint(path, **options), losses(1.5))
            assert again.best == 1.0, "this model has made steps, so training goes on"
            drive(fresh := ModelCheckpoint(path, **options), losses(1.5), model=build())
            assert fresh.best == 1.5 and written.read(str(path)).record.epoch == 1, "a new model begins a new run"
            drive(asked := ModelCheckpoint(path, resume=True, **options), losses(1.7), model=build())
            assert asked.best == 1.5
            drive(refused := ModelCheckpoint(path, resume=False, **options), losses(1.7), first=3)
            assert refused.best == 1.7
        with place() as directory:
            template = directory / f"m-{{epoch}}{suffix}"
            more = {"save_weights_only": suffix != ".keras", "keep_best": 2}
            drive(ModelCheckpoint(template, **more), losses(3.0, 1.0, 2.0))
            drive(ModelCheckpoint(template, **more), losses(1.5, 4.0), first=3)
            assert sorted(path.name for path in directory.iterdir()) == [f"m-2{suffix}", f"m-4{suffix}"]
            # Another template in the same place is another matter.
            drive(ModelCheckpoint(directory / f"m-{{epoch:02d}}{suffix}", **more), losses(9.0, 9.5, 8.0), first=5)
            assert len(list(directory.iterdir())) == 4


def check_small_improvements_and_minutes() -> None:
    with place() as directory:
        options: dict[str, Any] = {"save_best_only": True, "save_weights_only": True, "min_delta": 0.1}
        callback = ModelCheckpoint(directory / "m-{epoch}.weights.h5", **options)
        drive(callback, losses(1.0, 0.95, 0.85, 0.8))
        assert files_of(directory) == ["m-1", "m-3"] and callback.best == 0.85
    clock = [0.0]
    module = sys.modules[ModelCheckpoint.__module__]
    real, module.time.monotonic = module.time.monotonic, lambda: clock.__setitem__(0, clock[0] + 20) or clock[0]
    try:
        with place() as directory:
            timed = ModelCheckpoint(directory / "m-{epoch}-{batch}", minutes=1, save_freq=1000, save_weights_only=True)
            drive(timed, losses(1.0, 1.0, 1.0))
            assert len(list(directory.iterdir())) >= 2
            progress = polyckpt.inspect(sorted(directory.iterdir())[0]).manifest.progress
            assert progress.epoch is not None and progress.batch
    finally:
        module.time.monotonic = real


def check_directories_hold_whole_checkpoints() -> None:
    with place() as directory:
        model = build(1)
        callback = ModelCheckpoint(directory / "run-{epoch}", async_save=True)
        model.fit(X, Y, validation_split=0.25, epochs=3, batch_size=6, verbose=0, callbacks=[callback])
        other = build(2)
        restored = polyckpt.load(directory / "run-3", other)
        assert restored.epoch == 3 and set(restored.metrics) == {"loss", "mae", "val_loss", "val_mae"}
        for one, two in zip(model.optimizer.variables, other.optimizer.variables, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(two))
        np.testing.assert_array_equal(model.predict(X, verbose=0), other.predict(X, verbose=0))
        first = polyckpt.inspect(directory / "run-1").weights
        assert any((first[name] != array).any() for name, array in polyckpt.inspect(directory / "run-3").weights.items())
        model.fit(X, Y, epochs=1, verbose=0, callbacks=[ModelCheckpoint(directory / "weights-0.9", save_weights_only=True)])
        assert polyckpt.inspect(directory / "weights-0.9").manifest.optimizer is None
        (directory / "taken").mkdir()
        (directory / "taken" / "x").write_text("x")
        raised(FileExistsError, lambda: drive(ModelCheckpoint(directory / "taken"), losses(1.0)))
        assert (directory / "taken" / "x").read_text() == "x"


def check_an_error_in_the_background_surfaces() -> None:
    with place() as directory:
        for name in ("m-{epoch}", "m-{epoch}.weights.h5"):
            callback = ModelCheckpoint(directory / name, async_save=True, save_weights_only=True)
            real = os.replace, os.rename
            os.replace = os.rename = lambda *_: (_ for _ in ()).throw(OSError(28, "disk full"))
            try:
                message = raised(polyckpt.StorageError, lambda c=callback: drive(c, losses(1.0)))
            finally:
                os.replace, os.rename = real
            assert "disk full" in message
            drive(callback, losses(1.0))
        assert files_of(directory) == ["m-1", "m-1"]


def check_early_stopping_is_that_of_keras() -> None:
    rng = random.Random(0)
    for _ in range(60):
        options: dict[str, Any] = {
            "monitor": rng.choice(["val_loss", "val_mae", "val_absent"]),
            "min_delta": rng.choice([0, 0.1]),
            "patience": rng.randint(0, 3),
            "verbose": 1,
            "mode": rng.choice(["min", "max"]),
            "baseline": rng.choice([None, 0.5]),
            "restore_best_weights": rng.random() < 0.3,
            "start_from_epoch": rng.randint(0, 2),
        }
        logs = [{n: round(rng.random(), 1) for n in ("loss", "val_loss", "val_mae")} for _ in range(8)]
        told = []
        for kind in (keras.callbacks.EarlyStopping, EarlyStopping):
            MODEL.stop_training = False
            callback = kind(**options)
            told.append((drive(callback, logs), callback.stopped_epoch, callback.best, callback.wait))
        assert told[0] == told[1], (options, told)
    MODEL.stop_training = False
    stopping = EarlyStopping("val_loss", patience=2, mode="min")
    drive(stopping, losses(float("nan"), 1.0, 2.0, 0.5, float("nan"), 3.0, 0.1))
    assert (stopping.best, stopping.stopped_epoch) == (0.5, 5)
    MODEL.stop_training = False


def check_early_stopping_survives_a_restart() -> None:
    rng = random.Random(1)
    for _ in range(12):
        options: dict[str, Any] = {"patience": rng.randint(1, 3), "mode": "min", "restore_best_weights": True}
        logs = losses(*(rng.choice([0.1, 0.2, 0.3, float("nan"), 0.5]) for _ in range(8)))

        def weights(epoch: int) -> list[np.ndarray]:
            return [np.full(array.shape, epoch, "float32") for array in MODEL.get_weights()]

        class Train(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
                self.model.set_weights(weights(epoch))

        def run(stopping: Any, first: int, last: int, logs: Any = logs) -> Any:
            MODEL.stop_training = False
            both = keras.callbacks.CallbackList([Train(), stopping], model=MODEL)
            both.on_train_begin()
            for epoch in range(first, last):
                both.on_epoch_begin(epoch)
                if not MODEL.stop_training:
                    both.on_epoch_end(epoch, logs[epoch])
                if MODEL.stop_training:
                    break
            return stopping

        straight = run(EarlyStopping(**options), 0, 8)
        straight.on_train_end()
        expected = MODEL.get_weights()
        with place() as directory:
            first = 0
            while first < 8:
                later = run(EarlyStopping(directory=directory, **options), first, rng.randint(first + 1, 8))
                if MODEL.stop_training:
                    break
                # Killed after that epoch; the training is resumed there, or one epoch before.
                last = max(record.epoch for record in later._history.read().records)
                first = 8 if last == 8 else max(first, last - rng.randint(0, 1))
                later._history.close()
            final = run(EarlyStopping(directory=directory, **options), 8, 8) if not MODEL.stop_training and first < 8 else later
            final.on_train_end()
            assert (final.stopped_epoch, final.best_epoch) == (straight.stopped_epoch, straight.best_epoch), (logs, options)
            assert repr(final.best) == repr(straight.best)
            for one, two in zip(MODEL.get_weights(), expected, strict=True):
                np.testing.assert_array_equal(one, two)
            assert len(list(directory.glob("best-weights-*"))) <= 2
    MODEL.stop_training = False
    MODEL.train_function = None


if __name__ == "__main__":
    run_checks(globals(), sys.argv[1])
