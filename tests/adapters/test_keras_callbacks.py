"""The Keras callbacks on each backend, beside those of Keras; and a save that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.adapters.suite import REPOSITORY, BackendChecks, run_python

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


class Callbacks(BackendChecks):
    modules = ("keras_callbacks", "keras_backup")


class TestTensorFlow(Callbacks):
    backend = "tensorflow"


class TestTorch(Callbacks):
    backend = "torch"


class TestJax(Callbacks):
    backend = "jax"


def test_the_checks_can_fail(tmp_path: Path) -> None:
    body = "from tests.adapters.checks import run_checks\n\ndef check_x():\n    assert 1 == 2\n"
    run_python("-c", f"{body}\nrun_checks(globals(), {str(tmp_path / 'x')!r})")
    assert "AssertionError" in json.loads((tmp_path / "x").read_text())["check_x"]


SAVING = """
import sys, keras, numpy as np
from polyckpt.adapters.keras import ModelCheckpoint
model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(2000), keras.layers.Dense(500)])
model.compile("adam", "mse")
saving = ModelCheckpoint(sys.argv[1] + "/m.keras", save_freq=1)
class Tell(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print(batch, flush=True)
model.fit(np.ones((4000, 64)), np.ones((4000, 500)), batch_size=4, epochs=9, verbose=0, callbacks=[saving, Tell()])
"""


def test_a_kill_in_the_middle_of_a_save_leaves_a_whole_file(tmp_path: Path) -> None:
    environment = {**os.environ, **QUIET, "KERAS_BACKEND": "torch"}
    for delay in (0.05, 0.11, 0.17):
        command = [sys.executable, "-c", SAVING, str(tmp_path)]
        with subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "0\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        read = "import sys, keras; print(int(keras.saving.load_model(sys.argv[1]).optimizer.iterations) > 0)"
        done = run_python("-c", read, str(tmp_path / "m.keras"), env={**QUIET, "KERAS_BACKEND": "torch"})
        assert done.stdout.strip().endswith("True")
    # Each process removes what the one before left.
    assert len(list(tmp_path.glob(".polyckpt-tmp-*"))) <= 1
