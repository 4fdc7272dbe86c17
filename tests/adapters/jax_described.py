"""What a description says of a layer of JAX, recomputed from its roles alone; layers with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.nn import functional

from polyckpt import layers, schema
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
