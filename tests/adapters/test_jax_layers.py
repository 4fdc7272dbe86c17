"""What layers of nnx, Equinox, linen and Haiku are described as: what they compute follows from the description alone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from polyckpt import UnsupportedError, layers, schema
from polyckpt.adapters.jax import JaxAdapter
from polyckpt.leaves import Leaf

BATCH, TIME = 2, 5


def described(model: Any) -> dict[str, schema.Layer]:
    captured = JaxAdapter().capture_model(model)
    shapes = {name: leaf.shape for name, leaf in captured.weights.items()}
    assert not [problem for layer in captured.layers for problem in layers.problems(layer, shapes)]
    assert {role.tensor for layer in captured.layers for role in layer.roles.values()} == set(shapes)
    return {layer.path: layer for layer in captured.layers}


def kinds(model: Any) -> dict[str, str]:
    return {path: layer.kind for path, layer in described(model).items()}


@dataclass(frozen=True)
class Known:
    """A described layer and the arrays that its roles name: all that the references below may look at."""

    layer: schema.Layer
    weights: Mapping[str, np.ndarray]

    def __contains__(self, role: str) -> bool:
        return role in self.layer.roles

    @property
    def config(self) -> Mapping[str, Any]:
        return self.layer.config

    def __call__(self, role: str, order: str, **sizes: int) -> np.ndarray:
        """The array of a role with its axes split by `sizes`, in `order`; axes of size one that mean nothing are gone."""
        array, groups = self.weights[role], layers.axes(self.layer.roles[role].axes)
        split: list[int] = []
        for group, size in zip(groups, array.shape, strict=True):
            known = [sizes.get(axis, -1 if len(group) > 1 else size) for axis in group]
            split += known if len(group) > 1 else [size]
        names = [axis for group in groups for axis in group]
        array = array.reshape(split)
        array = array[tuple(0 if axis == "1" else slice(None) for axis in names)]
        names = [axis for axis in names if axis != "1"]
        return array.transpose([names.index(axis) for axis in order.split()])

    def or_zero(self, role: str, order: str, **sizes: int) -> Any:
        return self(role, order, **sizes) if role in self else 0.0

    @property
    def spatial(self) -> str:
        (named,) = (layers.axes(entry.axes) for role, entry in self.layer.roles.items() if role == "kernel")
        return " ".join(axis for (axis,) in named if axis.startswith("k"))


def known(model: Any, kind: str) -> Known:
    """The layer of `kind` in a model that holds one."""
    (layer,) = (layer for layer in described(model).values() if layer.kind == kind)
    read = JaxAdapter().capture_model(model).weights
    return Known(layer, {role: array(read[entry.tensor]) for role, entry in layer.roles.items()})


def array(leaf: Leaf) -> np.ndarray:
    return np.frombuffer(bytes(leaf.read().reshape(-1).view(np.uint8)), leaf.dtype).reshape(leaf.shape)


# What each kind computes, from its roles


def linear(one: Known, x: np.ndarray) -> np.ndarray:
    return x @ one("kernel", "in out") + one.or_zero("bias", "out")


def conv(one: Known, x: np.ndarray, channels: str = "last") -> np.ndarray:
    assert one.config.get("channels", channels) == channels
    x = np.moveaxis(x, -1, 1) if channels == "last" else x
    count = x.ndim - 2
    kernel = one("kernel", f"in out {one.spatial}" if one.layer.kind == "conv_transpose" else f"out in {one.spatial}")
    if one.config.get("flipped"):
        kernel = np.flip(kernel, tuple(range(2, kernel.ndim)))
    bias = torch.from_numpy(one("bias", "out").copy()) if "bias" in one else None
    name = f"conv{'_transpose' if one.layer.kind == 'conv_transpose' else ''}{count}d"
    groups = 1 if one.layer.kind == "conv_transpose" else x.shape[1] // kernel.shape[1]
    assert one.config.get("groups", groups) == groups
    made = getattr(functional, name)(torch.from_numpy(x.copy()), torch.from_numpy(kernel.copy()), bias, groups=groups).numpy()
    return np.moveaxis(made, 1, -1) if channels == "last" else made


def embedding(one: Known, x: np.ndarray) -> np.ndarray:
    return one("embedding", "vocab dim")[x]


def norm(one: Known, x: np.ndarray, epsilon: float, axes: tuple[int, ...], channel: int = -1, groups: int = 0) -> np.ndarray:
    """Over `axes`; or, of channels, over groups of them and all axes but the batch's."""
    assert one.config.get("epsilon", epsilon) == epsilon
    moved = np.moveaxis(x, channel, -1)
    if one.layer.kind == "batch_norm":
        mean, variance = one("mean", "c"), one("variance", "c")
    elif groups:
        assert one.config.get("groups", groups) == groups
        split = moved.reshape(len(x), -1, groups, x.shape[channel] // groups)
        shape = (len(x), *(1,) * (x.ndim - 2), x.shape[channel])
        per = x.shape[channel] // groups
        mean = np.repeat(split.mean((1, 3)), per, -1).reshape(shape)
        variance = np.repeat(split.var((1, 3)), per, -1).reshape(shape)
    else:
        mean = 0.0 if one.layer.kind == "rms_norm" else moved.mean(axes, keepdims=True)
        variance = (moved**2 if one.layer.kind == "rms_norm" else (moved - mean) ** 2).mean(axes, keepdims=True)
    order = "c" if one.layer.kind not in ("layer_norm", "rms_norm") else " ".join(f"n{i + 1}" for i in range(len(axes)))
    scale = one("scale", order) if "scale" in one else 1.0
    made = (moved - mean) / np.sqrt(variance + epsilon) * scale + one.or_zero("offset", order)
    return np.moveaxis(made, -1, channel)


def prelu(one: Known, x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, x * one("slope", ""))


def attention(one: Known, query: np.ndarray, other: np.ndarray) -> np.ndarray:
    heads = one.config["heads"]
    key_heads = one.config.get("key_heads", heads)

    def project(role: str, x: np.ndarray, count: int) -> np.ndarray:
        made = np.einsum("bti,ihd->bthd", x, one(f"{role}_kernel", "in head hd", head=count))
        return made + one.or_zero(f"{role}_bias", "head hd", head=count)

    q = project("query", query, heads)
    k, v = (np.repeat(project(role, other, key_heads), heads // key_heads, 2) for role in ("key", "value"))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    made = np.einsum("bqhd,hdo->bqo", mixed, one("output_kernel", "head hd out", head=heads))
    return made + one.or_zero("output_bias", "out")


def _gates(one: Known, part: str) -> dict[str, np.ndarray]:
    """Kernel or bias of a part of a cell, by gate; "-z" is the negative of z."""
    order = one.config["gate_order"].split()
    found: dict[str, np.ndarray] = {}
    axes = {"input_kernel": "in unit", "recurrent_kernel": "out unit"}.get(part, "unit")
    for role in one.layer.roles:
        base, _, gate = role.partition(":")
        if base != part:
            continue
        if gate or "gate" not in one.layer.roles[role].axes:
            found[gate or one.config.get(f"{role}_gates", order[0])] = one(role, axes)
        else:
            found.update(zip(order, one(role, f"gate {axes}", gate=len(order)), strict=True))
    return {gate.removeprefix("-"): -values if gate.startswith("-") else values for gate, values in found.items()}


def cell(one: Known, x: np.ndarray, h: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    """The new hidden units."""
    names = [name.removeprefix("-") for name in one.config["gate_order"].split()]
    kernels, recurrent = _gates(one, "input_kernel"), _gates(one, "recurrent_kernel")
    if "kernel" in one:
        whole, units = one("kernel", "gate in unit", gate=len(names)), h.shape[-1]
        kernels = dict(zip(names, whole[:, : x.shape[-1]], strict=True))
        recurrent = dict(zip(names, whole[:, x.shape[-1] :], strict=True))
        assert whole.shape[1] == x.shape[-1] + units
    bias, inner = ({**_gates(one, "input_bias"), **_gates(one, "bias")}, _gates(one, "recurrent_bias"))
    a = {name: x @ kernels[name] + bias.get(name, 0.0) for name in names}

    def fed(name: str, h: np.ndarray) -> np.ndarray:
        return h @ recurrent[name] + inner.get(name, 0.0)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    assert one.config.get("activation", "tanh") == "tanh" and one.config.get("recurrent_activation", "sigmoid") == "sigmoid"
    if one.layer.kind == "rnn":
        return np.tanh(a["h"] + fed("h", h))
    if one.layer.kind == "lstm":
        i, f, o = (sigmoid(a[name] + fed(name, h) + one.config.get("forget_bias", 0.0) * (name == "f")) for name in "ifo")
        assert c is not None
        return o * np.tanh(f * c + i * np.tanh(a["g"] + fed("g", h)))
    r, z = (sigmoid(a[name] + fed(name, h)) for name in "rz")
    n = np.tanh(a["n"] + (r * fed("n", h) if one.config["reset_after"] else fed("n", r * h)))
    return (1 - z) * n + z * h


# Modules with random weights


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((*shape, seed)).normal(size=shape).astype(np.float32)


def randomised(tree: Any) -> Any:
    """The tree with random numbers; what is called a variance, or is a state of Equinox, is positive."""

    def leaf(path: Any, value: Any) -> Any:
        if not hasattr(value, "dtype"):
            return value
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return jnp.zeros(value.shape, value.dtype) if isinstance(value, jax.ShapeDtypeStruct) else value
        name = jax.tree_util.keystr(path)
        values = np.random.default_rng(list(name.encode())).normal(size=value.shape).astype(np.float32)
        return jnp.asarray(np.abs(values) + 0.5 if "var" in name or "stat" in name else values)

    return jax.tree_util.tree_map_with_path(leaf, tree)


# Nothing is initialised: that would be compiled, and its numbers are not used.


def of_nnx(build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    module = nnx.eval_shape(lambda: build(*arguments, **options, rngs=nnx.Rngs(0)))
    nnx.update(module, randomised(nnx.state(module)))
    module.eval()
    return module


def of_equinox(build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    module = eqx.filter_eval_shape(lambda key: build(*arguments, **options, key=key), jax.random.key(0))
    return eqx.nn.inference_mode(randomised(module))


def same(found: Any, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-4, atol=2e-5)


KEY = jax.random.key(0)


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


def haiku(function: Callable[..., Any], *inputs: Any) -> tuple[Callable[..., Any], Any]:
    """A function of parameters, state and inputs, and random parameters and state."""
    transformed = hk.without_apply_rng(hk.transform_with_state(function))
    params, state = jax.eval_shape(transformed.init, KEY, *inputs)
    return lambda params, state, *inputs: transformed.apply(params, state, *inputs)[0], randomised((params, state))


def named(module: Any, *inputs: Any) -> tuple[Callable[..., Any], Any]:
    """A linen module that has its automatic name, and random variables of it."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, *inputs: Any) -> Any:
            return module()(*inputs)

    variables = randomised(jax.eval_shape(Model().init, KEY, *inputs))
    return lambda variables, *inputs: Model().apply(variables, *inputs), variables


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


# What is not what it seems


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
