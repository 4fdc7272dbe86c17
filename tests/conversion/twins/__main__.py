"""Converts each twin there and back with no rules and prints JSON.

Run as: python -m tests.conversion.twins, with KERAS_BACKEND set to jax.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

import polyckpt
from tests.conversion.mutants import randomize
from tests.conversion.torch_models import MODELS
from tests.conversion.twins import Twin, equinox_twins, haiku_twins, keras_twins, linen_twins, nnx_twins

TWINS: dict[str, dict[str, Callable[[], Twin]]] = {
    "keras": keras_twins.KERAS,
    "nnx": {name: lambda module=module: nnx_twins.twin(module(nnx.Rngs(0))) for name, module in nnx_twins.NNX.items()},
    "linen": {name: lambda name=name: linen_twins.twin(linen_twins.LINEN[name](), example(name)) for name in linen_twins.LINEN},
    "equinox": {
        name: lambda make=make: equinox_twins.twin(make(jax.random.key(0))) for name, make in equinox_twins.EQUINOX.items()
    },
    "haiku": {name: lambda name=name: haiku_twins.twin(haiku_twins.HAIKU[name], example(name)) for name in haiku_twins.HAIKU},
}
"""Framework -> model of torch_models -> its twin. Cells of linen are left out: tracing them takes too long."""


# There and back


def outcome(framework: str, name: str) -> dict[str, Any]:
    """unlike, there, back: how far outputs are from those of the torch model before, after, and in torch again, relative.

    agrees: what the reports of both loads say of it.
    """
    ours, batch = _torch_model(name, 1)
    twin = TWINS[framework][name]()
    turned = channels_last(batch) if twin.channels_last else batch
    expected = _called(ours, batch)
    unlike = _apart(expected, _first(twin.call(twin.model, jnp.asarray(turned))))
    with tempfile.TemporaryDirectory() as directory:
        there = polyckpt.load(polyckpt.save(f"{directory}/there", ours, probe=batch), twin.model, apply=twin.apply)
        found = _first(twin.call(there.model, jnp.asarray(turned)))
        again, _ = _torch_model(name, 2)
        saved = polyckpt.save(f"{directory}/back", there.model, probe=turned, apply=twin.apply)
        back = polyckpt.load(saved, again)
    reports = [each.report.parity.agrees for each in (there, back) if each.report and each.report.parity]
    return {
        "unlike": unlike,
        "there": _apart(expected, found),
        "back": _apart(expected, _called(again, batch)),
        "agrees": len(reports) == 2 and all(reports),
    }


def example(name: str) -> jax.Array:
    """The batch of a model, with the channels last."""
    return jnp.asarray(channels_last(MODELS[name]()[1]))


def channels_last(batch: np.ndarray) -> np.ndarray:
    return np.moveaxis(batch, 1, -1) if batch.ndim == 4 else batch


def _torch_model(name: str, seed: int) -> tuple[nn.Module, np.ndarray]:
    model, batch = MODELS[name]()
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval(), batch


def _called(model: nn.Module, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        output = model(torch.from_numpy(batch))
    return getattr(output, "last_hidden_state", output).numpy()


def _first(outputs: Any) -> np.ndarray:
    return np.asarray(outputs[0] if isinstance(outputs, tuple | list) else outputs)


def _apart(expected: np.ndarray, found: np.ndarray) -> float:
    found = found if found.shape == expected.shape else np.moveaxis(found, -1, 1)
    assert expected.shape == found.shape
    return float(np.abs(expected - found).max() / np.abs(expected).max())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.stdout.write(json.dumps({name: {model: outcome(name, model) for model in twins} for name, twins in TWINS.items()}))
