"""What torch's modules are, as rows of polyckpt.layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyckpt.adapters.torch import reparametrised
from polyckpt.layers import CUSTOM, axes
from polyckpt.schema import Layer, Role, to_number


@dataclass(frozen=True, slots=True)
class Row:
    """A module class: its kind, its tensors as attribute -> (role, axes), and the attributes that matter to meaning.

    weight: the shape that `weight` has by the module's attributes, where a subclass with a forward of its own is described
    too: a convolution that pads in its own way has the kernel of any other.
    """

    kind: str
    roles: Callable[[Any], dict[str, tuple[str, str]]]
    config: Callable[[Any], dict[str, Any]] = lambda module: {}
    weight: Callable[[Any], tuple[int, ...]] | None = None


def _fixed(**roles: tuple[str, str]) -> Callable[[Any], dict[str, tuple[str, str]]]:
    return lambda module: roles


def _spatial(module: Any) -> str:
    return " ".join(f"k{axis}" for axis in range(1, len(module.kernel_size) + 1))


def _conv_config(module: Any) -> dict[str, Any]:
    return {"groups": module.groups, "channels": "first"}


def _norm_config(module: Any) -> dict[str, Any]:
    # torch's momentum is the share of the new value; None means a cumulative average.
    return {"epsilon": module.eps, "momentum": module.momentum, "momentum_is": "share of the new"}


def _features(module: Any) -> tuple[int, ...]:
    return (module.num_features,)


def _normalised(module: Any) -> str:
    return " ".join(f"n{axis}" for axis in range(1, len(module.normalized_shape) + 1))


_RUNNING = _fixed(
    weight=("scale", "c"),
    bias=("offset", "c"),
    running_mean=("mean", "c"),
    running_var=("variance", "c"),
    num_batches_tracked=("count", ""),
)


def _attention_roles(module: nn.MultiheadAttention) -> dict[str, tuple[str, str]]:
    roles = {
        f"{short}_proj_weight": (f"{name}_kernel", "(head hd) in")
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
    }
    return {
        **roles,
        "in_proj_weight": ("qkv_kernel", "(qkv head hd) in"),
        "in_proj_bias": ("qkv_bias", "(qkv head hd)"),
        "bias_k": ("key_extra", "1 1 (head hd)"),
        "bias_v": ("value_extra", "1 1 (head hd)"),
        "out_proj.weight": ("output_kernel", "out (head hd)"),
        "out_proj.bias": ("output_bias", "out"),
    }


def _cell_roles(suffix: str) -> dict[str, tuple[str, str]]:
    return {
        f"weight_ih{suffix}": ("input_kernel", "(gate unit) in"),
        f"weight_hh{suffix}": ("recurrent_kernel", "(gate unit) out"),
        f"bias_ih{suffix}": ("input_bias", "(gate unit)"),
        f"bias_hh{suffix}": ("recurrent_bias", "(gate unit)"),
        f"weight_hr{suffix}": ("projection", "out unit"),
    }


def _cell_config(module: Any) -> dict[str, Any]:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return {"gate_order": "i f g o"}
    if isinstance(module, nn.GRU | nn.GRUCell):
        return {"gate_order": "r z n", "reset_after": True}
    return {"gate_order": "h", "activation": module.nonlinearity}


_ROWS: dict[type[nn.Module], Row] = {
    nn.Linear: Row(
        "linear",
        _fixed(weight=("kernel", "out in"), bias=("bias", "out")),
        weight=lambda module: (module.out_features, module.in_features),
    ),
    nn.Bilinear: Row("bilinear", _fixed(weight=("kernel", "out in1 in2"), bias=("bias", "out"))),
    nn.modules.conv._ConvTransposeNd: Row(
        "conv_transpose",
        lambda module: {"weight": ("kernel", f"in out {_spatial(module)}"), "bias": ("bias", "out")},
        _conv_config,
        lambda module: (module.in_channels, module.out_channels // module.groups, *module.kernel_size),
    ),
    nn.modules.conv._ConvNd: Row(
        "conv",
        lambda module: {"weight": ("kernel", f"out in {_spatial(module)}"), "bias": ("bias", "out")},
        _conv_config,
        lambda module: (module.out_channels, module.in_channels // module.groups, *module.kernel_size),
    ),
    nn.modules.instancenorm._InstanceNorm: Row("instance_norm", _RUNNING, _norm_config, _features),
    nn.modules.batchnorm._BatchNorm: Row("batch_norm", _RUNNING, _norm_config, _features),
    nn.LayerNorm: Row(
        "layer_norm",
        lambda module: {"weight": ("scale", _normalised(module)), "bias": ("offset", _normalised(module))},
        lambda module: {"epsilon": module.eps},
        lambda module: tuple(module.normalized_shape),
    ),
    nn.RMSNorm: Row(
        "rms_norm",
        lambda module: {"weight": ("scale", _normalised(module))},
        # None means the machine epsilon of the input's type.
        lambda module: {"epsilon": module.eps},
        lambda module: tuple(module.normalized_shape),
    ),
    nn.GroupNorm: Row(
        "group_norm",
        _fixed(weight=("scale", "c"), bias=("offset", "c")),
        lambda module: {"epsilon": module.eps, "groups": module.num_groups},
        lambda module: (module.num_channels,),
    ),
    nn.Embedding: Row(
        "embedding",
        _fixed(weight=("embedding", "vocab dim")),
        weight=lambda module: (module.num_embeddings, module.embedding_dim),
    ),
    nn.EmbeddingBag: Row("embedding", _fixed(weight=("embedding", "vocab dim")), lambda module: {"reduce": module.mode}),
    nn.PReLU: Row("prelu", _fixed(weight=("slope", "c"))),
    nn.LSTMCell: Row("lstm", lambda module: _cell_roles(""), _cell_config),
    nn.GRUCell: Row("gru", lambda module: _cell_roles(""), _cell_config),
    nn.RNNCell: Row("rnn", lambda module: _cell_roles(""), _cell_config),
    nn.MultiheadAttention: Row("attention", _attention_roles, lambda module: {"heads": module.num_heads}),
}

_TRANSFORMERS_LINEAR = Row("linear", _fixed(weight=("kernel", "in out"), bias=("bias", "out")))
_FROZEN_BATCH_NORM = Row(
    "batch_norm", _RUNNING, lambda module: {"epsilon": module.eps} if isinstance(getattr(module, "eps", None), float) else {}
)
_OTHER_RMS_NORM = Row("rms_norm", _fixed(weight=("scale", "n1")), lambda module: {"epsilon": _epsilon(module)})


def describe(model: nn.Module, rename: Callable[[str], str]) -> list[Layer]:
    """Every module that owns tensors, and every dropout, in definition order; `rename` makes names canonical."""
    return [layer for _, layer in described(model, rename)]


def described(model: nn.Module, rename: Callable[[str], str]) -> list[tuple[nn.Module, Layer]]:
    """The same with the module that each layer is: one for each depth and direction of a recurrent one."""
    found: list[tuple[nn.Module, Layer]] = []
    taken: set[str] = set()
    stored = set(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        own = {
            key: f"{path}.{key}".lstrip(".")
            for key in _own_keys(module)
            if f"{path}.{key}".lstrip(".") in stored and f"{path}.{key}".lstrip(".") not in taken
        }
        for layer, keys in _layers_of(module, rename(path), own):
            found.append((module, _renamed(layer, rename)))
            taken.update(keys)
    return _without_ties(found, model, rename)


def _without_ties(
    found: list[tuple[nn.Module, Layer]], model: nn.Module, rename: Callable[[str], str]
) -> list[tuple[nn.Module, Layer]]:
    """All but modules whose every tensor is one that a layer of known kind has too: they only hold it once more."""
    tensors = {rename(key): tensor for key, tensor in model.state_dict(keep_vars=True).items()}
    known = {id(tensors[role.tensor]) for _, layer in found if layer.kind != CUSTOM for role in layer.roles.values()}
    return [
        (module, layer)
        for module, layer in found
        if layer.kind != CUSTOM or any(id(tensors[role.tensor]) not in known for role in layer.roles.values())
    ]


def _own_keys(module: nn.Module) -> list[str]:
    """Relative keys of the tensors that a module describes: its own, an attention's output projection, what makes a kernel."""
    # Those of a scripted module have keys() but no iterator.
    keys = [*module._parameters.keys(), *module._buffers.keys()]
    if isinstance(module, nn.MultiheadAttention):
        keys += [f"out_proj.{key}" for key in module.out_proj._parameters]
    return keys + reparametrised.keys(module)


def _tensor(module: nn.Module, key: str) -> torch.Tensor | None:
    owner, _, name = key.rpartition(".")
    owning: Any = module.get_submodule(owner) if owner else module
    found: torch.Tensor | None = owning._parameters[name] if name in owning._parameters else owning._buffers[name]
    return found


def _layers_of(module: nn.Module, path: str, own: dict[str, str]) -> list[tuple[Layer, Sequence[str]]]:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, nn.RNNBase) and _is_plain(module):
        found = _recurrent_layers(module, path, kind, own)
        if {name for _, names in found for name in names} == set(own.values()):
            return found
    row = _row(module)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [(Layer(path=path, kind="dropout", type=kind, config={"rate": module.p}), [])]
    if not own and any(_tensor(module, key) is not None for key in _own_keys(module)):
        return []  # another layer's: the output projection of an attention
    if row is None:
        return [(_layer(path, CUSTOM, kind, {}, _custom_roles(module, own), own), list(own.values()))] if own else []
    plain = row.roles(module)
    known = plain | reparametrised.roles(module, plain.get("weight"))
    if set(own) - set(known):
        # A known class with further tensors (parametrised, subclassed) is not what the row says.
        return [(_layer(path, CUSTOM, kind, {}, _custom_roles(module, own), own), list(own.values()))]
    return [(_layer(path, row.kind, kind, row.config(module), known, own), list(own.values()))]


def _row(module: nn.Module) -> Row | None:
    if isinstance(module, torch.jit.ScriptModule) or reparametrised.is_another(module):
        return None
    row = next((row for kind, row in _ROWS.items() if isinstance(module, kind)), None)
    if row is None:
        return _row_of_another(module)
    return row if _is_plain(module) or _has_shapes(module, row) else None


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what torch's class of it does: a subclass with a forward of its own may mean anything."""
    return (
        not isinstance(module, torch.jit.ScriptModule)
        and type(module).forward.__module__.startswith("torch.nn.")
        and not reparametrised.is_another(module)
    )


def _has_shapes(module: nn.Module, row: Row) -> bool:
    """Whether a subclass, which may have packed its weight or lack attributes, has tensors of the shapes that the row says."""
    if row.weight is None:
        return False
    try:
        weight, roles, _ = row.weight(module), row.roles(module), row.config(module)
    except AttributeError:
        return False
    tensors = {key: tensor for key in _own_keys(module) if (tensor := _tensor(module, key)) is not None}
    return (
        all(key in roles and len(axes(roles[key][1])) == tensor.ndim for key, tensor in tensors.items())
        and "weight" in tensors
        and tuple(tensors["weight"].shape) == weight
    )


def _row_of_another(module: nn.Module) -> Row | None:
    """The row of a module that is none of torch's, but that other libraries have a copy each of."""
    kind, held = type(module), {key for key in _own_keys(module) if _tensor(module, key) is not None}
    if f"{kind.__module__}.{kind.__qualname__}" == "transformers.pytorch_utils.Conv1D":
        return _TRANSFORMERS_LINEAR
    if "BatchNorm" in kind.__name__ and held == {"weight", "bias", "running_mean", "running_var"} == set(module._buffers):
        return _FROZEN_BATCH_NORM
    if kind.__name__.endswith(("RMSNorm", "LayerNorm")) and held == {"weight"} and _is_rms_norm(module):
        return _OTHER_RMS_NORM
    return None


def _epsilon(module: nn.Module) -> Any:
    return next(
        (value for name in ("eps", "variance_epsilon", "epsilon") if (value := vars(module).get(name)) is not None), None
    )


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module computes x / sqrt(mean(x^2) + epsilon) * weight, as seen by doing it; some add one to the weight."""
    weight, epsilon = module._parameters.get("weight"), _epsilon(module)
    if weight is None or weight.ndim != 1 or not weight.is_floating_point() or not isinstance(epsilon, float):
        return False
    with torch.no_grad():
        x = torch.linspace(-1, 3, 2 * len(weight), device=weight.device).reshape(2, -1).to(weight.dtype)
        try:
            found = type(module).forward(module, x)  # past all hooks
        except Exception:
            return False
        wide = x.double()
        expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight.double()
        precision = 4 * torch.finfo(weight.dtype).eps
        return (
            isinstance(found, torch.Tensor)
            and bool(expected.any())
            and found.shape == x.shape
            and torch.allclose(found.double(), expected, rtol=precision, atol=precision)
        )


def _recurrent_layers(module: nn.RNNBase, path: str, kind: str, own: dict[str, str]) -> list[tuple[Layer, Sequence[str]]]:
    """One layer for each depth and direction: `path.l0`, `path.l0_reverse`, ..."""
    found: list[tuple[Layer, Sequence[str]]] = []
    for depth in range(module.num_layers):
        for direction in ("", "_reverse") if module.bidirectional else ("",):
            suffix = f"_l{depth}{direction}"
            roles = _cell_roles(suffix)
            keys = {key: name for key, name in own.items() if key in roles}
            config = {**_cell_config(module), "direction": "backward" if direction else "forward"}
            name = {"LSTM": "lstm", "GRU": "gru"}.get(module.mode, "rnn")
            found.append(
                (
                    _layer(f"{path}{suffix.replace('_', '.', 1)}".lstrip("."), name, kind, config, roles, keys),
                    list(keys.values()),
                )
            )
    return found


def _custom_roles(module: nn.Module, own: dict[str, str]) -> dict[str, tuple[str, str]]:
    roles = {}
    for key in own:
        tensor = _tensor(module, key)
        assert tensor is not None  # it stands in the state dict
        roles[key] = (key, " ".join(f"a{axis}" for axis in range(tensor.ndim)))
    return roles


def _layer(
    path: str, kind: str, type_name: str, config: dict[str, Any], roles: dict[str, tuple[str, str]], own: dict[str, str]
) -> Layer:
    described = {roles[key][0]: Role(tensor=name, axes=roles[key][1]) for key, name in own.items()}
    numbers = {key: to_number(value) if isinstance(value, float) else value for key, value in config.items()}
    return Layer(path=path, kind=kind, type=type_name, config=numbers, roles=described)


def _renamed(layer: Layer, rename: Callable[[str], str]) -> Layer:
    roles = {role: Role(tensor=rename(entry.tensor), axes=entry.axes) for role, entry in layer.roles.items()}
    return Layer(path=layer.path, kind=layer.kind, type=layer.type, config=layer.config, roles=roles)
