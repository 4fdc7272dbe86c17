"""What Keras's layers are, as rows of polyckpt.layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import msgspec

from polyckpt import layers
from polyckpt.adapters.keras import variables
from polyckpt.layers import CUSTOM
from polyckpt.names import type_name
from polyckpt.schema import Layer, Role, to_number

Roles = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Row:
    """A layer class: its kind, its weights as variable name -> (role, axes), and the config that matters to meaning."""

    kind: str
    roles: Callable[[Any], Roles]
    config: Callable[[Any], dict[str, Any]] = lambda layer: {}


def _fixed(**roles: tuple[str, str]) -> Callable[[Any], Roles]:
    return lambda layer: roles


def _spatial(layer: Any) -> str:
    return " ".join(f"k{axis}" for axis in range(1, len(layer.kernel_size) + 1))


def _convolution(layer: Any) -> dict[str, Any]:
    groups = {"groups": layer.groups} if hasattr(layer, "groups") else {}
    return {**groups, "channels": layer.data_format.removeprefix("channels_")}


def _normalised(layer: Any) -> str:
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    return " ".join(f"n{axis}" for axis in range(1, len(axes) + 1))


def _norm_roles(layer: Any) -> Roles:
    return {
        "gamma": ("scale", _normalised(layer)),
        "beta": ("offset", _normalised(layer)),
        "scale": ("scale", _normalised(layer)),
    }


def _epsilon(layer: Any) -> dict[str, Any]:
    return {"epsilon": layer.epsilon}


def _cell(gates: str) -> Callable[[Any], Roles]:
    def roles(layer: Any) -> Roles:
        both = getattr(layer, "reset_after", False)
        return {
            "kernel": ("input_kernel", f"in {gates}"),
            "recurrent_kernel": ("recurrent_kernel", f"out {gates}"),
            "bias": ("bias", f"which {gates}" if both else gates),
        }

    return roles


_RUNNING = {
    "gamma": ("scale", "c"),
    "beta": ("offset", "c"),
    "moving_mean": ("mean", "c"),
    "moving_variance": ("variance", "c"),
}

_CONV = Row("conv", lambda layer: {"kernel": ("kernel", f"{_spatial(layer)} in out"), "bias": ("bias", "out")}, _convolution)
_CONV_TRANSPOSE = Row(
    "conv_transpose",
    lambda layer: {"kernel": ("kernel", f"{_spatial(layer)} out in"), "bias": ("bias", "out")},
    _convolution,
)
_DEPTHWISE = Row(
    "depthwise_conv",
    lambda layer: {"kernel": ("kernel", f"{_spatial(layer)} in mult"), "bias": ("bias", "(in mult)")},
    _convolution,
)
_SEPARABLE = Row(
    "separable_conv",
    lambda layer: {
        "depthwise_kernel": ("depthwise_kernel", f"{_spatial(layer)} in mult"),
        "pointwise_kernel": ("pointwise_kernel", f"{_spatial(layer)} (in mult) out"),
        "bias": ("bias", "out"),
    },
    _convolution,
)

_ROWS: dict[str, Row] = {
    "Dense": Row("linear", _fixed(kernel=("kernel", "in out"), bias=("bias", "out"))),
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _CONV),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _CONV_TRANSPOSE),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _DEPTHWISE),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _SEPARABLE),
    "BatchNormalization": Row(
        "batch_norm",
        lambda layer: _RUNNING,
        # Keras's momentum is the share of the old value.
        lambda layer: {"epsilon": layer.epsilon, "momentum": layer.momentum, "momentum_is": "share of the old"},
    ),
    "LayerNormalization": Row("layer_norm", _norm_roles, _epsilon),
    "RMSNormalization": Row("rms_norm", _norm_roles, _epsilon),
    "GroupNormalization": Row(
        "group_norm",
        _fixed(gamma=("scale", "c"), beta=("offset", "c")),
        lambda layer: {**_epsilon(layer), "groups": layer.groups},
    ),
    "Embedding": Row("embedding", _fixed(embeddings=("embedding", "vocab dim"))),
    "ReversibleEmbedding": Row(
        "embedding", _fixed(embeddings=("embedding", "vocab dim"), reverse_embeddings=("reverse_embedding", "dim vocab"))
    ),
    "LSTMCell": Row("lstm", _cell("(gate unit)"), lambda layer: {"gate_order": "i f g o"}),
    "GRUCell": Row("gru", _cell("(gate unit)"), lambda layer: {"gate_order": "z r n", "reset_after": layer.reset_after}),
    "SimpleRNNCell": Row("rnn", _cell("unit"), lambda layer: {"gate_order": "h"}),
    "PReLU": Row("prelu", lambda layer: {"alpha": ("slope", " ".join(f"n{i}" for i in range(1, layer.alpha.ndim + 1)))}),
    "Normalization": Row(
        "normalization",
        lambda layer: (
            {
                name: (name, " ".join(f"n{i}" for i in range(1, len(layer.adapt_mean.shape) + 1)))
                for name in ("mean", "variance")
            }
            | {"count": ("count", "")}
        ),
    ),
    "Dropout": Row("dropout", _fixed(), lambda layer: {"rate": layer.rate}),
}

_OF_ANY_CALL = frozenset(
    {
        *("linear", "conv", "conv_transpose", "depthwise_conv", "separable_conv", "embedding"),
        *("batch_norm", "layer_norm", "rms_norm", "group_norm"),
    }
)
"""Kinds whose tensors have the axes of the row in a subclass with a call of its own too, one that pads in its own way."""

_RECURRENT = frozenset({"lstm", "gru", "rnn"})

_PROJECTIONS = ("query", "key", "value")
_ATTENTIONS = {"MultiHeadAttention": "num_heads", "GroupedQueryAttention": "num_query_heads"}


def describe(model: Any, names: Mapping[str, Any]) -> list[Layer]:
    """Every layer that owns weights, and every dropout; `names` are the model's weights by canonical name."""
    return [entry for _, entry in described(model, names)]


def described(model: Any, names: Mapping[str, Any]) -> list[tuple[Any, Layer]]:
    """The same with the layer of Keras that each is."""
    name_of = {id(variable): name for name, variable in names.items()}
    namer = variables.Namer(model)
    found: list[tuple[Any, Layer]] = []
    everything = variables.with_sublayers(model)
    directions = {
        id(cell): "backward" if layer.go_backwards else "forward"
        for layer in everything
        if isinstance(layer, keras.layers.RNN)
        for cell in cells(layer)
    }
    vectors = _singular_vectors(everything)
    taken = {id(vector) for vector in vectors.values()}
    for layer in everything:
        path = namer(layer.path or layer.name)
        roles = dict(_attention_roles(layer)) if type(layer).__name__ in _ATTENTIONS else {}
        if not _axes_agree(roles.values()):
            below = {id(weight) for child in variables.children(layer) for weight in child.weights}
            own = [weight for weight in layer.weights if id(weight) not in below | taken]
            own += [buffer for _, buffer in variables.buffers(layer)]
            entry = _layer(layer, path, own, name_of, directions.get(id(layer)))
            if (vector := vectors.get(id(layer))) is not None:
                named = "a0 a1" if entry.kind == CUSTOM else f"1 {entry.roles['kernel'].axes.split()[-1]}"
                role = Role(tensor=name_of[id(vector)], axes=named)
                entry = msgspec.structs.replace(entry, roles={**entry.roles, "kernel_u": role})
        else:
            own = [weight for weight, _, _ in roles.values()]
            attention = {role: Role(tensor=name_of[id(weight)], axes=axes) for role, (weight, role, axes) in roles.items()}
            config = {"heads": getattr(layer, _ATTENTIONS[type(layer).__name__])}
            if hasattr(layer, "num_key_value_heads"):
                config["key_heads"] = layer.num_key_value_heads
            entry = Layer(path=path, kind="attention", type=type_name(layer), config=config, roles=attention)
        if own or entry.kind == "dropout":
            found.append((layer, entry))
            taken |= {id(weight) for weight in own}
    return found


def _singular_vectors(everything: Sequence[Any]) -> dict[int, Any]:
    """By the identity of the layer within: what SpectralNormalization begins to iterate from. The kernel itself is normed."""
    wrappers = [layer for layer in everything if type(layer) is keras.layers.SpectralNormalization]
    return {
        id(wrapper.layer): wrapper.vector_u
        for wrapper in wrappers
        if (row := _row(wrapper.layer)) is not None and row.kind in ("linear", "conv")
    }


def order(model: Any) -> Literal["execution", "definition"]:
    """`execution` where graphs say in what order layers run, `definition` where only the code does, of one layer or of all."""
    graphs = isinstance(model, keras.Sequential) or hasattr(model, "operations")
    return (
        "execution" if graphs and not any(map(_runs_in_an_order_of_its_own, variables.with_sublayers(model))) else "definition"
    )


def _runs_in_an_order_of_its_own(layer: Any) -> bool:
    inside = variables.children(layer)
    if not inside or type(layer).call.__module__.startswith("keras."):
        return False
    below = {id(weight) for child in inside for weight in child.weights}
    return len(inside) > 1 or any(id(weight) not in below for weight in layer.weights)


def cells(recurrent: Any) -> list[Any]:
    """The cells of a recurrent layer, from the first to the last."""
    stacked = isinstance(recurrent.cell, keras.layers.StackedRNNCells)
    return list(recurrent.cell.cells) if stacked else [recurrent.cell]


def _layer(layer: Any, path: str, own: list[Any], name_of: Mapping[int, str], direction: str | None) -> Layer:
    row = _row(layer)
    known = row.roles(layer) if row else {}
    if row and all(_fits(variable, known.get(variable.name)) for variable in own):
        config = {**row.config(layer), **_activations(layer)}
        if row.kind in _RECURRENT and direction:
            config["direction"] = direction
        config = {key: to_number(value) if isinstance(value, float) else value for key, value in config.items()}
        roles = {known[variable.name][0]: Role(tensor=name_of[id(variable)], axes=known[variable.name][1]) for variable in own}
        return Layer(path=path, kind=row.kind, type=type_name(layer), config=config, roles=roles)
    equation = getattr(layer, "equation", None)
    return Layer(
        path=path,
        kind=CUSTOM,
        type=type_name(layer),
        config={"equation": equation} if isinstance(equation, str) else {},
        roles=_custom_roles(own, name_of),
    )


def _row(layer: Any) -> Row | None:
    base = next((kind for kind in type(layer).__mro__ if kind.__module__.startswith("keras.")), object)
    row = _einsum_row(layer) if base is keras.layers.EinsumDense else _ROWS.get(base.__name__)
    if getattr(layer, "rms_scaling", False):
        return None  # It divides by the standard deviation and subtracts no mean: neither layer_norm nor rms_norm.
    if row is not None and row.kind in ("layer_norm", "rms_norm") and not _normalises_last(layer):
        return None
    own_call = not type(layer).call.__module__.startswith("keras.")
    return None if row is None or (own_call and row.kind not in _OF_ANY_CALL) else row


def _normalises_last(layer: Any) -> bool:
    """Whether the normalised axes are the last ones in the order of the input's, which is what the table's norms do."""
    given = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    shape = (getattr(layer, "_build_shapes_dict", None) or {}).get("input_shape")
    if shape is None and any(axis >= 0 for axis in given):
        return False
    rank = len(shape) if shape is not None else 0
    return [axis if axis < 0 else axis - rank for axis in given] == list(range(-len(given), 0))


def _einsum_row(layer: Any) -> Row | None:
    """A contraction of the last axis with a matrix, in whatever order this has its axes: "...x,xy->...y", "abc,dc->abd"."""
    read, kernel, made = re.split(",|->", layer.equation)
    for pattern, one, other in (("in out", kernel[:1], kernel[1:]), ("out in", kernel[1:], kernel[:1])):
        ends = len(kernel) == 2 and read.endswith(one) and made.endswith(other)
        if ends and read[:-1] == made[:-1] and not {one, other} & set(read[:-1]) and layer.bias_axes in (None, other):
            return Row("linear", _fixed(kernel=("kernel", pattern), bias=("bias", "out")))
    return None


def _fits(variable: Any, role: tuple[str, str] | None) -> bool:
    return role is not None and len(layers.axes(role[1])) == len(variable.shape)


def _activations(layer: Any) -> dict[str, str]:
    """The names of the functions that are part of a layer."""
    found = {}
    for attribute in ("activation", "recurrent_activation"):
        function = getattr(layer, attribute, None)
        name = getattr(function, "__name__", type(function).__name__)
        if callable(function) and name != "linear":
            found[attribute] = name
    return found


def _custom_roles(own: list[Any], name_of: Mapping[int, str]) -> dict[str, Role]:
    """A role for each weight of an unknown layer: the last part of its name, with its place where that recurs."""
    roles: dict[str, Role] = {}
    for place, variable in enumerate(own):
        name = name_of[id(variable)]
        role = name.rpartition("/")[2]
        axes = " ".join(f"a{axis}" for axis in range(len(variable.shape)))
        roles[f"{role}:{place}" if role in roles else role] = Role(tensor=name, axes=axes)
    return roles


def _attention_roles(layer: Any) -> Iterator[tuple[str, tuple[Any, str, str]]]:
    """(role, (weight, role, axes)) of the four projections of an attention layer."""
    # Several query heads may share a key and value head; those that do are neighbours.
    query = "(head group)" if type(layer).__name__ == "GroupedQueryAttention" else "head"
    for projection in _PROJECTIONS:
        dense, head = getattr(layer, f"_{projection}_dense"), query if projection == "query" else "head"
        yield from _dense_roles(dense, projection, f"in {head} hd", f"{head} hd")
    yield from _dense_roles(layer._output_dense, "output", f"{query} hd out", "out")


def _axes_agree(roles: Iterable[tuple[Any, str, str]]) -> bool:
    """Whether there are roles, and axes of one name are of one size: not so where keys and values have other widths."""
    sizes: dict[tuple[str, ...], int] = {}
    fits = [
        len(layers.axes(pattern)) == len(weight.shape)
        and all(sizes.setdefault(axis, size) == size for axis, size in zip(layers.axes(pattern), weight.shape, strict=True))
        for weight, _, pattern in roles
    ]
    return bool(fits) and all(fits)


def _dense_roles(dense: Any, projection: str, kernel: str, bias: str) -> Iterator[tuple[str, tuple[Any, str, str]]]:
    for variable in dense.weights:
        axes = kernel if variable.name == "kernel" else bias
        yield f"{projection}_{variable.name}", (variable, f"{projection}_{variable.name}", axes)
