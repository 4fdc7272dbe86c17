"""Random states of Keras: those of a model's seed generators, the global one, and the backend's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR

from polyckpt import residue
from polyckpt.adapter import Restore
from polyckpt.adapters.keras import variables
from polyckpt.errors import Problem


def capture() -> dict[str, Any]:
    """The global seed generator, if it was used, and the random state of the backend, if it has one."""
    generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    owner = variables.backend_adapter()
    return {
        "name": keras.backend.backend(),
        "global": None if generator is None else variables.leaf(generator.state, "global seed generator"),
        "backend": _capture_tensorflow() if owner is None else owner.capture_rng(),
    }


def prepare(tree: Mapping[str, Any]) -> Restore:
    """The counterpart of `capture`; a global seed generator that was not in use then is forgotten."""
    owner, live = variables.backend_adapter(), keras.backend.backend()
    backend = None
    if tree.get("name", live) != live:
        return Restore(apply=lambda: None, problems=[Problem("value", "rng", "backend", stored=tree["name"], live=live)])
    if tree["backend"] is not None:
        backend = _prepare_tensorflow(tree["backend"]) if owner is None else owner.prepare_rng(tree["backend"])

    def apply() -> None:
        if backend:
            backend.apply()
        if tree["global"] is None:
            global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)
        else:
            # A new one would draw its seed from Python's random state.
            generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR) or keras.random.SeedGenerator(0)
            generator.state.assign(tree["global"].make())
            global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, generator)

    return Restore(apply=apply, problems=backend.problems if backend else (), tensors=residue.tensors(dict(tree)))


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put back the random states of Keras and of its backend, beside those of a model."""
    generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    seed = None if generator is None else np.array(keras.ops.convert_to_numpy(generator.state))
    try:
        with _KEPT.get(keras.backend.backend(), contextlib.nullcontext)():
            yield
    finally:
        if generator is not None:
            generator.state.assign(seed)
        global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, generator)


def _kept_torch() -> contextlib.AbstractContextManager[None]:
    import torch

    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _kept_tensorflow() -> Iterator[None]:
    from tensorflow.python.ops import stateful_random_ops

    generator = stateful_random_ops.global_generator
    state = None if generator is None else np.array(generator.state)
    try:
        yield
    finally:
        if generator is not None:
            generator.state.assign(state)
        stateful_random_ops.global_generator = generator


_KEPT: Mapping[str, Any] = {"torch": _kept_torch, "tensorflow": _kept_tensorflow}


def capture_states(states: Sequence[Any]) -> list[Any]:
    """Variables by their position."""
    return [variables.leaf(variable, variable.path) for variable in states]


def prepare_states(live: Sequence[Any], stored: Sequence[residue.TensorRef], section: str, owner: Any = None) -> Restore:
    """The counterpart of `capture_states`; `apply` returns `owner`, and problems are of the `section`."""
    problems: list[Problem | None] = []
    if len(live) != len(stored):
        problems = [Problem("value", section, "number of states", stored=str(len(stored)), live=str(len(live)))]
    pairs = list(zip(live, stored, strict=False))
    problems += [variables.compare(section, variable.path, ref.stored, variable) for variable, ref in pairs]

    def apply() -> Any:
        for variable, ref in pairs:
            if variables.compare(section, variable.path, ref.stored, variable) is None:
                variable.assign(ref.make())
        return owner

    return Restore(
        apply=apply,
        problems=[problem for problem in problems if problem],
        tensors=residue.tensors(list(stored)),
    )


def _capture_tensorflow() -> Any:
    import tensorflow as tf
    from tensorflow.python.ops import stateful_random_ops

    # Asking for the global generator would create it, and so change what comes after.
    generator = stateful_random_ops.global_generator
    return None if generator is None else {"state": variables.leaf(tf.convert_to_tensor(generator.state), "tf.random")}


def _prepare_tensorflow(tree: Mapping[str, Any]) -> Restore:
    import tensorflow as tf

    def apply() -> None:
        tf.random.get_global_generator().state.assign(tree["state"].make())

    return Restore(apply=apply, tensors=residue.tensors(dict(tree)))
