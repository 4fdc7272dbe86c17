"""What torch's modules are, as rows of polyckpt.layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from polyckpt.layers import CUSTOM
from polyckpt.schema import Layer, Role, to_number


@dataclass(frozen=True, slots=True)
class Row:
    """A module class: its kind, its tensors as attribute -> (role, axes), and the attributes that matter to meaning."""

    kind: str
    roles: Callable[[Any], dict[str, tuple[str, str]]]
    config: Callable[[Any], dict[str, Any]] = lambda module: {}


def _fixed(**roles: tuple[str, str]) -> Callable[[Any], dict[str, tuple[str, str]]]:
    return lambda module: roles


def _spatial(module: Any) -> str:
    return " ".join(f"k{axis}" for axis in range(1, len(module.kernel_size) + 1))


def _norm_config(module: Any) -> dict[str, Any]:
    # torch's momentum is the share of the new value; None means a cumulative average.
    return {"epsilon": module.eps, "momentum": module.momentum, "momentum_is": "share of the new"}


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


_GATES = {"LSTM": "i f g o", "GRU": "r z n", "RNN": "h"}


def _cell_roles(suffix: str) -> dict[str, tuple[str, str]]:
    return {
        f"weight_ih{suffix}": ("input_kernel", "(gate unit) in"),
        f"weight_hh{suffix}": ("recurrent_kernel", "(gate unit) out"),
        f"bias_ih{suffix}": ("input_bias", "(gate unit)"),
        f"bias_hh{suffix}": ("recurrent_bias", "(gate unit)"),
        f"weight_hr{suffix}": ("projection", "out unit"),
    }


def _cell_config(module: Any) -> dict[str, Any]:
    name = type(module).__name__.removesuffix("Cell")
    config: dict[str, Any] = {"gate_order": _GATES.get(name, "h")}
    if name == "GRU":
        config["reset_after"] = True
    if name == "RNN":
        config["activation"] = module.nonlinearity
    return config


_ROWS: dict[type[nn.Module], Row] = {
    nn.Linear: Row("linear", _fixed(weight=("kernel", "out in"), bias=("bias", "out"))),
    nn.Bilinear: Row("bilinear", _fixed(weight=("kernel", "out in1 in2"), bias=("bias", "out"))),
    nn.modules.conv._ConvTransposeNd: Row(
        "conv_transpose",
        lambda module: {"weight": ("kernel", f"in out {_spatial(module)}"), "bias": ("bias", "out")},
        lambda module: {"groups": module.groups},
    ),
    nn.modules.conv._ConvNd: Row(
        "conv",
        lambda module: {"weight": ("kernel", f"out in {_spatial(module)}"), "bias": ("bias", "out")},
        lambda module: {"groups": module.groups},
    ),
    nn.modules.instancenorm._InstanceNorm: Row("instance_norm", _RUNNING, _norm_config),
    nn.modules.batchnorm._BatchNorm: Row("batch_norm", _RUNNING, _norm_config),
    nn.LayerNorm: Row(
        "layer_norm",
        lambda module: {"weight": ("scale", _normalised(module)), "bias": ("offset", _normalised(module))},
        lambda module: {"epsilon": module.eps},
    ),
    nn.RMSNorm: Row(
        "rms_norm",
        lambda module: {"weight": ("scale", _normalised(module))},
        # None means the machine epsilon of the input's type.
        lambda module: {"epsilon": module.eps},
    ),
    nn.GroupNorm: Row(
        "group_norm",
        _fixed(weight=("scale", "c"), bias=("offset", "c")),
        lambda module: {"epsilon": module.eps, "groups": module.num_groups},
    ),
    nn.Embedding: Row("embedding", _fixed(weight=("embedding", "vocab dim"))),
    nn.EmbeddingBag: Row("embedding", _fixed(weight=("embedding", "vocab dim")), lambda module: {"reduce": module.mode}),
    nn.PReLU: Row("prelu", _fixed(weight=("slope", "c"))),
    nn.LSTMCell: Row("lstm", lambda module: _cell_roles(""), _cell_config),
    nn.GRUCell: Row("gru", lambda module: _cell_roles(""), _cell_config),
    nn.RNNCell: Row("rnn", lambda module: _cell_roles(""), _cell_config),
    nn.MultiheadAttention: Row("attention", _attention_roles, lambda module: {"heads": module.num_heads}),
}


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
    return found


def _own_keys(module: nn.Module) -> list[str]:
    """Relative keys of the tensors that a module describes: its own, and an attention's output projection."""
    # Those of a scripted module have keys() but no iterator.
    keys = [*module._parameters.keys(), *module._buffers.keys()]
    if isinstance(module, nn.MultiheadAttention):
        keys += [f"out_proj.{key}" for key in module.out_proj._parameters]
    return keys


def _tensor(module: nn.Module, key: str) -> torch.Tensor | None:
    owner, _, name = key.rpartition(".")
    owning = module.get_submodule(owner)
    return owning._parameters[name] if name in owning._parameters else owning._buffers[name]


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
    known = row.roles(module)
    if set(own) - set(known):
        # A known class with further tensors (parametrised, subclassed) is not what the row says.
        return [(_layer(path, CUSTOM, kind, {}, _custom_roles(module, own), own), list(own.values()))]
    return [(_layer(path, row.kind, kind, row.config(module), known, own), list(own.values()))]


def _row(module: nn.Module) -> Row | None:
    if not _is_plain(module):
        return None
    return next((row for kind, row in _ROWS.items() if isinstance(module, kind)), None)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what torch's class of it does: a subclass with a forward of its own may mean anything."""
    return (
        not isinstance(module, torch.jit.ScriptModule)
        and type(module).forward.__module__.startswith("torch.nn.")
        and not parametrize.is_parametrized(module)
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
            config["gate_order"] = _GATES.get(module.mode, "h")
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
