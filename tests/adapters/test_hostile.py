"""Manifests that were changed and sealed again: a load refuses them with an error of its own, or loads; nothing else."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import numpy as np
import pytest

import polyckpt
from tests.test_checkpoint import ODD, mutate, places, seal_any

CHANGES = 500


def torch_run() -> tuple[Callable[[Path], Any], Callable[[Path, bool], Any], Callable[[], list[bytes]]]:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    extra = {"generator": torch.Generator(), "ema": torch.nn.Linear(2, 2), "second": torch.optim.SGD([torch.ones(2)], lr=0.1)}
    return (
        lambda path: polyckpt.save(path, model, optimizer, scheduler=scheduler, extra={**extra, "v": (torch.ones(2), 1)}),
        lambda path, strict: polyckpt.load(path, model, optimizer, scheduler=scheduler, extra=extra, strict=strict),
        lambda: [tensor.numpy().tobytes() for tensor in model.state_dict().values()],
    )


def keras_run() -> tuple[Callable[[Path], Any], Callable[[Path, bool], Any], Callable[[], list[bytes]]]:
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dropout(0.5)])
    model.compile("adam", "mse", run_eagerly=True)
    model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
    extra = {"seeds": keras.random.SeedGenerator(1)}
    return (
        lambda path: polyckpt.save(path, model, extra=extra),
        lambda path, strict: polyckpt.load(path, model, extra=extra, strict=strict),
        lambda: [variable.numpy().tobytes() for variable in model.variables],
    )


def jax_run() -> tuple[Callable[[Path], Any], Callable[[Path, bool], Any], Callable[[], list[bytes]]]:
    import jax
    import optax
    from flax import nnx

    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    extra = {"state": optax.adam(0.1).init({"w": jax.numpy.ones(2)})}
    return (
        lambda path: polyckpt.save(path, model, optimizer, extra={**extra, "key": jax.random.key(1)}),
        lambda path, strict: polyckpt.load(path, model, optimizer, extra=extra, strict=strict),
        lambda: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))],
    )


@pytest.mark.parametrize("run", [torch_run, keras_run, jax_run])
def test_changed_manifests_are_refused_or_load(run: Any, tmp_path: Path) -> None:
    save, load, bits = run()
    path = save(tmp_path / "c")
    original = (path / "manifest.json").read_bytes()
    raw = json.loads(original)
    generator = random.Random(0)
    every = [place for place in places(raw) if place[0:1] in (("native",), ("optimizer",), ("tensors",), ("model",))]
    jobs = [(place, how) for place in every for how in ("replace", "delete", "swap", "copy")]
    generator.shuffle(jobs)
    refused = 0
    for place, how in jobs[:CHANGES]:
        value = generator.choice(ODD)
        (path / "manifest.json").write_bytes(seal_any(mutate(json.loads(original), place, how, value, generator)))
        for strict in (True, False):
            before = bits()
            try:
                load(path, strict)
            except polyckpt.PolyckptError:
                refused += 1
                assert bits() == before, f"half-loaded: {how} {place} {value!r}"
            except Exception as error:
                raise AssertionError(f"{how} {place} {value!r} raised {type(error).__name__}: {error}") from error
    assert refused > CHANGES // 3
