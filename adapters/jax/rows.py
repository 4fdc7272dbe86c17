"""The layer classes of Flax nnx and Equinox as rows of polyckpt.layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """A layer class: its kind, its tensors as dotted attribute -> (role, axes), and the attributes that matter to meaning.

    No roles at all: this one is beyond the table.
    """

    kind: str
    roles: Callable[[Any], dict[str, tuple[str, str]]]
    config: Callable[[Any], dict[str, Any]] = lambda layer: {}


def _fixed(**roles: tuple[str, str]) -> Callable[[Any], dict[str, tuple[str, str]]]:
    return lambda layer: roles


def _spatial(count: int) -> str:
    return " ".join(f"k{axis}" for axis in range(1, count + 1))


def _normalised(tensor: Any) -> str:
    return " ".join(f"n{axis}" for axis in range(1, len(tensor.shape) + 1))


# Flax nnx: kernels are stored as "in out", those of convolutions with the spatial axes first.


def _nnx_conv(layer: Any) -> dict[str, tuple[str, str]]:
    features = "out in" if getattr(layer, "transpose_kernel", False) else "in out"
    return {"kernel": ("kernel", f"{_spatial(len(layer.kernel_size))} {features}"), "bias": ("bias", "out")}


def _nnx_linear_general(layer: Any) -> dict[str, tuple[str, str]]:
    plain = len(layer.in_features) == len(layer.out_features) == 1 and not layer.batch_axis
    return {"kernel": ("kernel", "in out"), "bias": ("bias", "out")} if plain else {}


def _nnx_conv_config(layer: Any) -> dict[str, Any]:
    return {"groups": layer.feature_group_count, "channels": "last"}


def _nnx_conv_transpose_config(layer: Any) -> dict[str, Any]:
    # lax.conv_transpose does not flip the kernel unless its features are transposed too.
    return {"groups": 1, "channels": "last", "flipped": not layer.transpose_kernel}


def _nnx_einsum(layer: Any) -> dict[str, tuple[str, str]]:
    """A product of two operands that is a linear layer: the last axis of the input with one axis of a matrix."""
    operands, _, result = layer.einsum_str.replace(" ", "").partition("->")
    batch, _, kernel = operands.partition(",")
    features = {batch[:-1] + kernel[1:]: "in out", batch[:-1] + kernel[:1]: "out in"}
    if len(kernel) != 2 or kernel[0] == kernel[1] or result not in features:
        return {}
    named = features[result]
    read, made = (kernel[0], kernel[1]) if named == "in out" else (kernel[1], kernel[0])
    if not batch.endswith(read) or read in batch[:-1] or made in batch:
        return {}
    if layer.bias is not None and layer.bias.shape != (layer.kernel_shape[kernel.index(made)],):
        return {}
    return {"kernel": ("kernel", named), "bias": ("bias", "out")}


def _nnx_layer_norm(layer: Any) -> dict[str, tuple[str, str]]:
    # Other feature axes than reduction axes scale what is not normalised.
    if layer.feature_axes != layer.reduction_axes:
        return {}
    scale = layer.scale if layer.scale is not None else getattr(layer, "bias", None)
    named = _normalised(scale) if scale is not None else ""
    return {"scale": ("scale", named), "bias": ("offset", named)}


def _nnx_norm_config(layer: Any) -> dict[str, Any]:
    return {"epsilon": layer.epsilon}


def _nnx_batch_norm_config(layer: Any) -> dict[str, Any]:
    return {"epsilon": layer.epsilon, "momentum": layer.momentum, "momentum_is": "share of the old"}


def _nnx_cell(input_bias: str | None, recurrent_bias: str | None) -> Callable[[Any], dict[str, tuple[str, str]]]:
    roles = {
        "dense_i.kernel": ("input_kernel", "in (gate unit)"),
        "dense_h.kernel": ("recurrent_kernel", "out (gate unit)"),
        **({"dense_i.bias": (input_bias, "(gate unit)")} if input_bias else {}),
        **({"dense_h.bias": (recurrent_bias, "(gate unit)")} if recurrent_bias else {}),
    }
    # A residual cell adds what the table's does not.
    return lambda layer: {} if getattr(layer, "residual", False) else roles


def _nnx_cell_config(gate_order: str, **config: Any) -> Callable[[Any], dict[str, Any]]:
    def of(layer: Any) -> dict[str, Any]:
        functions = {"activation": layer.activation_fn, "recurrent_activation": getattr(layer, "gate_fn", None)}
        named = {key: function.__name__ for key, function in functions.items() if hasattr(function, "__name__")}
        return {"gate_order": gate_order, **config, **named}

    return of


def _nnx_attention_config(layer: Any) -> dict[str, Any]:
    fewer = {"key_heads": layer.num_kv_heads} if layer.num_kv_heads != layer.num_heads else {}
    return {"heads": layer.num_heads, **fewer}


_LSTM_GATES = {
    f"{part}{gate}{'_' if part + gate == 'if' else ''}.{key}": (f"{role}:{gate}", named)
    for part, key, role, named in (
        ("i", "kernel", "input_kernel", "in unit"),
        ("h", "kernel", "recurrent_kernel", "out unit"),
        ("h", "bias", "recurrent_bias", "unit"),
    )
    for gate in "ifgo"
}
_ATTENTION = {
    **{f"{short}.kernel": (f"{short}_kernel", "in head hd") for short in ("query", "key", "value")},
    **{f"{short}.bias": (f"{short}_bias", "head hd") for short in ("query", "key", "value")},
    "out.kernel": ("output_kernel", "head hd out"),
    "out.bias": ("output_bias", "out"),
}
_CHANNELS = _fixed(scale=("scale", "c"), bias=("offset", "c"))

_NNX: dict[str, Row] = {
    "Linear": Row("linear", _fixed(kernel=("kernel", "in out"), bias=("bias", "out"))),
    "LinearGeneral": Row("linear", _nnx_linear_general),
    "Einsum": Row("linear", _nnx_einsum),
    "Conv": Row("conv", _nnx_conv, _nnx_conv_config),
    "ConvTranspose": Row("conv_transpose", _nnx_conv, _nnx_conv_transpose_config),
    "Embed": Row("embedding", _fixed(embedding=("embedding", "vocab dim"))),
    "BatchNorm": Row(
        "batch_norm",
        _fixed(scale=("scale", "c"), bias=("offset", "c"), mean=("mean", "c"), var=("variance", "c")),
        _nnx_batch_norm_config,
    ),
    "LayerNorm": Row("layer_norm", _nnx_layer_norm, _nnx_norm_config),
    "RMSNorm": Row("rms_norm", _nnx_layer_norm, _nnx_norm_config),
    "GroupNorm": Row("group_norm", _CHANNELS, lambda layer: {"epsilon": layer.epsilon, "groups": layer.num_groups}),
    "InstanceNorm": Row("instance_norm", _CHANNELS, _nnx_norm_config),
    "MultiHeadAttention": Row("attention", lambda layer: _ATTENTION, _nnx_attention_config),
    "LSTMCell": Row("lstm", lambda layer: _LSTM_GATES, _nnx_cell_config("i f g o")),
    "OptimizedLSTMCell": Row("lstm", _nnx_cell(None, "bias"), _nnx_cell_config("i f g o")),
    "GRUCell": Row("gru", _nnx_cell("input_bias", None), _nnx_cell_config("r z n", reset_after=True)),
    "SimpleCell": Row("rnn", _nnx_cell("bias", None), _nnx_cell_config("h")),
    "PReLU": Row("prelu", _fixed(negative_slope=("slope", ""))),
    "Dropout": Row("dropout", _fixed(), lambda layer: {"rate": layer.rate}),
}

# Equinox: kernels are stored as "out in", those of convolutions with the spatial axes last.


def _eqx_conv(layer: Any) -> dict[str, tuple[str, str]]:
    ones = " 1" * layer.num_spatial_dims
    return {"weight": ("kernel", f"out in {_spatial(layer.num_spatial_dims)}"), "bias": ("bias", f"out{ones}")}


def _eqx_conv_transpose(layer: Any) -> dict[str, tuple[str, str]]:
    # Equinox divides "in" by the groups, where the table's kernel divides "out".
    return _eqx_conv(layer) if layer.groups == 1 else {}


def _eqx_conv_config(layer: Any) -> dict[str, Any]:
    return {"groups": layer.groups, "channels": "first"}


_EQX_STATISTICS = {
    "ema": {
        "ema_state_index.0": ("mean", "c"),
        "ema_state_index.1": ("variance", "c"),
        "ema_first_time_index": ("unset", ""),
    },
    "batch": {
        "batch_state_index.0": ("mean_biased", "c"),
        "batch_state_index.1": ("variance_biased", "c"),
        "batch_counter": ("mean_updates", ""),
    },
}


def _eqx_batch_norm(layer: Any) -> dict[str, tuple[str, str]]:
    return {"weight": ("scale", "c"), "bias": ("offset", "c"), **_EQX_STATISTICS[layer.mode]}


def _eqx_norm(layer: Any) -> dict[str, tuple[str, str]]:
    named = " ".join(f"n{axis}" for axis in range(1, len(layer.shape) + 1))
    return {"weight": ("scale", named), "bias": ("offset", named)}


def _eqx_rms_norm(layer: Any) -> dict[str, tuple[str, str]]:
    return {"weight": _eqx_norm(layer)["weight"]} if layer.bias is None else {}


def _eqx_cell(**biases: tuple[str, str]) -> Callable[[Any], dict[str, tuple[str, str]]]:
    return _fixed(weight_ih=("input_kernel", "(gate unit) in"), weight_hh=("recurrent_kernel", "(gate unit) out"), **biases)


def _eqx_prelu(layer: Any) -> dict[str, tuple[str, str]]:
    return {"negative_slope": ("slope", "c" if layer.negative_slope.ndim == 1 else "")}


_EQX_ATTENTION = {
    **{f"{role}_proj.weight": (f"{role}_kernel", "(head hd) in") for role in ("query", "key", "value")},
    **{f"{role}_proj.bias": (f"{role}_bias", "(head hd)") for role in ("query", "key", "value")},
    "output_proj.weight": ("output_kernel", "out (head hd)"),
    "output_proj.bias": ("output_bias", "out"),
}
_EQX_CHANNELS = _fixed(weight=("scale", "c"), bias=("offset", "c"))

_EQUINOX: dict[str, Row] = {
    "Linear": Row("linear", _fixed(weight=("kernel", "out in"), bias=("bias", "out"))),
    "Conv": Row("conv", _eqx_conv, _eqx_conv_config),
    "ConvTranspose": Row("conv_transpose", _eqx_conv_transpose, lambda layer: {**_eqx_conv_config(layer), "flipped": True}),
    "Embedding": Row("embedding", _fixed(weight=("embedding", "vocab dim"))),
    "LayerNorm": Row("layer_norm", _eqx_norm, lambda layer: {"epsilon": layer.eps}),
    "RMSNorm": Row("rms_norm", _eqx_rms_norm, lambda layer: {"epsilon": layer.eps}),
    "GroupNorm": Row("group_norm", _EQX_CHANNELS, lambda layer: {"epsilon": layer.eps, "groups": layer.groups}),
    "BatchNorm": Row(
        "batch_norm",
        _eqx_batch_norm,
        lambda layer: {"epsilon": layer.eps, "momentum": layer.momentum, "momentum_is": "share of the old"},
    ),
    "LSTMCell": Row("lstm", _eqx_cell(bias=("bias", "(gate unit)")), lambda layer: {"gate_order": "i f g o"}),
    "GRUCell": Row(
        "gru",
        _eqx_cell(bias=("input_bias", "(gate unit)"), bias_n=("recurrent_bias", "unit")),
        lambda layer: {"gate_order": "r z n", "reset_after": True, "recurrent_bias_gates": "n"},
    ),
    "MultiheadAttention": Row("attention", lambda layer: _EQX_ATTENTION, lambda layer: {"heads": layer.num_heads}),
    "PReLU": Row("prelu", _eqx_prelu),
    "Dropout": Row("dropout", _fixed(), lambda layer: {"rate": layer.p}),
}
_ROWS = {"flax.nnx": _NNX, "equinox.nn": _EQUINOX}


def _reparametrised(node: Any) -> Row | None:
    """The row of a layer that computes the kernel of the layer it holds of other tensors."""
    kinds = {(package, kind.__name__) for package, kind in classes(node)}
    wrapper = next((each for known, each in _WRAPPERS.items() if known in kinds), None)
    return wrapper(node) if wrapper else None


def _wrapped(inner: Any, attribute: str, weight: str) -> tuple[Row, list[str], dict[str, tuple[str, str]]] | None:
    """The row of the layer within, the axes of its kernel, which is `weight`, and its other roles by their attributes."""
    row = row_of(inner)
    roles = dict(row.roles(inner)) if row else {}
    if row is None or roles.get(weight, ("",))[0] != "kernel" or not is_plain(inner):
        return None
    parts = roles.pop(weight)[1].split()
    return row, parts, {f"{attribute}.{key}": role for key, role in roles.items()}


def _eqx_weight_norm(node: Any) -> Row | None:
    if (found := _wrapped(node.layer, "layer", node.weight_name)) is None:
        return None
    row, parts, held = found
    kept = " ".join(part if place == node.axis else "1" for place, part in enumerate(parts))
    held |= {f"layer.{node.weight_name}": ("kernel_direction", " ".join(parts)), "g": ("kernel_norm", kept)}
    return Row(row.kind, lambda _: held, lambda _: row.config(node.layer))


def _eqx_spectral_norm(node: Any) -> Row | None:
    if (found := _wrapped(node.layer, "layer", node.weight_name)) is None:
        return None
    row, parts, held = found
    held |= {f"layer.{node.weight_name}": ("kernel_raw", " ".join(parts))}
    held |= {"uv_index.0": ("kernel_u", parts[0]), "uv_index.1": ("kernel_v", "rest")}
    return Row(row.kind, lambda _: held, lambda _: row.config(node.layer))


def _nnx_weight_norm(node: Any) -> Row | None:
    if (found := _wrapped(node.layer_instance, "layer_instance", "kernel")) is None:
        return None
    row, parts, held = found
    if node.feature_axes not in (-1, (-1,)) or not node.scales or list(node.scales) != [("kernel",)]:
        return None
    held |= {
        "layer_instance.kernel": ("kernel_direction", " ".join(parts)),
        f"scales.{('kernel',)}": ("kernel_norm", parts[-1]),
    }
    return Row(row.kind, lambda _: held, lambda _: {**row.config(node.layer_instance), "norm_epsilon": node.epsilon})


_WRAPPERS: dict[tuple[str, str], Callable[[Any], Row | None]] = {
    ("equinox.nn", "WeightNorm"): _eqx_weight_norm,
    ("equinox.nn", "SpectralNorm"): _eqx_spectral_norm,
    ("flax.nnx", "WeightNorm"): _nnx_weight_norm,
}
"""(package, class) -> its row. Flax's SpectralNorm iterates in evaluation too: its kernel is not what its state says."""


def row_of(node: Any) -> Row | None:
    """The row of the nearest class of `node` that is a layer of a library."""
    if reparametrises(node):
        return _reparametrised(node)
    return next((_ROWS[package][kind.__name__] for package, kind in classes(node) if kind.__name__ in _ROWS[package]), None)


def is_plain(node: Any) -> bool:
    """Whether `node` computes as the class of its row does: a subclass may have a call of its own."""
    kind = next(kind for package, kind in classes(node) if kind.__name__ in {*_ROWS[package], *_REPARAMETRISING})
    return type(node).__call__ is kind.__call__


def classes(node: Any) -> Iterator[tuple[str, Any]]:
    """The classes of `node` that are a library's, as (package, class)."""
    for kind in type(node).__mro__:
        yield from ((package, kind) for package in _ROWS if kind.__module__.startswith(f"{package}."))


def reparametrises(node: Any) -> bool:
    """Whether `node` changes the weights of the layers it holds before it applies them: they are not what they seem."""
    return any(kind.__name__ in _REPARAMETRISING for _, kind in classes(node))


_REPARAMETRISING = ("WeightNorm", "SpectralNorm")


def directed(node: Any) -> Iterator[tuple[Any, str]]:
    """The recurrent cells that `node` runs through a sequence, each with its direction."""
    names = [kind.__name__ for package, kind in classes(node) if package == "flax.nnx"]
    if "Bidirectional" in names:
        yield getattr(node.forward_rnn, "cell", None), "forward"
        yield getattr(node.backward_rnn, "cell", None), "backward"
    elif "RNN" in names:
        yield node.cell, "backward" if node.reverse else "forward"
