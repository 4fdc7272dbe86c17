"""One layer in every framework that has it, as a model and the function that it computes, for the matrix of conversions.

A case is a kind with its options. `FRAMEWORKS` maps a framework to its builders; a builder gives a `Built`: the model as
polyckpt takes it, and a function from a batch (channels last, sequences as batch time features) to the output of a model that
came back. Sizes are unequal everywhere.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch
from flax import nnx
from torch import nn

BATCH, IN, OUT = 2, 6, 8
SPATIAL = (7, 9, 6)


@dataclass(frozen=True)
class Case:
    kind: str
    bias: bool = True
    rank: int = 2
    groups: int = 1
    dilation: int = 1
    scale: bool = True
    heads: int = 2
    reset_after: bool = True
    bidirectional: bool = False
    layers: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        return (3, 2, 2)[: self.rank]

    def __str__(self) -> str:
        plain = Case(self.kind)
        names = ("bias", "rank", "groups", "dilation", "scale", "reset_after", "bidirectional", "layers")
        changed = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) != getattr(plain, name)]
        return " ".join([self.kind, *changed])

    def batch(self, rng: np.random.Generator, dtype: str) -> np.ndarray:
        if self.kind == "embedding":
            return rng.integers(0, 11, (BATCH, 5))
        if self.kind in (
            "conv",
            "depthwise",
            "separable",
            "conv_transpose",
            "batch_norm",
            "group_norm",
            "instance_norm",
            "prelu",
        ):
            return rng.standard_normal((BATCH, *SPATIAL[: self.rank], IN)).astype(dtype)
        if self.kind in ("lstm", "gru", "rnn", "attention"):
            return rng.standard_normal((BATCH, 5, IN)).astype(dtype)
        return rng.standard_normal((BATCH, IN)).astype(dtype)


CASES = [
    Case("linear"),
    Case("linear", bias=False),
    *(Case("conv", rank=rank) for rank in (1, 2, 3)),
    Case("conv", bias=False, groups=2),
    Case("conv", dilation=2),
    Case("depthwise"),
    Case("depthwise", bias=False),
    Case("separable"),
    *(Case("conv_transpose", rank=rank) for rank in (1, 2)),
    Case("embedding"),
    Case("batch_norm"),
    Case("batch_norm", scale=False, bias=False),
    Case("layer_norm"),
    Case("layer_norm", bias=False),
    Case("rms_norm"),
    Case("group_norm", groups=3),
    Case("instance_norm"),
    Case("prelu"),
    Case("lstm"),
    Case("lstm", bidirectional=True),
    Case("lstm", layers=2),
    Case("gru"),
    Case("gru", reset_after=False),
    Case("gru", bidirectional=True),
    Case("rnn"),
    Case("attention"),
    Case("attention", bias=False),
]


@dataclass(frozen=True)
class Built:
    """model: what save and load take. call: a model and a batch -> output."""

    model: Any
    call: Callable[[Any, np.ndarray], np.ndarray]


Builder = Callable[[Case, str], Built | None]


# torch


def _torch(case: Case, dtype: str) -> Built | None:
    spatial = case.rank
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial]
    transposed = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[spatial]
    recurrent = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
    model: nn.Module
    if case.kind == "linear":
        model = nn.Linear(IN, OUT, bias=case.bias)
    elif case.kind == "conv":
        model = conv(IN, OUT, case.kernel, groups=case.groups, dilation=case.dilation, bias=case.bias)
    elif case.kind == "depthwise":
        model = conv(IN, 2 * IN, case.kernel, groups=IN, bias=case.bias)
    elif case.kind == "separable":
        model = nn.Sequential(conv(IN, 2 * IN, case.kernel, groups=IN, bias=False), conv(2 * IN, OUT, 1))
    elif case.kind == "conv_transpose":
        model = transposed(IN, OUT, case.kernel, stride=case.kernel)
    elif case.kind == "embedding":
        model = nn.Embedding(11, OUT)
    elif case.kind == "batch_norm":
        model = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[spatial](IN, affine=case.scale, eps=1e-3)
    elif case.kind == "layer_norm":
        model = nn.LayerNorm(IN, eps=1e-3, bias=case.bias)
    elif case.kind == "rms_norm":
        model = nn.RMSNorm(IN, eps=1e-3)
    elif case.kind == "group_norm":
        model = nn.GroupNorm(case.groups, IN, eps=1e-3)
    elif case.kind == "instance_norm":
        model = nn.InstanceNorm2d(IN, affine=True, eps=1e-3)
    elif case.kind == "prelu":
        model = nn.PReLU(IN)
    elif case.kind == "attention":
        model = nn.MultiheadAttention(IN, case.heads, bias=case.bias, batch_first=True)
    elif case.kind in recurrent and case.reset_after:
        model = recurrent[case.kind](IN, 5, case.layers, batch_first=True, bidirectional=case.bidirectional)
    else:
        return None
    model = model.to(getattr(torch, dtype)).eval()

    def call(model: nn.Module, batch: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.moveaxis(batch, -1, 1).copy() if batch.ndim > 2 and _channels(case) else batch)
        with torch.no_grad():
            out = model(x, x, x)[0] if case.kind == "attention" else model(x)
        out = out[0] if isinstance(out, tuple) else out
        return np.moveaxis(out.numpy(), 1, -1) if _channels(case) else out.numpy()

    return Built(model, call)


def _channels(case: Case) -> bool:
    """Whether torch and Equinox have the channels before the spatial axes."""
    kinds = ("conv", "depthwise", "separable", "conv_transpose", "batch_norm", "group_norm", "instance_norm", "prelu")
    return case.kind in kinds


# Keras


def _keras(case: Case, dtype: str) -> Built | None:
    layers = keras.layers
    options = {"use_bias": case.bias, "dtype": dtype}
    shape = case.batch(np.random.default_rng(0), dtype).shape[1:]
    recurrent = {"lstm": layers.LSTM, "gru": layers.GRU, "rnn": layers.SimpleRNN}
    conv = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}[case.rank]
    found: Any
    if case.kind == "linear":
        found = [layers.Dense(OUT, **options)]
    elif case.kind == "conv":
        found = [conv(OUT, case.kernel, groups=case.groups, dilation_rate=case.dilation, **options)]
    elif case.kind == "depthwise":
        # TensorFlow refuses a depthwise kernel with unequal strides only; unequal sizes are fine.
        found = [layers.DepthwiseConv2D(case.kernel, depth_multiplier=2, **options)]
    elif case.kind == "separable":
        found = [layers.SeparableConv2D(OUT, case.kernel, depth_multiplier=2, **options)]
    elif case.kind == "conv_transpose":
        transposed = {1: layers.Conv1DTranspose, 2: layers.Conv2DTranspose}[case.rank]
        found = [transposed(OUT, case.kernel, strides=case.kernel, **options)]
    elif case.kind == "embedding":
        found = [layers.Embedding(11, OUT, dtype=dtype)]
    elif case.kind == "batch_norm":
        found = [layers.BatchNormalization(scale=case.scale, center=case.bias, epsilon=1e-3, dtype=dtype)]
    elif case.kind == "layer_norm":
        found = [layers.LayerNormalization(center=case.bias, epsilon=1e-3, dtype=dtype)]
    elif case.kind == "rms_norm":
        found = [layers.RMSNormalization(epsilon=1e-3, dtype=dtype)]
    elif case.kind == "group_norm":
        found = [layers.GroupNormalization(case.groups, epsilon=1e-3, dtype=dtype)]
    elif case.kind == "instance_norm":
        found = [layers.GroupNormalization(-1, epsilon=1e-3, dtype=dtype)]
    elif case.kind == "prelu":
        found = [layers.PReLU(shared_axes=list(range(1, case.rank + 1)), dtype=dtype)]
    elif case.kind == "attention":
        query = keras.Input(shape, dtype=dtype)
        made = layers.MultiHeadAttention(case.heads, IN // case.heads, **options)(query, query)
        return _keras_built(keras.Model(query, made))
    elif case.kind in recurrent and not (case.kind == "rnn" and dtype == "float64"):  # which Keras cannot run on JAX
        extra = {"reset_after": case.reset_after} if case.kind == "gru" else {}
        found = [recurrent[case.kind](5, return_sequences=True, dtype=dtype, **extra) for _ in range(case.layers)]
        found = [layers.Bidirectional(layer) for layer in found] if case.bidirectional else found
    else:
        return None
    return _keras_built(keras.Sequential([keras.Input(shape, dtype="int32" if case.kind == "embedding" else dtype), *found]))


def _keras_built(model: Any) -> Built:
    return Built(model, lambda model, batch: keras.ops.convert_to_numpy(model(batch, training=False)))


# Flax nnx


def _nnx(case: Case, dtype: str) -> Built | None:
    rngs, options = nnx.Rngs(0), {"param_dtype": dtype, "dtype": dtype}
    model: Any
    if case.kind == "linear":
        model = nnx.Linear(IN, OUT, use_bias=case.bias, rngs=rngs, **options)
    elif case.kind in ("conv", "depthwise"):
        out, groups = (2 * IN, IN) if case.kind == "depthwise" else (OUT, case.groups)
        model = nnx.Conv(
            IN, out, case.kernel, feature_group_count=groups, kernel_dilation=case.dilation, padding="VALID",
            use_bias=case.bias, rngs=rngs, **options,
        )  # fmt: skip
    elif case.kind == "conv_transpose":
        model = nnx.ConvTranspose(IN, OUT, case.kernel, strides=case.kernel, padding="VALID", rngs=rngs, **options)
    elif case.kind == "embedding":
        model = nnx.Embed(11, OUT, rngs=rngs, **options)
    elif case.kind == "batch_norm" and dtype == "float32":  # its statistics always are
        model = nnx.BatchNorm(
            IN, epsilon=1e-3, use_scale=case.scale, use_bias=case.bias, use_running_average=True, rngs=rngs, **options
        )
    elif case.kind == "layer_norm":
        model = nnx.LayerNorm(IN, epsilon=1e-3, use_bias=case.bias, use_fast_variance=False, rngs=rngs, **options)
    elif case.kind == "rms_norm":
        model = nnx.RMSNorm(IN, epsilon=1e-3, rngs=rngs, **options)
    elif case.kind == "group_norm":
        model = nnx.GroupNorm(IN, case.groups, epsilon=1e-3, use_fast_variance=False, rngs=rngs, **options)
    elif case.kind == "instance_norm":
        model = nnx.InstanceNorm(IN, epsilon=1e-3, use_fast_variance=False, rngs=rngs, **options)
    elif case.kind == "attention":
        model = nnx.MultiHeadAttention(case.heads, IN, use_bias=case.bias, decode=False, rngs=rngs, **options)
    elif case.kind in _NNX_CELLS and case.reset_after and not case.bidirectional and case.layers == 1:
        model = nnx.RNN(_NNX_CELLS[case.kind](IN, 5, rngs=rngs, **options))
    else:
        return None
    return Built(model, lambda model, batch: np.asarray(model(jnp.asarray(batch))))


_NNX_CELLS: dict[str, Any] = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell, "rnn": nnx.SimpleCell}


# Flax linen


def _linen(case: Case, dtype: str) -> Built | None:
    options = {"param_dtype": dtype, "dtype": dtype}
    cells: dict[str, Any] = {"lstm": linen.LSTMCell, "gru": linen.GRUCell, "rnn": linen.SimpleCell}
    module: Any
    if case.kind == "linear":
        module = linen.Dense(OUT, use_bias=case.bias, **options)
    elif case.kind in ("conv", "depthwise"):
        out, groups = (2 * IN, IN) if case.kind == "depthwise" else (OUT, case.groups)
        module = linen.Conv(
            out, case.kernel, feature_group_count=groups, kernel_dilation=case.dilation, padding="VALID", use_bias=case.bias,
            **options,
        )  # fmt: skip
    elif case.kind == "conv_transpose":
        module = linen.ConvTranspose(OUT, case.kernel, strides=case.kernel, padding="VALID", **options)
    elif case.kind == "embedding":
        module = linen.Embed(11, OUT, **options)
    elif case.kind == "batch_norm":
        if dtype != "float32":  # its statistics always are
            return None
        module = linen.BatchNorm(True, epsilon=1e-3, use_scale=case.scale, use_bias=case.bias, **options)
    elif case.kind == "layer_norm":
        module = linen.LayerNorm(epsilon=1e-3, use_bias=case.bias, use_fast_variance=False, **options)
    elif case.kind == "rms_norm":
        module = linen.RMSNorm(epsilon=1e-3, **options)
    elif case.kind == "group_norm":
        module = linen.GroupNorm(case.groups, epsilon=1e-3, use_fast_variance=False, **options)
    elif case.kind == "attention":
        module = linen.MultiHeadDotProductAttention(case.heads, use_bias=case.bias, **options)
    elif case.kind in cells and case.reset_after and not case.bidirectional and case.layers == 1:
        module = linen.RNN(cells[case.kind](5, **options))
    else:
        return None

    class Whole(linen.Module):
        """One layer under its automatic name, as it stands in a model."""

        @linen.compact
        def __call__(self, x: Any) -> Any:
            return module.clone(parent=self, name=None)(x)

    whole = Whole()
    variables = whole.init(jax.random.key(0), jnp.asarray(case.batch(np.random.default_rng(0), dtype)))
    return Built(variables, lambda variables, batch: np.asarray(whole.apply(variables, jnp.asarray(batch))))


# Equinox


def _equinox(case: Case, dtype: str) -> Built | None:
    key, options = jax.random.key(0), {"dtype": jnp.dtype(dtype)}
    cells: dict[str, Any] = {"lstm": eqx.nn.LSTMCell, "gru": eqx.nn.GRUCell}
    model: Any
    if case.kind == "linear":
        model = eqx.nn.Linear(IN, OUT, use_bias=case.bias, key=key, **options)
    elif case.kind in ("conv", "depthwise"):
        out, groups = (2 * IN, IN) if case.kind == "depthwise" else (OUT, case.groups)
        model = eqx.nn.Conv(
            case.rank, IN, out, case.kernel, groups=groups, dilation=case.dilation, use_bias=case.bias, key=key, **options
        )
    elif case.kind == "conv_transpose":
        model = eqx.nn.ConvTranspose(case.rank, IN, OUT, case.kernel, stride=case.kernel, key=key, **options)
    elif case.kind == "embedding":
        model = eqx.nn.Embedding(11, OUT, key=key, **options)
    elif case.kind == "layer_norm":
        model = eqx.nn.LayerNorm(IN, eps=1e-3, use_bias=case.bias, **options)
    elif case.kind == "rms_norm":
        model = eqx.nn.RMSNorm(IN, eps=1e-3, use_bias=False, **options)
    elif case.kind == "group_norm":
        model = eqx.nn.GroupNorm(case.groups, IN, eps=1e-3, **options)
    elif case.kind == "attention":
        biases = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), case.bias)
        model = eqx.nn.MultiheadAttention(case.heads, IN, key=key, **biases, **options)
    elif case.kind in cells and case.reset_after and not case.bidirectional and case.layers == 1:
        model = cells[case.kind](IN, 5, key=key, **options)
    else:
        return None

    def one(model: Any, x: jax.Array) -> jax.Array:
        if case.kind == "embedding":
            return jax.vmap(model)(x)
        if case.kind == "attention":
            return model(x, x, x)
        if case.kind in cells:
            zero = jnp.zeros(5, x.dtype)
            first = (zero, zero) if case.kind == "lstm" else zero
            return jax.lax.scan(lambda h, each: ((new := model(each, h)), new[0] if case.kind == "lstm" else new), first, x)[1]
        return model(x)

    def call(model: Any, batch: np.ndarray) -> np.ndarray:
        x = jnp.asarray(np.moveaxis(batch, -1, 1) if _channels(case) else batch)
        out = np.asarray(jax.vmap(lambda each: one(model, each))(x))
        return np.moveaxis(out, 1, -1) if _channels(case) else out

    return Built(model, call)


# Haiku


def _haiku(case: Case, dtype: str) -> Built | None:
    conv = {1: hk.Conv1D, 2: hk.Conv2D, 3: hk.Conv3D}[case.rank]
    transposed = {1: hk.Conv1DTranspose, 2: hk.Conv2DTranspose, 3: hk.Conv3DTranspose}[case.rank]
    cores: dict[str, Any] = {"lstm": hk.LSTM, "gru": hk.GRU}

    def function(x: Any, training: bool = False) -> Any:
        if case.kind == "linear":
            return hk.Linear(OUT, with_bias=case.bias)(x)
        if case.kind == "conv":
            return conv(
                OUT, case.kernel, rate=case.dilation, padding="VALID", with_bias=case.bias, feature_group_count=case.groups
            )(x)
        if case.kind == "conv_transpose":
            return transposed(OUT, case.kernel, stride=case.kernel, padding="VALID")(x)
        if case.kind == "embedding":
            return hk.Embed(11, OUT)(x)
        if case.kind == "batch_norm":
            return hk.BatchNorm(case.scale, case.bias, 0.9, eps=1e-3)(x, is_training=training)
        if case.kind == "layer_norm":
            return hk.LayerNorm(-1, True, case.bias, eps=1e-3)(x)
        if case.kind == "rms_norm":
            return hk.RMSNorm(-1, eps=1e-3)(x)
        if case.kind == "group_norm":
            return hk.GroupNorm(case.groups, eps=1e-3)(x)
        core = cores[case.kind](5)
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)[0]

    known = (
        "linear",
        "conv",
        "conv_transpose",
        "embedding",
        "batch_norm",
        "layer_norm",
        "rms_norm",
        "group_norm",
        "lstm",
        "gru",
    )
    plain = not case.bidirectional and case.layers == 1 and (case.kind != "gru" or not case.reset_after)
    always_float32 = case.kind == "embedding" and dtype != "float32"
    if case.kind not in known or not plain or always_float32:
        return None
    transformed = hk.without_apply_rng(hk.transform_with_state(function))
    params, state = transformed.init(jax.random.key(0), jnp.asarray(case.batch(np.random.default_rng(0), dtype)), True)
    model = {"params": params, "state": state}

    def call(model: Any, batch: np.ndarray) -> np.ndarray:
        return np.asarray(transformed.apply(model["params"], model["state"], jnp.asarray(batch))[0])

    return Built(model, call)


FRAMEWORKS: dict[str, Builder] = {
    "torch": _torch,
    "keras": _keras,
    "nnx": _nnx,
    "linen": _linen,
    "equinox": _equinox,
    "haiku": _haiku,
}


def randomized(built: Built, rng: np.random.Generator) -> Built:
    """The same model with every number at random: positive for what is a variance, of both signs else."""

    def value(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        noise = rng.standard_normal(shape) / 2
        return (np.abs(noise) + 0.3 if "var" in name else noise).astype(dtype)

    model = built.model
    if isinstance(model, nn.Module):
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.from_numpy(value(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))))
        return built
    if isinstance(model, keras.Model):
        for variable in model.weights:
            variable.assign(value(variable.path, tuple(variable.shape), variable.dtype))
        return built
    if isinstance(model, nnx.Module):
        state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
        nnx.update(model, jax.tree_util.tree_map_with_path(lambda path, leaf: _array(value, path, leaf), state))
        return built
    leaves = eqx.filter(model, eqx.is_inexact_array)
    changed = jax.tree_util.tree_map_with_path(lambda path, leaf: _array(value, path, leaf), leaves)
    return replace(built, model=eqx.combine(changed, model))


def _array(value: Callable[..., np.ndarray], path: Any, leaf: Any) -> jax.Array:
    return jnp.asarray(value(jax.tree_util.keystr(path), leaf.shape, leaf.dtype))


def built(framework: str, case: Case, dtype: str, seed: int) -> Built | None:
    """The layer of a framework with random numbers, or None where the framework has no such layer."""
    found = _built(framework, case, dtype, seed)
    return None if found is None else randomized(found, np.random.default_rng(seed))


@functools.cache
def _built(framework: str, case: Case, dtype: str, seed: int) -> Built | None:
    """Built once, since compiling takes the time; `seed` tells apart those that are used together."""
    return FRAMEWORKS[framework](case, dtype)


assert os.environ.get("KERAS_BACKEND") in ("jax", "torch"), "the matrix runs in a process of its own"
