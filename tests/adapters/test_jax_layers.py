"""What layers of nnx, Equinox, linen and Haiku are described as: what they compute follows from the description alone."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import numpy as np
import pytest
from flax import nnx

from tests.adapters.jax_described import (
    BATCH,
    KEY,
    TIME,
    Known,
    attention,
    cell,
    conv,
    described,
    embedding,
    haiku,
    kinds,
    known,
    linear,
    named,
    noise,
    norm,
    of_equinox,
    of_nnx,
    prelu,
    randomised,
    same,
)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias: bool) -> None:
    x = noise(BATCH, 3)
    for module in (
        of_nnx(nnx.Linear, 3, 4, use_bias=bias),
        of_nnx(nnx.LinearGeneral, 3, 4, use_bias=bias),
        of_nnx(nnx.Einsum, "ab,bc->ac", (3, 4), (4,) if bias else None),
        of_nnx(nnx.Einsum, "...b,cb->...c", (4, 3), (4,) if bias else None),
    ):
        same(module(x), linear(known(module, "linear"), x))
    module = of_equinox(eqx.nn.Linear, 3, 4, use_bias=bias)
    same(jax.vmap(module)(x), linear(known(module, "linear"), x))
    scalar = of_equinox(eqx.nn.Linear, 3, "scalar", use_bias=bias)
    same(jax.vmap(scalar)(x)[:, None], linear(known(scalar, "linear"), x))
    function, variables = named(lambda: nn.Dense(4, use_bias=bias), x)
    same(function(variables, x), linear(known(variables, "linear"), x))
    function, (params, state) = haiku(lambda x: hk.Linear(4, with_bias=bias)(x), x)
    same(function(params, state, x), linear(known(params, "linear"), x))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions(count: int, groups: int, bias: bool) -> None:
    sizes, kernel = (5, 6, 7)[:count], (2, 3, 4)[:count]
    x = noise(BATCH, *sizes, 4)
    first = np.moveaxis(x, -1, 1)
    options: dict[str, Any] = {"padding": "VALID", "feature_group_count": groups, "use_bias": bias}
    module = of_nnx(nnx.Conv, 4, 6, kernel, **options)
    one = known(module, "conv")
    assert one.config == {"groups": groups, "channels": "last"}
    same(module(x), conv(one, x))
    equinox = of_equinox(eqx.nn.Conv, count, 4, 6, kernel, groups=groups, use_bias=bias)
    one = known(equinox, "conv")
    assert one.config == {"groups": groups, "channels": "first"}
    same(jax.vmap(equinox)(first), conv(one, first, "first"))
    function, variables = named(lambda: nn.Conv(6, kernel, **options), x)
    same(function(variables, x), conv(known(variables, "conv"), x))
    formats = (("NWC", "NHWC", "NDHWC"), ("NCW", "NCHW", "NCDHW"))
    for place, given in (("last", x), ("first", first)):
        data_format = formats[place == "first"][count - 1]

        def forward(x: Any, data_format: str = data_format) -> Any:
            layer = hk.ConvND(
                count, 6, kernel, padding="VALID", feature_group_count=groups, with_bias=bias, data_format=data_format
            )
            return layer(x)

        function, (params, state) = haiku(forward, given)
        one = known(params, "conv")
        assert one.config == ({"channels": place} if bias else {})
        same(function(params, state, given), conv(one, given, place))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolutions(count: int, bias: bool) -> None:
    sizes, kernel = (5, 6, 7)[:count], (2, 3, 4)[:count]
    x = noise(BATCH, *sizes, 4)
    first = np.moveaxis(x, -1, 1)
    for transposed in (False, True):
        options: dict[str, Any] = {"padding": "VALID", "use_bias": bias, "transpose_kernel": transposed}
        module = of_nnx(nnx.ConvTranspose, 4, 6, kernel, **options)
        one = known(module, "conv_transpose")
        assert one.config == {"groups": 1, "channels": "last", "flipped": not transposed}
        same(module(x), conv(one, x))
        if bias or not transposed:  # nothing else tells
            layer = nn.ConvTranspose(6, kernel, name="ConvTranspose_3", **options)
            function, variables = named(lambda layer=layer: layer.copy(), x)
            same(function(variables, x), conv(known(variables, "conv_transpose"), x))
    equinox = of_equinox(eqx.nn.ConvTranspose, count, 4, 6, kernel, use_bias=bias)
    same(jax.vmap(equinox)(first), conv(known(equinox, "conv_transpose"), first, "first"))
    kind = (hk.Conv1DTranspose, hk.Conv2DTranspose, hk.Conv3DTranspose)[count - 1]
    function, (params, state) = haiku(lambda x: kind(6, kernel, padding="VALID", with_bias=bias)(x), x)
    same(function(params, state, x), conv(known(params, "conv_transpose"), x))


def test_depthwise_convolutions_of_haiku() -> None:
    x = noise(BATCH, 5, 6, 4)
    function, (params, state) = haiku(lambda x: hk.DepthwiseConv2D(3, (2, 3), padding="VALID")(x), x)
    same(function(params, state, x), conv(known(params, "conv"), x))


def test_embeddings() -> None:
    x = np.array([[4, 0, 6], [1, 1, 5]])
    module = of_nnx(nnx.Embed, 7, 3)
    same(module(x), embedding(known(module, "embedding"), x))
    equinox = of_equinox(eqx.nn.Embedding, 7, 3)
    same(jax.vmap(jax.vmap(equinox))(x), embedding(known(equinox, "embedding"), x))
    function, variables = named(lambda: nn.Embed(7, 3), x)
    same(function(variables, x), embedding(known(variables, "embedding"), x))
    function, (params, state) = haiku(lambda x: hk.Embed(7, 3)(x), x)
    same(function(params, state, x), embedding(known(params, "embedding"), x))


@pytest.mark.parametrize("scale, offset", [(True, True), (True, False), (False, True), (False, False)])
def test_batch_norms(scale: bool, offset: bool) -> None:
    x = noise(BATCH, 5, 6, 4)
    options: dict[str, Any] = {"use_scale": scale, "use_bias": offset, "epsilon": 1e-2}
    module = of_nnx(nnx.BatchNorm, 4, momentum=0.7, **options)
    one = known(module, "batch_norm")
    assert one.config == {"epsilon": 1e-2, "momentum": 0.7, "momentum_is": "share of the old"}
    same(module(x), norm(one, x, 1e-2, ()))
    function, variables = named(lambda: nn.BatchNorm(use_running_average=True, **options), x)
    roles = {"mean", "variance"} | ({"scale"} if scale else set()) | ({"offset"} if offset else set())
    (layer,) = described(variables).values()
    assert layer.path == ("params/BatchNorm_0" if scale or offset else "batch_stats/BatchNorm_0")
    assert layer.roles.keys() == roles
    same(function(variables, x), norm(known(variables, "batch_norm"), x, 1e-2, ()))
    for place in (-1, 1) if scale or offset else ():

        def forward(x: Any, training: bool, place: int = place) -> Any:
            data_format = "NCHW" if place == 1 else "NHWC"
            return hk.BatchNorm(scale, offset, 0.9, eps=1e-2, data_format=data_format)(x, is_training=training)

        given = np.moveaxis(x, -1, place)
        transformed = hk.without_apply_rng(hk.transform_with_state(forward))
        both = randomised(jax.eval_shape(functools.partial(transformed.init, training=True), KEY, given))
        one = known(both, "batch_norm")
        biased = {f"{role}_{what}" for role in ("mean", "variance") for what in ("biased", "updates")}
        assert one.layer.path == "0/batch_norm" and one.layer.roles.keys() == roles | biased
        same(transformed.apply(*both, given, False)[0], norm(one, given, 1e-2, (), place))


def test_batch_norms_of_equinox_with_and_without_their_state() -> None:
    x = noise(BATCH, 4, 5, 6)

    def build(mode: str) -> Any:
        return randomised(eqx.nn.make_with_state(lambda: [eqx.nn.BatchNorm(4, "b", 1e-2, momentum=0.7, mode=mode)])())

    model, state = pair = eqx.nn.inference_mode(build("ema"))
    one = known(pair, "batch_norm")
    assert one.config == {"epsilon": 1e-2, "momentum": 0.7, "momentum_is": "share of the old"}
    made = jax.vmap(lambda x: model[0](x, state)[0])(x)
    same(made, norm(one, x, 1e-2, (), 1))
    assert kinds({"state": state, "a model": model})["a model/0"] == "batch_norm"
    averages = {"mean", "variance", "unset"}
    assert known({"state": state, "z": model}, "batch_norm").layer.roles.keys() == {"scale", "offset", *averages}
    assert known(model, "batch_norm").layer.roles.keys() == {"scale", "offset"}
    biased = {"mean_biased", "variance_biased", "mean_updates"}
    assert known(build("batch"), "batch_norm").layer.roles.keys() == {"scale", "offset", *biased}
    # Two models count their states alike.
    two = described([build("ema"), build("ema")])
    assert [layer.roles.keys() for layer in two.values() if layer.kind == "batch_norm"] == [{"scale", "offset"}] * 2


def test_layer_norms() -> None:
    x = noise(BATCH, 3, 4)
    for options in ({}, {"use_bias": False}, {"use_scale": False}):
        module = of_nnx(nnx.LayerNorm, 4, epsilon=1e-2, **options)
        same(module(x), norm(known(module, "layer_norm"), x, 1e-2, (-1,)))
    assert kinds(of_nnx(nnx.LayerNorm, 4, reduction_axes=(1, 2))) == {"": "custom"}
    equinox = randomised(eqx.nn.LayerNorm((3, 4), eps=1e-2))
    same(jax.vmap(equinox)(x), norm(known(equinox, "layer_norm"), x, 1e-2, (1, 2)))
    for options in ({}, {"use_bias": False}, {"use_scale": False}):
        function, variables = named(lambda options=options: nn.LayerNorm(epsilon=1e-2, **options), x)
        same(function(variables, x), norm(known(variables, "layer_norm"), x, 1e-2, (-1,)))
    function, variables = named(lambda: nn.LayerNorm(epsilon=1e-2, reduction_axes=(1, 2), feature_axes=(1, 2)), x)
    same(function(variables, x), norm(known(variables, "layer_norm"), x, 1e-2, (1, 2)))
    for axes, param_axes in (((-1,), None), ((1, 2), (1, 2))):

        def forward(x: Any, axes: Any = axes, param_axes: Any = param_axes) -> Any:
            return hk.LayerNorm(axes, True, True, eps=1e-2, param_axis=param_axes)(x)

        function, (params, state) = haiku(forward, x)
        same(function(params, state, x), norm(known(params, "layer_norm"), x, 1e-2, axes))


def test_rms_norms() -> None:
    x = noise(BATCH, 3, 4)
    module = of_nnx(nnx.RMSNorm, 4, epsilon=1e-2)
    same(module(x), norm(known(module, "rms_norm"), x, 1e-2, (-1,)))
    assert kinds(nnx.Sequential(of_nnx(nnx.RMSNorm, 4, use_scale=False), nnx.PReLU())) == {"layers/1": "prelu"}
    equinox = randomised(eqx.nn.RMSNorm((3, 4), eps=1e-2, use_bias=False))
    same(jax.vmap(equinox)(x), norm(known(equinox, "rms_norm"), x, 1e-2, (1, 2)))
    assert kinds(eqx.nn.RMSNorm(4)) == {"": "custom"}  # an offset is beyond the table
    function, variables = named(lambda: nn.RMSNorm(epsilon=1e-2), x)
    same(function(variables, x), norm(known(variables, "rms_norm"), x, 1e-2, (-1,)))
    function, (params, state) = haiku(lambda x: hk.RMSNorm(-1, 1e-2)(x), x)
    same(function(params, state, x), norm(known(params, "rms_norm"), x, 1e-2, (-1,)))


def test_group_and_instance_norms() -> None:
    x = noise(BATCH, 5, 7, 6)
    first = np.moveaxis(x, -1, 1)
    for groups, kind, module in (
        (3, "group_norm", of_nnx(nnx.GroupNorm, 6, 3, epsilon=1e-2)),
        (6, "instance_norm", of_nnx(nnx.InstanceNorm, 6, epsilon=1e-2)),
    ):
        same(module(x), norm(known(module, kind), x, 1e-2, (), groups=groups))
    equinox = randomised(eqx.nn.GroupNorm(3, 6, eps=1e-2))
    same(jax.vmap(equinox)(first), norm(known(equinox, "group_norm"), first, 1e-2, (), 1, 3))
    for groups, kind, build in (
        (3, "group_norm", lambda: nn.GroupNorm(3, epsilon=1e-2)),
        (6, "instance_norm", lambda: nn.InstanceNorm(epsilon=1e-2)),
    ):
        function, variables = named(build, x)
        same(function(variables, x), norm(known(variables, kind), x, 1e-2, (), groups=groups))
    for groups, kind, forward in (
        (3, "group_norm", lambda x: hk.GroupNorm(3, eps=1e-2)(x)),
        (6, "instance_norm", lambda x: hk.InstanceNorm(True, True, eps=1e-2)(x)),
    ):
        function, (params, state) = haiku(forward, x)
        same(function(params, state, x), norm(known(params, kind), x, 1e-2, (), groups=groups))


def test_slopes() -> None:
    x = noise(BATCH, 5)
    module = nnx.PReLU(0.3)
    same(module(x), prelu(known(module, "prelu"), x))
    equinox = randomised(eqx.nn.PReLU())
    same(jax.vmap(equinox)(x), prelu(known(equinox, "prelu"), x))
    function, variables = named(lambda: nn.PReLU(), x)
    same(function(variables, x), prelu(known(variables, "prelu"), x))


@pytest.mark.parametrize("bias", [True, False])
def test_attention(bias: bool) -> None:
    query, other = noise(BATCH, 3, 8), noise(BATCH, 4, 5, seed=1)
    for key_heads in (4, 2):
        options = {"num_kv_heads": key_heads, "in_kv_features": 5, "use_bias": bias, "decode": False}
        module = of_nnx(nnx.MultiHeadAttention, 4, 8, 12, 7, **options)
        one = known(module, "attention")
        assert one.config == {"heads": 4, **({"key_heads": 2} if key_heads == 2 else {})}
        same(module(query, other), attention(one, query, other))
    biases = {f"use_{name}_bias": bias for name in ("query", "key", "value", "output")}
    sizes = {"key_size": 5, "value_size": 5, "output_size": 7, "qk_size": 3, "vo_size": 2}
    equinox = of_equinox(eqx.nn.MultiheadAttention, 4, 8, **sizes, **biases)
    same(jax.vmap(equinox)(query, other, other), attention(known(equinox, "attention"), query, other))
    build = nn.MultiHeadDotProductAttention(4, qkv_features=12, out_features=7, use_bias=bias)
    function, variables = named(lambda: build.copy(), query, other)
    one = known(variables, "attention")
    assert one.layer.path == "params/MultiHeadDotProductAttention_0" and one.config == {"heads": 4}
    same(function(variables, query, other), attention(one, query, other))


def test_cells() -> None:
    x, h, c = noise(BATCH, 3), noise(BATCH, 5), noise(BATCH, 5, seed=1)
    for kind, build in (
        ("lstm", nnx.LSTMCell),
        ("lstm", nnx.OptimizedLSTMCell),
        ("gru", nnx.GRUCell),
        ("rnn", nnx.SimpleCell),
    ):
        module = of_nnx(build, 3, 5)
        one = known(module, kind)
        assert "direction" not in one.config and one.config["activation"] == "tanh"
        same(module((c, h) if kind == "lstm" else h, x)[1], cell(one, x, h, c))
    for kind, layer in (
        ("lstm", nn.LSTMCell(5)),
        ("lstm", nn.OptimizedLSTMCell(5)),
        ("gru", nn.GRUCell(5)),
        ("rnn", nn.SimpleCell(5)),
    ):
        carry = (c, h) if kind == "lstm" else h
        function, variables = named(lambda layer=layer: layer.copy(), carry, x)
        (path,) = described(variables)
        assert path == f"params/{type(layer).__name__}_0"
        same(function(variables, carry, x)[1], cell(known(variables, kind), x, h, c))
    for bias in (True, False):
        lstm = of_equinox(eqx.nn.LSTMCell, 3, 5, use_bias=bias)
        same(jax.vmap(lstm)(x, (h, c))[0], cell(known(lstm, "lstm"), x, h, c))
        gru = of_equinox(eqx.nn.GRUCell, 3, 5, use_bias=bias)
        same(jax.vmap(gru)(x, h), cell(known(gru, "gru"), x, h))
    function, (params, state) = haiku(lambda x, h, c: hk.LSTM(5)(x, hk.LSTMState(h, c))[0], x, h, c)
    same(function(params, state, x, h, c), cell(known(params, "lstm"), x, h, c))
    function, (params, state) = haiku(lambda x, h: hk.GRU(5)(x, h)[0], x, h)
    same(function(params, state, x, h), cell(known(params, "gru"), x, h))


def test_recurrent_layers_know_their_direction() -> None:
    x = noise(BATCH, TIME, 3)

    def forwards(one: Known, x: np.ndarray) -> np.ndarray:
        h, made = np.zeros((BATCH, 4), np.float32), []
        for step in x.swapaxes(0, 1):
            h = cell(one, step, h)
            made.append(h)
        return np.stack(made, 1)

    def gru(rngs: nnx.Rngs, **options: Any) -> Any:
        return nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs), **options)

    both = of_nnx(lambda rngs: nnx.Bidirectional(gru(rngs), gru(rngs)))
    found = described(both)
    assert {path: layer.config["direction"] for path, layer in found.items()} == {
        "forward_rnn/cell": "forward",
        "backward_rnn/cell": "backward",
    }
    one, other = known(both.forward_rnn, "gru"), known(both.backward_rnn, "gru")
    same(both(x), np.concatenate([forwards(one, x), forwards(other, x[:, ::-1])[:, ::-1]], -1))
    reverse = of_nnx(gru, reverse=True)
    assert known(reverse, "gru").config["direction"] == "backward"
    same(reverse(x), forwards(known(reverse, "gru"), x[:, ::-1]))


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
