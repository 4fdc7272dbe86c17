"""Checkpoints of TensorFlow: loaded into Keras on TensorFlow bit for bit, continued, converted, and read by their paths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.sealing import REPOSITORY, run_python


def test_tensorflow() -> None:
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    module = REPOSITORY / "tests" / "formats" / "tensorflow_files_child.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(module)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-20_000:]


def test_another_backend_is_told_to_use_that_of_tensorflow(tmp_path: Path) -> None:
    code = """
import os, sys
os.environ.update(KERAS_BACKEND="torch", CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="3")
import keras, numpy as np, tensorflow as tf, polyckpt
path = tf.train.Checkpoint(w=tf.Variable([[1.0, 2.0, 3.0]])).write(sys.argv[1] + "/m")
assert np.array_equal(polyckpt.open(path).weights["w"], [[1, 2, 3]])
try:
    polyckpt.load(path, keras.Sequential([keras.Input((1,)), keras.layers.Dense(3, use_bias=False)]))
except polyckpt.UnsupportedError as error:
    assert "this one is on torch: set KERAS_BACKEND=tensorflow" in str(error), error
else:
    raise SystemExit("loaded")
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_tensorflow_the_command_is_named(tmp_path: Path) -> None:
    for name in ("m.index", "m.data-00000-of-00001"):
        (tmp_path / name).write_bytes(b"x")
    code = """
import sys
sys.modules["tensorflow"] = None
import os
os.environ["KERAS_BACKEND"] = "torch"
import polyckpt
try:
    polyckpt.open(sys.argv[1] + "/m")
except polyckpt.AdapterError as error:
    assert "pip install 'tensorflow'" in str(error), error
else:
    raise SystemExit("opened")
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
