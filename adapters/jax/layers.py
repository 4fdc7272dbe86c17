"""What the layers of Flax nnx and Equinox are, as rows of polyckpt.layers. Trees without layer classes are "custom"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from polyckpt import names
from polyckpt.adapters.jax import trees
from polyckpt.layers import CUSTOM, axes
from polyckpt.leaves import Leaf
from polyckpt.schema import Layer, Role, to_number


@dataclass(frozen=True, slots=True)
class Row:
    """A layer class: its kind, its tensors as dotted attribute -> (role, axes), and the attributes that matter to meaning.

    No roles at all: this one is beyond the table.
    """

    kind: str
    roles: Callable[[Any], dict[str, tuple[str, str]]]
    config: Callable[[Any], dict[str, Any]] = lambda layer: {}


def describe(tree: Any, weights: Mapping[str, Leaf]) -> tuple[list[Layer], Literal["definition", "name"]]:
    """A layer for every object that holds some of `weights`, and their order.

    Objects and sequences keep the order of definition; JAX sorts the keys of a dict.
    """
    described = _Describer(tree, weights)
    # A model that is one array has no layer to it but itself.
    described.visit({"": tree} if isinstance(tree, jax.Array) else tree, ())
    return described.layers, "name" if described.sorted else "definition"


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


def _nnx_layer_norm(layer: Any) -> dict[str, tuple[str, str]]:
    # Other feature axes than reduction axes scale what is not normalised.
    if layer.feature_axes != layer.reduction_axes:
        return {}
    scale = layer.scale if layer.scale is not None else layer.bias
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
    return lambda layer: roles


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
    "Conv": Row("conv", _nnx_conv, lambda layer: {"groups": layer.feature_group_count}),
    # lax.conv_transpose does not flip the kernel unless its features are transposed too.
    "ConvTranspose": Row("conv_transpose", _nnx_conv, lambda layer: {"groups": 1, "flipped": not layer.transpose_kernel}),
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
    "MultiHeadAttention": Row("attention", lambda layer: _ATTENTION, lambda layer: {"heads": layer.num_heads}),
    "OptimizedLSTMCell": Row("lstm", _nnx_cell(None, "bias"), lambda layer: {"gate_order": "i f g o"}),
    "GRUCell": Row("gru", _nnx_cell("input_bias", None), lambda layer: {"gate_order": "r z n", "reset_after": True}),
    "SimpleCell": Row("rnn", _nnx_cell("bias", None), lambda layer: {"gate_order": "h"}),
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
    "Conv": Row("conv", _eqx_conv, lambda layer: {"groups": layer.groups}),
    "ConvTranspose": Row("conv_transpose", _eqx_conv_transpose, lambda layer: {"groups": layer.groups, "flipped": True}),
    "Embedding": Row("embedding", _fixed(weight=("embedding", "vocab dim"))),
    "LayerNorm": Row("layer_norm", _eqx_norm, lambda layer: {"epsilon": layer.eps}),
    "RMSNorm": Row("rms_norm", _eqx_rms_norm, lambda layer: {"epsilon": layer.eps}),
    "GroupNorm": Row("group_norm", _EQX_CHANNELS, lambda layer: {"epsilon": layer.eps, "groups": layer.groups}),
    "BatchNorm": Row(
        "batch_norm",
        _EQX_CHANNELS,
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


def _row(node: Any) -> Row | None:
    """The row of the nearest class of `node` that is a layer of a library."""
    for kind in type(node).__mro__:
        for package, rows in _ROWS.items():
            if kind.__module__.startswith(f"{package}.") and kind.__name__ in rows:
                return rows[kind.__name__]
    return None


class _Describer:
    def __init__(self, tree: Any, weights: Mapping[str, Leaf]) -> None:
        self.layers: list[Layer] = []
        self.sorted = False
        self._weights = weights
        # A shared Variable has one name, wherever a module is met.
        self._variables = {id(variable): path for variable, path in trees.variable_paths(tree)}
        self._taken: set[str] = set()
        self._seen: set[int] = set()

    def visit(self, node: Any, path: tuple[Any, ...]) -> None:
        """Add the layer of `node`, then those below it."""
        if trees.is_graph(node):
            if id(node) in self._seen:
                return
            self._seen.add(id(node))
        self._add_known(node, path)
        below = [(segment, *self._unwrapped(child, (*path, segment))) for segment, child in self._children(node)]
        self.sorted |= (
            isinstance(node, Mapping) and not trees.is_graph(node) and sum(trees.is_node(child) for _, child, _ in below) > 1
        )
        own = {str(segment): names.join(at) for segment, child, at in below if self._is_weight(child, at)}
        if own:
            self._add(node, path, CUSTOM, {}, {key: (name, (key, self._numbered(name))) for key, name in own.items()})
        for _, child, at in below:
            if trees.is_graph(child) or trees.is_node(child):
                self.visit(child, at)

    def _add_known(self, node: Any, path: tuple[Any, ...]) -> None:
        if (row := _row(node)) is None:
            return
        roles = row.roles(node)
        found = {key: name for key in roles if (name := self._resolve(node, path, key)) is not None}
        # Stacked layers (vmap, scan) have further axes, which no row names.
        fits = all(len(axes(roles[key][1])) == len(self._weights[name].shape) for key, name in found.items())
        if fits and (found or row.kind == "dropout"):
            self._add(node, path, row.kind, row.config(node), {key: (name, roles[key]) for key, name in found.items()})

    def _resolve(self, node: Any, path: tuple[Any, ...], key: str) -> str | None:
        """The name of the weight that is the attribute `key` of `node`, unless another layer has it."""
        for attribute in key.split("."):
            node, path = getattr(node, attribute, None), (*path, attribute)
        node, path = self._unwrapped(node, path)
        return names.join(path) if self._is_weight(node, path) else None

    def _unwrapped(self, child: Any, path: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        if trees.is_variable(child):
            return child.get_value(), self._variables.get(id(child), path)
        return child, path

    def _is_weight(self, child: Any, path: tuple[Any, ...]) -> bool:
        name = names.join(path)
        return hasattr(child, "shape") and name in self._weights and name not in self._taken

    def _children(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if not trees.is_graph(node):
            yield from trees.children(node)
            return
        for attribute, child in vars(node).items():
            if not attribute.startswith("_pytree__"):
                yield attribute, child

    def _numbered(self, name: str) -> str:
        return " ".join(f"a{axis}" for axis in range(len(self._weights[name].shape)))

    def _add(
        self,
        node: Any,
        path: tuple[Any, ...],
        kind: str,
        config: dict[str, Any],
        roles: Mapping[str, tuple[str, tuple[str, str]]],
    ) -> None:
        described = {role: Role(tensor=name, axes=named) for name, (role, named) in roles.values()}
        numbers = {key: to_number(value) if isinstance(value, float) else value for key, value in config.items()}
        self._taken.update(name for name, _ in roles.values())
        self.layers.append(Layer(path=names.join(path), kind=kind, type=names.type_name(node), config=numbers, roles=described))
