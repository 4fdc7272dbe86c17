"""What only looks like a layer of nnx, Equinox, linen or Haiku is described as custom, and what is one in disguise is found."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from polyckpt import UnsupportedError
from polyckpt.adapters.jax import JaxAdapter
from tests.adapters.jax_described import (
    BATCH,
    KEY,
    described,
    haiku,
    kinds,
    named,
    noise,
    of_equinox,
    of_nnx,
    randomised,
)


def test_what_changes_its_weights_is_custom() -> None:
    x = noise(BATCH, 3)
    wrap = functools.partial(nnx.WeightNorm, feature_axes=0)
    assert set(kinds(of_nnx(lambda rngs: wrap(nnx.Linear(3, 4, rngs=rngs), rngs=rngs))).values()) == {"custom"}
    assert set(kinds(of_nnx(lambda rngs: nnx.SpectralNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs))).values()) == {"custom"}
    twice = eqx.nn.WeightNorm(eqx.nn.WeightNorm(of_equinox(eqx.nn.Linear, 3, 4)), "g")
    assert set(kinds(twice).values()) == {"custom"}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(3, name="plain")(x)
            x = nn.WeightNorm(nn.Dense(4, name="weight"))(x)
            return nn.SpectralNorm(nn.Dense(2, name="spectral"))(x, update_stats=False)

    found = kinds(randomised(jax.eval_shape(Model().init, KEY, x)))
    assert (found.pop("params/plain"), found.pop("params/weight")) == ("linear", "linear")
    assert "params/spectral" in found and set(found.values()) == {"custom"}

    class Square(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.WeightNorm(nn.Dense(3, name="weight"), feature_axes=0)(x)

    # Which of two axes of one size has the norms cannot be told.
    assert set(kinds(randomised(jax.eval_shape(Square().init, KEY, x))).values()) == {"custom"}


def test_calls_and_tensors_of_a_subclass_are_beyond_the_table() -> None:
    class Scaled(nnx.Linear):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(3, 4, rngs=rngs)
            self.factor = nnx.Param(jnp.ones(4))

        def __call__(self, x: Any) -> Any:
            return super().__call__(x) * self.factor[...]

    class Rectified(nnx.Linear):
        def __call__(self, x: Any) -> Any:
            return jax.nn.relu(super().__call__(x))

    assert kinds(of_nnx(Scaled)) == {"": "custom"}
    assert kinds(of_nnx(Rectified, 3, 4)) == {"": "linear"}
    assert kinds(of_nnx(nnx.LoRALinear, 3, 4, lora_rank=2)) == {"": "custom", "lora": "custom"}


def test_what_only_looks_like_a_layer_is_custom() -> None:
    x = noise(BATCH, 3, 4)
    assert kinds(of_nnx(nnx.LinearGeneral, (3, 4), (5, 2), axis=(-2, -1))) == {"": "custom"}
    for text, shape in (("abc,cd->abd", (4, 5)), ("ab,bc->ac", (4, 5))):
        assert kinds(of_nnx(nnx.Einsum, text, shape, (5,))) == {"": "linear"}
    for text, shape, bias in (
        ("abc,bcd->ad", (3, 4, 5), (5,)),
        ("abc,bd->adc", (3, 5), None),
        ("ab,bc->ac", (4, 5), (1, 5)),
        ("ab,bb->ab", (4, 4), None),
    ):
        assert kinds(of_nnx(nnx.Einsum, text, shape, bias)) == {"": "custom"}
    residual = of_nnx(nnx.SimpleCell, 3, 4, residual=True)
    assert kinds(residual) == {"dense_h": "linear", "dense_i": "linear"}
    _, variables = named(lambda: nn.DenseGeneral((2, 5)), x)
    assert kinds(variables) == {"params/DenseGeneral_0": "custom"}
    stacked = {"params": {"Dense_0": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}}}
    assert kinds(stacked) == {"params/Dense_0": "custom"}
    for tree in (
        {"w": jnp.ones((3, 4)), "b": jnp.ones(3)},
        {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "m": jnp.ones(2)},
        {"w": jnp.ones(4)},
        {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4), "count": 3},
        {"kernel": jnp.ones((3, 4)), "sub": [jnp.ones(2)]},
        {"b": jnp.ones(3)},
        {"scale": jnp.ones((3, 4)), "mean": jnp.ones(4), "var": jnp.ones(4)},
        {"bias": jnp.ones(4)},
        {"mean": jnp.ones(4), "var": jnp.ones(4)},
        {"embedding": jnp.ones(4)},
        {"negative_slope": jnp.ones(4)},
        {"w_i": jnp.ones((3, 12)), "w_h": jnp.ones((4, 9)), "b": jnp.ones(12)},
    ):
        assert kinds({"layer": tree})["layer"] == "custom", tree


def test_cells_and_attentions_of_which_a_part_does_not_fit_are_taken_apart() -> None:
    def dense(*shape: int) -> dict[str, Any]:
        return {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[-1])}

    cell = {"i": dense(3, 4), "h": dense(4, 4)}
    assert kinds({"cell": cell}) == {"cell": "rnn"}
    assert kinds({"cell": {**cell, "h": dense(5, 4)}}) == {"cell/h": "linear", "cell/i": "linear"}
    heads = {"kernel": jnp.ones((6, 2, 3))}
    parts = {"query": heads, "key": heads, "value": heads, "out": {"kernel": jnp.ones((2, 3, 6))}}
    assert kinds({"a": parts}) == {"a": "attention"}
    assert "attention" not in kinds({"a": {**parts, "out": {"kernel": jnp.ones((3, 2, 6))}}}).values()
    assert kinds({"a": {**parts, "query_ln": {"scale": jnp.ones(3)}}}) == {"a": "attention", "a/query_ln": "layer_norm"}


def test_names_tell_normalisations_apart() -> None:
    both, alone = {"scale": jnp.ones(4), "bias": jnp.ones(4)}, {"scale": jnp.ones(4)}
    tree = {
        "BatchNorm_2": both,
        "bn1": both,
        "group_norm": both,
        "other": both,
        "final": alone,
        "ln_2": alone,
        "RMSNorm_0": alone,
    }
    assert kinds(tree) == {
        "BatchNorm_2": "batch_norm",
        "bn1": "batch_norm",
        "group_norm": "group_norm",
        "other": "layer_norm",
        "final": "rms_norm",
        "ln_2": "layer_norm",
        "RMSNorm_0": "rms_norm",
    }
    assert kinds({"RMSNorm_0": both}) == {"RMSNorm_0": "custom"}


def test_statistics_are_found_in_whatever_holds_them() -> None:
    module = nn.BatchNorm(use_running_average=True)
    variables = module.init(KEY, noise(BATCH, 4))
    inner = {kind: {"block": {"norm": tree}} for kind, tree in variables.items()}
    for tree, prefix in ((inner, ""), ({"a": inner, "b": {}}, "a/"), ((inner, {"count": 1}), "0/")):
        layer = described(tree)[f"{prefix}params/block/norm"]
        assert layer.kind == "batch_norm" and layer.roles["mean"].tensor == f"{prefix}batch_stats/block/norm/mean"
    beside = {"norm": dict(variables["params"]), "other": dict(variables["batch_stats"])}
    assert kinds({"model": beside}) == {"model/norm": "layer_norm", "model/other": "custom"}


def test_templates_are_described_as_what_they_stand_for() -> None:
    def model() -> dict[str, Any]:
        return {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "key": jax.random.key(0)}

    template, values = JaxAdapter().capture_model(jax.eval_shape(model)), JaxAdapter().capture_model(model())
    assert template.layers == values.layers and template.layers[0].kind == "custom" and template.layers[1].kind == "linear"
    for name, leaf in values.weights.items():
        assert (leaf.dtype, leaf.shape, leaf.kind) == (
            template.weights[name].dtype,
            template.weights[name].shape,
            template.weights[name].kind,
        )
        with pytest.raises(UnsupportedError, match=f"model: {name}: .* cannot be saved"):
            template.weights[name].read()
    module = nnx.eval_shape(lambda: nnx.Conv(3, 4, (2, 2), rngs=nnx.Rngs(0)))
    assert kinds(module) == {"": "conv"}


def test_the_projections_of_attention_in_haiku_are_linear() -> None:
    x = noise(BATCH, 3, 4)
    _, (params, _) = haiku(lambda x: hk.MultiHeadAttention(2, 3, w_init_scale=1.0)(x, x, x), x)
    assert set(kinds(params).values()) == {"linear"} and len(params) == 4


def test_states_of_nnx_are_trees_too() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 4, (2, 5), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

    _, params, others = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    found = described({"others": others, "params": params})
    assert {path: layer.kind for path, layer in found.items()} == {
        "params/conv": "conv",
        "params/head": "linear",
        "params/norm": "batch_norm",
    }
    assert found["params/norm"].roles["variance"].tensor == "others/norm/var"


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
