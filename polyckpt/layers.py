"""Layer kinds, the roles of their parameters, and the named axes of each role.

A role's axes are a set: a producer stores them in its own order, which the manifest writes einops style ("out in",
"in (gate unit)", "" for a 0-d tensor). Axes named alike within one layer have the same size. A recurrent layer that holds its
gates apart has roles "<role>:<gate>". What entries of a layer's config mean is in FORMAT.md.

==============  =============================================================================================
axis            meaning
==============  =============================================================================================
in, out         features read and made; for a grouped convolution `in` is per group (`out` where transposed)
k1, k2, k3      spatial axes of a kernel, in the order of the input's
mult            outputs per input channel of a depthwise convolution
c               channels or features of a normalisation or activation
n1, n2, ...     the normalised axes of a layer normalisation, in the order of the input's
vocab, dim      rows and columns of an embedding
gate, unit      gates of a recurrent cell (order in the config, `gate_order`) and its hidden units
which           input or recurrent part, where one bias tensor holds both
rest            all axes of a kernel but that of `kernel_u`, as one
qkv, head, hd   query/key/value, attention heads, features of a head
group           query heads that share a head of keys and values, where several do
1               an axis of size one that means nothing; every kind may have it
==============  =============================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from polyckpt.schema import Layer

_KERNEL = frozenset({"in", "out", "k1", "k2", "k3"})
_NORMALISED = frozenset({"c", *(f"n{i}" for i in range(1, 9))})
_CELL = frozenset({"in", "gate", "unit"})
_ATTENTION = frozenset({"in", "out", "qkv", "head", "group", "hd"})
_BIAS = frozenset({"out"})
_REPARAMETRISED = {
    "kernel_direction": _KERNEL,
    "kernel_norm": _KERNEL,
    "kernel_raw": _KERNEL,
    "kernel_u": _KERNEL,
    "kernel_v": frozenset({"rest"}),
}
_CHANNELS = frozenset({"c"})

_RECURRENT = {
    "input_kernel": _CELL,
    "recurrent_kernel": frozenset({"gate", "unit", "out"}),
    "input_bias": frozenset({"gate", "unit"}),
    "recurrent_bias": frozenset({"gate", "unit"}),
    "bias": frozenset({"which", "gate", "unit"}),
    "kernel": frozenset({"in", "unit", "gate"}),
    "projection": frozenset({"unit", "out"}),
}

KINDS: dict[str, dict[str, frozenset[str]]] = {
    "linear": {"kernel": frozenset({"in", "out"}), "bias": _BIAS, **_REPARAMETRISED},
    "bilinear": {"kernel": frozenset({"out", "in1", "in2"}), "bias": _BIAS},
    "conv": {"kernel": _KERNEL, "bias": _BIAS, **_REPARAMETRISED},
    "conv_transpose": {"kernel": _KERNEL, "bias": _BIAS, **_REPARAMETRISED},
    "depthwise_conv": {"kernel": _KERNEL - {"out"} | {"mult"}, "bias": frozenset({"in", "mult"})},
    "separable_conv": {
        "depthwise_kernel": _KERNEL - {"out"} | {"mult"},
        "pointwise_kernel": _KERNEL | {"mult"},
        "bias": _BIAS,
    },
    "batch_norm": {
        "scale": _CHANNELS,
        "offset": _CHANNELS,
        "mean": _CHANNELS,
        "variance": _CHANNELS,
        "count": frozenset(),
        # Averages that began at zero, and their numbers of updates, by which those above are put right.
        "mean_biased": _CHANNELS,
        "variance_biased": _CHANNELS,
        "mean_updates": frozenset(),
        "variance_updates": frozenset(),
        "unset": frozenset(),  # true as long as there are no averages
    },
    "layer_norm": {"scale": _NORMALISED, "offset": _NORMALISED},
    "rms_norm": {"scale": _NORMALISED},
    "group_norm": {"scale": _CHANNELS, "offset": _CHANNELS},
    "instance_norm": {
        "scale": _CHANNELS,
        "offset": _CHANNELS,
        "mean": _CHANNELS,
        "variance": _CHANNELS,
        "count": frozenset(),
    },
    "normalization": {"mean": _NORMALISED, "variance": _NORMALISED, "count": frozenset()},
    "embedding": {"embedding": frozenset({"vocab", "dim"}), "reverse_embedding": frozenset({"vocab", "dim"})},
    "lstm": _RECURRENT,
    "gru": _RECURRENT,
    "rnn": _RECURRENT,
    "attention": {
        **{f"{role}_kernel": _ATTENTION for role in ("query", "key", "value", "output", "qkv")},
        **{f"{role}_bias": _ATTENTION for role in ("query", "key", "value", "output", "qkv")},
        "key_extra": _ATTENTION,
        "value_extra": _ATTENTION,
    },
    "prelu": {"slope": _NORMALISED},
    "dropout": {},
}
"""Layer kind -> role -> the axes that the role may have. "custom", which is not listed, may have any."""

CUSTOM = "custom"

RECURRENT = frozenset({"lstm", "gru", "rnn"})
"""Kinds that may hold a role once per gate, as "<role>:<gate>" without the axis `gate`."""

_TOKEN = re.compile(r"\(([a-z0-9_ ]+)\)|([a-z0-9_]+)")


def axes(pattern: str) -> list[tuple[str, ...]]:
    """The named axes of each tensor axis.

    >>> axes("in (gate unit)")
    [('in',), ('gate', 'unit')]
    """
    return [tuple((group or single).split()) for group, single in _TOKEN.findall(pattern)]


def problems(layer: Layer, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with a described layer, one line each; `shapes` are those of the tensors it names."""
    if layer.kind == CUSTOM:
        return
    if layer.kind not in KINDS:
        yield f"{layer.path}: kind {layer.kind!r} is not in the table"
        return
    for role, entry in layer.roles.items():
        allowed = _allowed(layer.kind, role)
        if allowed is None:
            yield f"{layer.path}: a {layer.kind} has no role {role!r}"
            continue
        named = axes(entry.axes)
        unknown = {axis for group in named for axis in group} - allowed - {"1"}
        if unknown:
            yield f"{layer.path}: {role}: a {layer.kind} has no axis {', '.join(sorted(unknown))}"
        if len(named) != len(shapes[entry.tensor]):
            yield f"{layer.path}: {role}: {entry.axes!r} does not name the axes of shape {list(shapes[entry.tensor])}"


def _allowed(kind: str, role: str) -> frozenset[str] | None:
    """The axes that a role may have, None for a role that the kind does not have."""
    base, _, gate = role.partition(":")
    if not gate:
        return KINDS[kind].get(role)
    return KINDS[kind][base] - {"gate"} if kind in RECURRENT and base in KINDS[kind] else None
