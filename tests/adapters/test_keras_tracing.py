"""Tracing Keras models and what their layers are described as, on each backend."""

from __future__ import annotations

from tests.adapters.suite import BackendChecks


class Tracing(BackendChecks):
    modules = ("keras_tracing", "keras_layers")


class TestTensorFlow(Tracing):
    backend = "tensorflow"


class TestTorch(Tracing):
    backend = "torch"


class TestJax(Tracing):
    backend = "jax"
