"""Keras 3 through the shared suite, on each of its backends."""

from tests.adapters.suite import AdapterSuite

_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


class TestKerasTensorFlow(AdapterSuite):
    cases = "tests.adapters.cases.keras"
    env = {**_QUIET, "KERAS_BACKEND": "tensorflow"}


class TestKerasTorch(AdapterSuite):
    cases = "tests.adapters.cases.keras"
    env = {**_QUIET, "KERAS_BACKEND": "torch"}


class TestKerasJax(AdapterSuite):
    cases = "tests.adapters.cases.keras"
    env = {**_QUIET, "KERAS_BACKEND": "jax"}
