"""Layers whose kernel is computed of other tensors (weight norm, spectral norm), and averages that have to be put right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils import parametrizations

os.environ["KERAS_BACKEND"] = "torch"

import polyckpt
from polyckpt import MismatchError

Wrap = Callable[[nn.Module], nn.Module]

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (2, 5)),
    "conv": (lambda: nn.Conv2d(4, 6, (3, 2)), (2, 4, 7, 8)),
    "1x1 conv": (lambda: nn.Conv1d(4, 6, 1), (2, 4, 9)),
    "conv_transpose": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
}
WRAPS: dict[str, Wrap] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm over inputs": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "weight norm by a hook": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
}


def batch_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype("float32")


def randomised(model: nn.Module) -> nn.Module:
    """Norms that are not those of the directions; singular vectors after a few iterations."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def differs(one: Any, other: Any) -> float:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.abs(one - other).max() / np.abs(one).max())


def out(model: nn.Module, batch: np.ndarray) -> np.ndarray:
    return model.eval()(torch.from_numpy(batch)).detach().numpy()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_a_kernel_is_computed_of_becomes_a_kernel(layer: str, wrap: str, tmp_path: Path) -> None:
    make, shape = LAYERS[layer]
    batch = batch_of(*shape)
    source, target = randomised(nn.Sequential(WRAPS[wrap](make()))), nn.Sequential(make())
    path = polyckpt.save(tmp_path / "a", source, probe=batch)
    report = polyckpt.load(path, target, rules={"{a}": "{a}"}).report
    assert (
        differs(out(source, batch), out(target, batch)) < 1e-6 < differs(out(source, batch), out(nn.Sequential(make()), batch))
    )
    assert report is not None and report.parity is not None and report.parity.agrees
    assert {row.target: str(row.exactness) for row in report.rows} == {"0.weight": "folded", "0.bias": "exact"}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wrap", [name for name in WRAPS if name.startswith("weight")])
def test_a_kernel_becomes_a_direction_and_its_norm(layer: str, wrap: str, tmp_path: Path) -> None:
    make, shape = LAYERS[layer]
    batch = batch_of(*shape)
    source, target = randomised(nn.Sequential(make())), nn.Sequential(WRAPS[wrap](make()))
    polyckpt.load(polyckpt.save(tmp_path / "a", source, probe=batch), target, rules={"{a}": "{a}"})
    assert differs(out(source, batch), out(target, batch)) < 1e-6


@pytest.mark.parametrize("wrap", [name for name in WRAPS if name.startswith("spectral")])
def test_a_kernel_cannot_become_what_is_divided_by_its_singular_value(wrap: str, tmp_path: Path) -> None:
    target = nn.Sequential(WRAPS[wrap](nn.Linear(5, 3)))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    path = polyckpt.save(tmp_path / "a", nn.Sequential(nn.Linear(5, 3)))
    with pytest.raises((MismatchError, polyckpt.PlanError)):
        polyckpt.load(path, target, rules={"{a}": "{a}"})
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


@pytest.mark.parametrize("pair", [("weight norm", "weight norm by a hook"), ("spectral norm", "spectral norm by a hook")])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_two_ways_to_write_the_same_are_exact(pair: tuple[str, str], layer: str, tmp_path: Path) -> None:
    make, shape = LAYERS[layer]
    for first, second in (pair, pair[::-1]):
        source, target = randomised(nn.Sequential(WRAPS[first](make()))), nn.Sequential(WRAPS[second](make()))
        path = polyckpt.save(tmp_path / first, source, probe=batch_of(*shape))
        report = polyckpt.load(path, target, rules={"{a}": "{a}"}).report
        assert report is not None and {str(row.exactness) for row in report.rows} == {"exact"}
        ours = [value.numpy() for value in source.state_dict().values()]
        assert all(any(np.array_equal(value.numpy(), each) for each in ours) for value in target.state_dict().values())


def flat(model: Any, batch: Any) -> Any:
    return jax.vmap(model)(batch)


EQX_LAYERS = {
    "linear": lambda key: eqx.nn.Linear(5, 3, key=key),
    "conv": lambda key: eqx.nn.Conv2d(4, 6, (3, 2), key=key),
}


@pytest.mark.parametrize("layer", EQX_LAYERS)
def test_weight_norm_of_torch_and_equinox_both_ways(layer: str, tmp_path: Path) -> None:
    make, shape = LAYERS[layer]
    batch = batch_of(*shape)
    source = randomised(nn.Sequential(parametrizations.weight_norm(make())))
    there = eqx.nn.Sequential([eqx.nn.WeightNorm(EQX_LAYERS[layer](jax.random.key(1)))])
    path = polyckpt.save(tmp_path / "a", source, probe=batch)
    restored = polyckpt.load(path, there, apply=flat)
    assert {str(row.exactness) for row in restored.report.rows} == {"exact"}
    assert differs(out(source, batch), flat(restored.model, batch)) < 1e-6
    back = nn.Sequential(parametrizations.weight_norm(make()))
    polyckpt.load(polyckpt.save(tmp_path / "b", restored.model, probe=batch, apply=flat), back)
    for name, value in source.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("layer", EQX_LAYERS)
def test_spectral_norm_of_torch_and_equinox_both_ways(layer: str, tmp_path: Path) -> None:
    make, shape = LAYERS[layer]
    batch = batch_of(*shape)

    def call(model: Any, batch: Any) -> Any:
        module, state = model
        return jax.vmap(lambda each: eqx.nn.inference_mode(module)(each, state)[0])(batch)

    def model(seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed))
        return eqx.nn.make_with_state(eqx.nn.SpectralNorm)(EQX_LAYERS[layer](keys[0]), "weight", key=keys[1])

    source = randomised(parametrizations.spectral_norm(make()))
    path = polyckpt.save(tmp_path / "a", source, probe=batch)
    restored = polyckpt.load(path, model(1), apply=call)
    assert differs(out(source, batch), call(restored.model, batch)) < 1e-6
    back = parametrizations.spectral_norm(make())
    polyckpt.load(polyckpt.save(tmp_path / "b", restored.model, probe=batch, apply=call), back)
    for name, value in source.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    plain = make()
    polyckpt.load(tmp_path / "b", plain)
    assert differs(out(source, batch), out(plain, batch)) < 1e-6


def test_a_normed_kernel_into_flax_through_a_flatten(tmp_path: Path) -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 4, (3, 2), padding="VALID", rngs=rngs)
            self.last = nnx.Linear(4 * 3 * 5, 7, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.relu(self.conv(x))
            return self.last(x.reshape(x.shape[0], -1))

    batch = batch_of(2, 3, 5, 6)
    for wrap in WRAPS.values():
        layers = wrap(nn.Conv2d(3, 4, (3, 2))), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(4 * 3 * 5, 7))
        source = randomised(nn.Sequential(*layers))
        path = polyckpt.save(tmp_path / "a", source, probe=batch, overwrite=True)
        model = Net(nnx.Rngs(0))
        polyckpt.load(path, model)
        assert differs(out(source, batch), model(np.moveaxis(batch, 1, -1))) < 1e-6


NNX_LAYERS = {
    "linear": lambda rngs: nnx.Linear(5, 3, rngs=rngs),
    "conv": lambda rngs: nnx.Conv(4, 6, (3, 2), padding="VALID", rngs=rngs),
}


@pytest.mark.parametrize("layer", NNX_LAYERS)
def test_weight_norm_of_torch_and_nnx_both_ways(layer: str, tmp_path: Path) -> None:
    make, shape = LAYERS[layer]
    batch = batch_of(*shape)
    turned = np.moveaxis(batch, 1, -1)
    source = randomised(nn.Sequential(parametrizations.weight_norm(make())))

    def model(seed: int) -> nnx.Module:
        rngs = nnx.Rngs(seed)
        return nnx.Sequential(nnx.WeightNorm(NNX_LAYERS[layer](rngs), rngs=rngs))

    there = model(1)
    report = polyckpt.load(polyckpt.save(tmp_path / "a", source, probe=batch), there).report
    assert report is not None and {str(row.exactness) for row in report.rows} == {"exact"}
    back, plain = nn.Sequential(parametrizations.weight_norm(make())), nn.Sequential(make())
    path = polyckpt.save(tmp_path / "b", there, probe=turned)
    polyckpt.load(path, back)
    polyckpt.load(path, plain)
    for name, value in source.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    expected = out(source, batch)
    assert differs(expected, out(plain, batch)) < 1e-6
    assert differs(expected, np.moveaxis(there(turned), -1, 1)) < 1e-6
    again = model(2)
    polyckpt.load(polyckpt.save(tmp_path / "c", plain, probe=batch), again)
    assert differs(expected, np.moveaxis(again(turned), -1, 1)) < 1e-6


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_weight_norm_of_torch_and_linen_both_ways(layer: str, tmp_path: Path) -> None:
    from flax import linen

    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            inner = linen.Dense(3) if layer == "linear" else linen.Conv(6, (3, 2), padding="VALID")
            return linen.WeightNorm(inner)(x)

    make, shape = LAYERS[layer]
    batch = batch_of(*shape)
    turned = np.moveaxis(batch, 1, -1)
    source = randomised(nn.Sequential(parametrizations.weight_norm(make())))
    variables = Normed().init(jax.random.key(1), turned)
    path = polyckpt.save(tmp_path / "a", source, probe=batch)
    restored = polyckpt.load(path, variables, apply=Normed().apply)
    assert {str(row.exactness) for row in restored.report.rows} == {"exact"}
    expected = out(source, batch)
    assert differs(expected, np.moveaxis(Normed().apply(restored.model, turned), -1, 1)) < 1e-6
    back, plain = nn.Sequential(parametrizations.weight_norm(make())), nn.Sequential(make())
    path = polyckpt.save(tmp_path / "b", restored.model, probe=turned, apply=Normed().apply)
    polyckpt.load(path, back)
    polyckpt.load(path, plain)
    for name, value in source.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert differs(expected, out(plain, batch)) < 1e-6


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_spectral_norm_into_keras_and_on_from_there(layer: str, tmp_path: Path) -> None:
    from keras import Input, Sequential, layers, ops

    make, shape = LAYERS[layer]
    batch = batch_of(*shape)
    turned = np.moveaxis(batch, 1, -1)

    def model() -> Any:
        inner = layers.Dense(3) if layer == "linear" else layers.Conv2D(6, (3, 2))
        return Sequential([Input(turned.shape[1:]), layers.SpectralNormalization(inner)])

    source = randomised(nn.Sequential(parametrizations.spectral_norm(make())))
    there, again, plain = model(), model(), nn.Sequential(make())
    report = polyckpt.load(polyckpt.save(tmp_path / "a", source, probe=batch), there).report
    assert report is not None
    found = {row.target.rpartition("/")[2]: str(row.exactness) for row in report.rows if row.target != "(none)"}
    assert found == {"kernel": "folded", "bias": "exact", "vector_u": "exact"}
    expected = out(source, batch)
    assert differs(expected, np.moveaxis(ops.convert_to_numpy(there(turned)), -1, 1)) < 1e-6
    path = polyckpt.save(tmp_path / "b", there, probe=turned)
    polyckpt.load(path, plain)  # whose kernel is the normed one
    assert differs(expected, out(plain, batch)) < 1e-6
    polyckpt.load(polyckpt.save(tmp_path / "c", plain, probe=batch), again)
    assert differs(expected, np.moveaxis(ops.convert_to_numpy(again(turned)), -1, 1)) < 1e-6
    again(turned, training=True)  # goes on from a vector of its own
    assert np.isfinite(ops.convert_to_numpy(again(turned))).all()


def test_a_layer_of_a_parametrization_of_its_own_is_not_taken_for_a_kernel(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    source = nn.Linear(5, 3)
    torch.nn.utils.parametrize.register_parametrization(source, "weight", Doubled())
    path = polyckpt.save(tmp_path / "a", source)
    assert [layer.kind for layer in polyckpt.inspect(path).manifest.model.layers] == ["custom", "custom"]
    with pytest.raises((MismatchError, polyckpt.PlanError)):
        polyckpt.load(path, nn.Sequential(nn.Linear(5, 3)), rules={"{*a}": "0"})


# Equinox's batch norm.


class Normed(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm

    def __init__(self, mode: Any, key: jax.Array) -> None:
        self.conv = eqx.nn.Conv2d(3, 6, 3, key=key)
        self.norm = eqx.nn.BatchNorm(6, axis_name="batch", mode=mode)

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        return self.norm(self.conv(x), state)


def run(model: Any, batch: Any) -> Any:
    module, state = model
    return jax.vmap(lambda each: eqx.nn.inference_mode(module)(each, state)[0])(batch)


def trained(model: Any, batch: Any) -> Any:
    """The same after a step of training, which updates the averages."""
    module, state = model
    return module, jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(batch, state)[1]


@pytest.mark.parametrize("mode", ["ema", "batch"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_batch_norm_of_equinox_both_ways(mode: str, strict: bool, tmp_path: Path) -> None:
    batch = batch_of(4, 3, 6, 7)
    source = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    source[1].running_mean.normal_()
    source[1].running_var.uniform_(0.5, 2)
    path = polyckpt.save(tmp_path / "a", source, probe=batch)
    restored = polyckpt.load(path, eqx.nn.make_with_state(Normed)(mode, jax.random.key(1)), apply=run, strict=strict)
    assert restored.report.parity is not None and restored.report.parity.agrees and not restored.skipped
    assert differs(out(source, batch), run(restored.model, batch)) < 1e-5

    # It is no first step any more: one of training changes the averages by a share, and does not set them.
    further = trained(trained(restored.model, batch), 1 + batch)
    kept = trained(restored.model, batch)
    assert differs(run(restored.model, batch), run(kept, batch)) < 0.1
    back = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    polyckpt.load(polyckpt.save(tmp_path / "b", further, probe=batch, apply=run), back, strict=strict)
    assert differs(run(further, batch), out(back, batch)) < 1e-5


def test_few_updates_from_nothing_are_put_right(tmp_path: Path) -> None:
    batch = batch_of(4, 3, 6, 7)
    source = trained(trained(eqx.nn.make_with_state(Normed)("batch", jax.random.key(1)), batch), 2 * batch)
    back = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    polyckpt.load(polyckpt.save(tmp_path / "b", source, probe=batch, apply=run), back)
    assert differs(run(source, batch), out(back, batch)) < 1e-5
