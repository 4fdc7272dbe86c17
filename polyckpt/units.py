"""Layers of any framework in one canonical form: units, the smallest parts that can be paired with each other.

Most layers are one unit. An attention is four (its projections), a separable convolution two. A depthwise convolution is a
convolution, one with a kernel of size one everywhere is linear, an instance norm is a group norm. `_PARTS` says so; what is
left of a layer's kind and roles is the same whoever wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from polyckpt import layers
from polyckpt.layouts import Piece
from polyckpt.schema import Layer, Role

BARE = "bare"
"""The kind of a unit that is one tensor of which only the shape is known."""

Roles = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Unit:
    """One part of a model that is paired as a whole.

    layer: the path of its layer. part: which part of that it is, "" for all of it. kind, config: canonical. pieces: by
    canonical role. place: where it stands in the model's order.
    """

    layer: str
    part: str
    kind: str
    config: Mapping[str, Any]
    pieces: Mapping[str, Piece]
    place: int
    tensors: frozenset[str] = field(default_factory=frozenset)

    @property
    def path(self) -> str:
        """What plans and rules call it."""
        return f"{self.layer}:{self.part}" if self.part else self.layer

    @property
    def kernel(self) -> Piece | None:
        """The kernel, in whatever terms it is held."""
        return next((self.pieces[role] for role in KERNELS if role in self.pieces), None)

    def __str__(self) -> str:
        shapes = ", ".join(f"{role} {list(piece.shape)}" for role, piece in self.pieces.items())
        return f"{self.path or '(the whole)'}: {self.kind} ({shapes})"


@dataclass(frozen=True)
class _Part:
    """A unit that a layer kind holds: its kind, and its roles as role of the layer -> (role of the unit, canonical axes).

    Axes that a tensor lacks are left out; "1" is an axis of size one; "k" and "n" stand for all axes that begin so.
    """

    part: str
    kind: str
    roles: Roles


def _whole(kind: str, **roles: str) -> tuple[_Part, ...]:
    return (_Part("", kind, {role: (role, axes) for role, axes in roles.items()}),)


def _projection(name: str) -> _Part:
    hidden = "(head group hd)"
    kernel, bias = (f"{hidden} out", "out") if name == "output" else (f"in {hidden}", hidden)
    return _Part(name, "linear", {f"{name}_kernel": ("kernel", kernel), f"{name}_bias": ("bias", bias)})


def _reparametrised(axes: str) -> dict[str, str]:
    return {"kernel_direction": axes, "kernel_norm": axes, "kernel_raw": axes, "kernel_u": axes, "kernel_v": "rest"}


_NORM = {"scale": "c", "offset": "c", "mean": "c", "variance": "c", "count": ""}
_BIASED = {"unset": "", "mean_biased": "c", "variance_biased": "c", "mean_updates": "", "variance_updates": ""}

_PARTS: dict[str, tuple[_Part, ...]] = {
    "linear": _whole("linear", kernel="in out", bias="out", **_reparametrised("in out")),
    "bilinear": _whole("bilinear", kernel="in1 in2 out", bias="out"),
    "conv": _whole("conv", kernel="out in k", bias="out", **_reparametrised("out in k")),
    "conv_transpose": _whole("conv_transpose", kernel="in out k", bias="out", **_reparametrised("in out k")),
    "depthwise_conv": (_Part("", "conv", {"kernel": ("kernel", "(in mult) 1 k"), "bias": ("bias", "(in mult)")}),),
    "separable_conv": (
        _Part("depthwise", "conv", {"depthwise_kernel": ("kernel", "(in mult) 1 k")}),
        _Part("pointwise", "conv", {"pointwise_kernel": ("kernel", "out (in mult) k"), "bias": ("bias", "out")}),
    ),
    "batch_norm": _whole("batch_norm", **_NORM, **_BIASED),
    "instance_norm": _whole("group_norm", **_NORM),
    "group_norm": _whole("group_norm", **_NORM),
    "layer_norm": _whole("layer_norm", scale="n", offset="n"),
    "rms_norm": _whole("rms_norm", scale="n"),
    "normalization": _whole("normalization", mean="n", variance="n", count=""),
    "embedding": (
        _Part("", "embedding", {"embedding": ("embedding", "vocab dim")}),
        _Part("reverse", "linear", {"reverse_embedding": ("kernel", "dim vocab")}),
    ),
    "attention": (
        *(_projection(name) for name in ("query", "key", "value", "output")),
        _Part("extra", "attention_extra", {"key_extra": ("key", "(head hd)"), "value_extra": ("value", "(head hd)")}),
    ),
    "prelu": _whole("prelu", slope="n c"),
}
"""Kind of a layer -> its units. Recurrent cells are one unit each, with a piece for every gate."""

_RECURRENT = {
    "input_kernel": "in unit",
    "recurrent_kernel": "out unit",
    "input_bias": "unit",
    "recurrent_bias": "unit",
    "bias": "unit",
    "projection": "unit out",
}

KERNELS = ("kernel", "kernel_direction", "kernel_raw")
"""Roles of the shape of a kernel, one of which a unit has."""

OPTIONAL = {
    "bias": 0.0,
    "scale": 1.0,
    "offset": 0.0,
    "mean": 0.0,
    "variance": 1.0,
    "count": 0.0,
    "mean_biased": 0.0,
    "variance_biased": 1.0,
    "mean_updates": float(1 << 20),
    "variance_updates": float(1 << 20),
    "unset": 0.0,
    "kernel_u": 1.0,
}
"""Roles that a unit may lack, and the value that a lacking one amounts to. After many updates an average is biased no more;
a power iteration begins anywhere."""


def units(described: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> list[Unit]:
    """The units of a model; tensors that no layer describes are bare ones.

    shapes: of all tensors by name, those of `aliases` too.
    """
    found: list[Unit] = []
    seen: set[str] = set()
    for layer in described:
        for unit in _units_of(layer, shapes):
            found.append(replace(unit, place=len(found)))
            seen |= unit.tensors
    for name, shape in shapes.items():
        if name not in seen and aliases.get(name) not in seen:
            role = Role(tensor=name, axes=" ".join(f"a{axis}" for axis in range(len(shape))))
            layer = Layer(path=name, kind=layers.CUSTOM, type="", roles={"": role})
            found += [replace(unit, place=len(found)) for unit in _units_of(layer, shapes)]
    return found


def _units_of(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Unit]:
    if layer.kind in layers.RECURRENT:
        yield _recurrent(layer, shapes)
        return
    if layer.kind not in _PARTS:
        for role, entry in layer.roles.items():
            yield _bare(layer, role, entry, shapes[entry.tensor])
        return
    sizes = _sizes(layer, shapes)
    known: set[str] = set()
    for part in _PARTS[layer.kind]:
        pieces: dict[str, Piece] = {}
        for role, entry in layer.roles.items():
            for own, picked in _unpacked(role):
                if own in part.roles:
                    canonical, axes = part.roles[own]
                    pieces[canonical] = _piece(layer, entry, axes, sizes[role], {"qkv": picked} if picked is not None else {})
                    known.add(role)
        if pieces:
            unit = _canonical(_unit(layer, part.part, part.kind, pieces))
            if layer.kind == "instance_norm" and "scale" in pieces:
                unit = replace(unit, config={**unit.config, "groups": pieces["scale"].shape[0]})
            yield unit
    for role, entry in layer.roles.items():
        if role not in known:
            yield _bare(layer, role, entry, shapes[entry.tensor])


def _unpacked(role: str) -> list[tuple[str, int | None]]:
    """The roles that a role holds, with the place of each where it is packed."""
    if role in ("qkv_kernel", "qkv_bias"):
        return [(role.replace("qkv", name), place) for place, name in enumerate(("query", "key", "value"))]
    return [(role, None)]


def _unit(layer: Layer, part: str, kind: str, pieces: Mapping[str, Piece]) -> Unit:
    return Unit(
        layer=layer.path,
        part=part,
        kind=kind,
        config=layer.config,
        pieces=pieces,
        place=0,
        tensors=frozenset(piece.tensor for piece in pieces.values()),
    )


def _canonical(unit: Unit) -> Unit:
    """A convolution that looks at one place alone is linear."""
    kernels = {role: piece for role, piece in unit.pieces.items() if role in KERNELS}
    groups = unit.config.get("groups", 1)
    if unit.kind != "conv" or not kernels or groups != 1:
        return unit
    plain = {}
    for role, kernel in kernels.items():
        if len(kernel.shape) < 3 or math.prod(kernel.shape[2:]) != 1:
            return unit
        spatial = [axis for group in kernel.order[2:] for axis in group]
        pick = {**kernel.pick, **dict.fromkeys(spatial, 0)}
        plain[role] = replace(kernel, order=(kernel.order[1], kernel.order[0]), pick=pick)
    return replace(unit, kind="linear", pieces={**unit.pieces, **plain})


def _bare(layer: Layer, role: str, entry: Role, shape: tuple[int, ...]) -> Unit:
    axes = layers.axes(entry.axes)
    sizes = {axis: size for (axis,), size in zip(axes, shape, strict=True)} if all(len(a) == 1 for a in axes) else {}
    if not sizes:
        axes = [(f"a{place}",) for place in range(len(shape))]
        sizes = {f"a{place}": size for place, size in enumerate(shape)}
    left = tuple((axis,) for axis, size in sizes.items() if size != 1)
    ones = {axis: 0 for axis, size in sizes.items() if size == 1}
    piece = Piece(entry.tensor, tuple(axes), sizes, left, pick=ones)
    return _unit(layer, role, BARE, {"value": piece})


def _piece(layer: Layer, entry: Role, pattern: str, sizes: Mapping[str, int], pick: Mapping[str, int]) -> Piece:
    """The piece of a role whose canonical axes are `pattern`."""
    tensor_axes = tuple(layers.axes(entry.axes))
    there = [axis for group in tensor_axes for axis in group if axis != "1" and axis not in pick]
    order: list[tuple[str, ...]] = []
    for group in layers.axes(pattern):
        if group == ("1",):
            order.append(())
        elif group in (("k",), ("n",)):
            order += [(axis,) for axis in sorted(there) if axis[0] == group[0] and axis[1:].isdigit()]
        elif left := tuple(axis for axis in group if axis in there):
            order.append(left)
    if layer.kind == "prelu":
        # Axes that share one slope mean nothing; what is left is the channels.
        pick = {**pick, **{axis: 0 for axis in there if sizes[axis] == 1}}
        order = [group for group in order if not set(group) & pick.keys()]
    flip = frozenset(axis for axis in there if axis[0] == "k") if layer.config.get("flipped") else frozenset()
    return Piece(entry.tensor, tensor_axes, sizes, tuple(order), pick=pick, flip=flip)


def _sizes(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
    """The size of every elementary axis of every role. Merged ones follow from the others, the config and division."""
    shared: dict[str, int] = {"qkv": 3}
    if isinstance(gates := layer.config.get("gate_order"), str):
        shared["gate"] = len(gates.split())
    found: dict[str, dict[str, int]] = {}
    for role, entry in layer.roles.items():
        axes = layers.axes(entry.axes)
        found[role] = {
            axis: size for group, size in zip(axes, shapes[entry.tensor], strict=True) for axis in group[:1] if len(group) == 1
        }
        shared |= {axis: size for axis, size in found[role].items() if axis not in shared}
    key_heads, heads = layer.config.get("key_heads"), layer.config.get("heads")
    for role, entry in layer.roles.items():
        for group, size in zip(layers.axes(entry.axes), shapes[entry.tensor], strict=True):
            if len(group) < 2:
                continue
            known = {axis: shared[axis] for axis in group if axis in shared}
            if "head" in group and "head" not in known and isinstance(heads, int):
                own = key_heads if isinstance(key_heads, int) and role.startswith(("key", "value")) else heads
                known["head"] = own if "group" not in group else key_heads if isinstance(key_heads, int) else own
            left = [axis for axis in group if axis not in known]
            rest = math.prod(known.values())
            if len(left) == 1 and rest and size % rest == 0:
                known[left[0]] = size // rest
            elif left or rest != size:
                # What the parts are cannot be known: they stay one axis, which fits where it is whole on the other side.
                known = {group[0]: size, **dict.fromkeys(group[1:], 1)}
            found[role] |= known
    return found


def _recurrent(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> Unit:
    """One unit, with a piece of each role for each gate. A gate written "-z" is stored as the negative of z."""
    gates = str(layer.config.get("gate_order", "h")).split()
    pieces: dict[str, Piece] = {}
    sizes = _sizes(layer, shapes)

    def add(role: str, gate: str, entry: Role, of: str, pick: Mapping[str, Any]) -> None:
        axes = tuple(layers.axes(entry.axes))
        # Where one kernel holds both, what the recurrent part reads lies on the axis "in" too.
        order = tuple((axis if axis in sizes[of] else "in",) for axis in _RECURRENT[role].split())
        sign = -1 if gate.startswith("-") else 1
        name = f"{role}:{gate.removeprefix('-')}" if gate else role
        pieces[name] = Piece(entry.tensor, axes, sizes[of], order, pick=pick, sign=sign)

    for role, entry in layer.roles.items():
        base, _, alone = role.partition(":")
        axes = [axis for group in layers.axes(entry.axes) for axis in group]
        # What a tensor holds: (role, what is picked for it). One of input and recurrent part holds both.
        parts: list[tuple[str, dict[str, Any]]] = [(base, {})]
        if base == "kernel":
            inputs, total = sizes[role]["in"] - sizes[role]["unit"], sizes[role]["in"]
            parts = [("input_kernel", {"in": (0, inputs)}), ("recurrent_kernel", {"in": (inputs, total)})]
        elif "which" in axes:
            parts = [("input_bias", {"which": 0}), ("recurrent_bias", {"which": 1})]
        for part, pick in parts:
            if base == "projection":
                add(part, "", entry, role, pick)
            elif alone or "gate" not in axes:
                add(part, alone or str(layer.config.get(f"{base}_gates", gates[0])), entry, role, pick)
            else:
                for place, gate in enumerate(gates):
                    add(part, gate, entry, role, {**pick, "gate": place})
    return _unit(layer, "", layer.kind, pieces)


def listed(found: Sequence[Unit], limit: int = 12) -> str:
    """Paths for people."""
    more = f", ... ({len(found) - limit} more)" if len(found) > limit else ""
    return (", ".join(unit.path or "(the whole)" for unit in found[:limit]) or "none") + more
