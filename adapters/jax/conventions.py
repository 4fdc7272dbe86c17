"""What the layers of parameter trees are: nested dicts of Flax linen or Haiku, told by their keys, shapes and names.

A tree has no classes, so this says what the libraries' conventions say. What fits none of them is left to be "custom".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Path = tuple[Any, ...]
Shape = tuple[int, ...]
Meaning = tuple[str, dict[str, tuple[str, str]], dict[str, Any]]
"""A layer kind, its arrays as key -> (role, axes), and the config."""


@dataclass(frozen=True, slots=True)
class Node:
    """A dict of a tree: its arrays as key -> (name, shape), and its other children. foreign: whether one is no dict."""

    arrays: Mapping[str, tuple[str, Shape]]
    children: frozenset[str] = frozenset()
    foreign: bool = False

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: shape for key, (_, shape) in self.arrays.items()}


@dataclass(frozen=True, slots=True)
class Found:
    """A layer: role -> (name of the tensor, axes)."""

    kind: str
    roles: dict[str, tuple[str, str]]
    config: dict[str, Any] = field(default_factory=dict)


def recognise(nodes: Mapping[Path, Node]) -> dict[Path, Found]:
    """The layers among the dicts of a tree by path; `nodes` has parents before their children."""
    found: dict[Path, Found] = {}
    statistics = _Statistics(nodes)
    done = set(_reparametrised(nodes, "weightnorm", "spectralnorm"))
    for path, norm in _weight_norms(nodes).items():
        if (normed := _single(path, nodes[path], statistics)) and (layer := _normed(normed, norm, nodes[path])):
            found[path] = layer
    for path, node in nodes.items():
        if path in done:
            continue
        if composite := _composite(path, node, nodes):
            layer, parts = composite
            done.update((*path, part) for part in parts)
        elif (single := _single(path, node, statistics)) is not None:
            layer = single
        else:
            continue
        found[path] = layer
    return found


def _last(path: Path) -> str:
    """What a layer is called: Haiku's keys are whole paths."""
    return str(path[-1]).rpartition("/")[2] if path else ""


def _says(name: str, *words: str) -> bool:
    """Whether a name holds one of `words`: long ones anywhere ("batchnorm" in "BatchNorm_0"), short ones by themselves."""
    squeezed, tokens = re.sub(r"[^a-z]", "", name.lower()), re.findall("[a-z]+", name.lower())
    return any(word in tokens or (len(word) > 3 and word in squeezed) for word in words)


def _spatial(count: int) -> str:
    return " ".join(f"k{axis}" for axis in range(1, count + 1))


# One dict


def _single(path: Path, node: Node, statistics: _Statistics) -> Found | None:
    if node.foreign or node.children:
        return None
    if averages := statistics.averages(path):
        return Found("batch_norm", averages)
    keys = frozenset(node.arrays)
    if keys and keys <= _NORM_KEYS | _RUNNING.keys():
        return _norm(path, node, statistics)
    meaning = _RULES[keys](path, node.shapes) if keys in _RULES else None
    if meaning is None:
        return None
    kind, roles, config = meaning
    return Found(kind, {role: (node.arrays[key][0], axes) for key, (role, axes) in roles.items() if key in keys}, config)


def _linen_kernel(path: Path, shapes: Mapping[str, Shape]) -> Meaning | None:
    kernel, bias = shapes["kernel"], shapes.get("bias")
    if len(kernel) == 2 and bias in (None, kernel[1:]):
        return "linear", {"kernel": ("kernel", "in out"), "bias": ("bias", "out")}, {}
    # Stacked and general dense layers have kernels of as many axes.
    if not 3 <= len(kernel) <= 5 or _says(_last(path), "dense", "linear", "einsum", "convlocal"):
        return None
    config = {"channels": "last"}
    if not _transposed(path):
        return _conv("conv", "kernel", "bias", kernel, "in out", config) if bias in (None, kernel[-1:]) else None
    if bias not in (None, kernel[-1:], kernel[-2:-1]):
        return None
    # With transpose_kernel the features are transposed and nothing is flipped; only a bias can tell.
    plain = bias in (None, kernel[-1:])
    features = "in out" if plain else "out in"
    return _conv("conv_transpose", "kernel", "bias", kernel, features, {**config, "flipped": plain})


def _haiku_kernel(path: Path, shapes: Mapping[str, Shape]) -> Meaning | None:
    w, b = shapes["w"], shapes.get("b")
    if len(w) == 2 and b in (None, w[1:]):
        return _haiku_lstm(path, w) or ("linear", {"w": ("kernel", "in out"), "b": ("bias", "out")}, {})
    if not 3 <= len(w) <= 5:
        return None
    transposed = _transposed(path)
    out, ones = w[-2] if transposed else w[-1], (1,) * (len(w) - 2)
    if b not in (None, (out,), (out, *ones)):
        return None
    config: dict[str, Any] = {} if b is None else {"channels": "last" if b == (out,) else "first"}
    bias = "out" if b is None or b == (out,) else "out" + " 1" * len(ones)
    if not transposed:
        return _conv("conv", "w", "b", w, "in out", config, bias)
    return _conv("conv_transpose", "w", "b", w, "out in", {**config, "flipped": True}, bias)


def _transposed(path: Path) -> bool:
    return _says(_last(path), "transpose", "transposed", "deconv")


def _conv(
    kind: str, kernel: str, bias: str, shape: Shape, features: str, config: dict[str, Any], bias_axes: str = "out"
) -> Meaning:
    return kind, {kernel: ("kernel", f"{_spatial(len(shape) - 2)} {features}"), bias: ("bias", bias_axes)}, config


def _haiku_lstm(path: Path, w: Shape) -> Meaning | None:
    """hk.LSTM is one linear layer over its input and its hidden units, told by its name alone."""
    if not re.search(r"(^|/)lstm(_\d+)?/linear$", str(path[-1]) if path else "") or w[1] % 4 or w[0] <= w[1] // 4:
        return None
    roles = {"w": ("kernel", "in (gate unit)"), "b": ("bias", "(gate unit)")}
    return "lstm", roles, {"gate_order": "i g f o", "forget_bias": 1.0, "activation": "tanh", "recurrent_activation": "sigmoid"}


def _haiku_gru(path: Path, shapes: Mapping[str, Shape]) -> Meaning | None:
    w_i, w_h, b = shapes["w_i"], shapes["w_h"], shapes["b"]
    if len(w_i) != 2 or len(w_h) != 2 or not w_i[1] == w_h[1] == 3 * w_h[0] or b != w_h[1:]:
        return None
    # Haiku's z is the share of the new state, 1 - z of the others: what is stored is the negative of theirs.
    config = {"gate_order": "-z r n", "reset_after": False, "activation": "tanh", "recurrent_activation": "sigmoid"}
    roles = {
        "w_i": ("input_kernel", "in (gate unit)"),
        "w_h": ("recurrent_kernel", "out (gate unit)"),
        "b": ("input_bias", "(gate unit)"),
    }
    return "gru", roles, config


def _embedding(path: Path, shapes: Mapping[str, Shape]) -> Meaning | None:
    ((key, shape),) = shapes.items()
    return ("embedding", {key: ("embedding", "vocab dim")}, {}) if len(shape) == 2 else None


def _prelu(path: Path, shapes: Mapping[str, Shape]) -> Meaning | None:
    return ("prelu", {"negative_slope": ("slope", "")}, {}) if shapes["negative_slope"] == () else None


_RULES: dict[frozenset[str], Callable[[Path, Mapping[str, Shape]], Meaning | None]] = {
    frozenset({"kernel"}): _linen_kernel,
    frozenset({"kernel", "bias"}): _linen_kernel,
    frozenset({"w"}): _haiku_kernel,
    frozenset({"w", "b"}): _haiku_kernel,
    frozenset({"w_i", "w_h", "b"}): _haiku_gru,
    frozenset({"embedding"}): _embedding,
    frozenset({"embeddings"}): _embedding,
    frozenset({"negative_slope"}): _prelu,
}

# Normalisations: scale and bias (linen) or offset (Haiku), running statistics in a tree beside.

_NORM_KEYS = frozenset({"scale", "bias", "offset"})
_NORM_ROLES = {"scale": "scale", "bias": "offset", "offset": "offset"}
_RUNNING = {"mean": "mean", "var": "variance"}
_NORM_WORDS = {
    "batch_norm": ("batchnorm", "bn"),
    "group_norm": ("groupnorm", "gn"),
    "instance_norm": ("instancenorm",),
    "rms_norm": ("rmsnorm", "rms"),
    "layer_norm": ("layernorm", "ln"),
}


def _norm(path: Path, node: Node, statistics: _Statistics) -> Found | None:
    own = {_NORM_ROLES[key]: array for key, array in node.arrays.items() if key in _NORM_ROLES}
    running = _running(node) or statistics.of(path)
    kind = "batch_norm" if running else _norm_kind(_last(path), frozenset(own))
    if not own:
        running, kind = statistics.alone(path, node), "batch_norm"
    arrays = {**own, **running}
    shapes = {shape for _, shape in arrays.values()}
    if kind is None or len(shapes) != 1:
        return None
    axes = _normalised(shapes.pop(), "n" if kind in ("layer_norm", "rms_norm") else "c")
    if axes is None:
        return None
    return Found(kind, {**statistics.biased(path), **{role: (name, axes) for role, (name, _) in arrays.items()}})


def _running(node: Node) -> dict[str, tuple[str, Shape]]:
    """The running statistics that a dict holds, {} where it lacks one."""
    return {role: node.arrays[key] for key, role in _RUNNING.items()} if node.arrays.keys() >= _RUNNING.keys() else {}


def _norm_kind(name: str, roles: frozenset[str]) -> str | None:
    kind = next((kind for kind, words in _NORM_WORDS.items() if _says(name, *words)), None)
    if "scale" not in roles:  # a bias alone may belong to anything
        return kind if kind in ("batch_norm", "group_norm", "layer_norm") else None
    if kind == "rms_norm" and len(roles) > 1:
        return None
    return kind or ("layer_norm" if len(roles) > 1 else "rms_norm")


def _normalised(shape: Shape, letter: str) -> str | None:
    """The axes of a normalisation's tensor, which Haiku stores with axes of size one to be broadcast."""
    if letter == "c":
        wide = [axis for axis, size in enumerate(shape) if size != 1] or [len(shape) - 1]
        return " ".join("c" if axis == wide[0] else "1" for axis in range(len(shape))) if len(wide) == 1 and shape else None
    leading = next((axis for axis, size in enumerate(shape) if size != 1), len(shape) - 1)
    numbered = [f"n{axis}" for axis in range(1, len(shape) - leading + 1)]
    return " ".join(["1"] * leading + numbered) if shape else None


class _Statistics:
    """The running means and variances of a tree: linen's and Haiku's lie in a tree beside that of the parameters."""

    def __init__(self, nodes: Mapping[Path, Node]) -> None:
        self._nodes = nodes
        self._places: dict[Any, list[Path]] = defaultdict(list)
        self._owners: dict[Any, list[Path]] = defaultdict(list)
        for path, node in nodes.items():
            if path and _running(node):
                self._places[path[-1]].append(path)
            elif path and "average" in node.arrays and str(path[-1]).endswith("/~/mean_ema"):
                self._places[str(path[-1]).removesuffix("/~/mean_ema")].append(path)
            if path and _NORM_KEYS & node.arrays.keys():
                self._owners[path[-1]].append(path)

    def of(self, path: Path) -> dict[str, tuple[str, Shape]]:
        """Those of the layer at `path`."""
        for place in self._places[path[-1]] if path else ():
            if _beside(path, place):
                return self._at(place)
        return {}

    def alone(self, path: Path, node: Node) -> dict[str, tuple[str, Shape]]:
        """Those at `path` where no layer has parameters to them, and the names say what they are."""
        named = "batch_stats" in path or _says(_last(path), *_NORM_WORDS["batch_norm"])
        owned = not path or any(_beside(owner, path) for owner in self._owners[path[-1]])
        return {} if owned or not named else _running(node)

    def _at(self, place: Path) -> dict[str, tuple[str, Shape]]:
        arrays = self._nodes[place].arrays
        if running := _running(self._nodes[place]):
            return running
        variance = self._nodes.get(_variance_beside(place))
        if variance is None or "average" not in variance.arrays:
            return {}
        return {"mean": arrays["average"], "variance": variance.arrays["average"]}

    def biased(self, path: Path) -> dict[str, tuple[str, str]]:
        """What Haiku's averages of the layer at `path` are made of: role -> (name, axes)."""
        place = next((place for place in (self._places[path[-1]] if path else ()) if _beside(path, place)), ())
        found: dict[str, tuple[str, str]] = {}
        for role, at in (("mean", place), ("variance", _variance_beside(place) if place else ())):
            arrays = self._nodes[at].arrays if at in self._nodes else {}
            if "hidden" in arrays and "counter" in arrays:
                name, shape = arrays["hidden"]
                found[f"{role}_biased"] = (name, _normalised(shape, "c") or "")
                found[f"{role}_updates"] = (arrays["counter"][0], "")
        return found

    def averages(self, path: Path) -> dict[str, tuple[str, str]]:
        """The roles of a Haiku norm without parameters, for the dict of its means."""
        if not path or not str(path[-1]).endswith("/~/mean_ema"):
            return {}
        layer = (*path[:-1], str(path[-1]).removesuffix("/~/mean_ema"))
        if any(_beside(owner, layer) for owner in self._owners[layer[-1]]) or not self._at(path):
            return {}
        named = {role: (name, _normalised(shape, "c") or "") for role, (name, shape) in self._at(path).items()}
        # The norm itself has no dict; any sibling stands for it.
        return {**self.biased((f"{layer[0]} of", *layer[1:])), **named}


def _variance_beside(place: Path) -> Path:
    """Where Haiku keeps the variances to the means at `place`."""
    return (*place[:-1], str(place[-1]).replace("/~/mean_ema", "/~/var_ema"))


def _beside(path: Path, other: Path) -> bool:
    """Whether two paths differ in one segment that is not the last ("params" and "batch_stats")."""
    if len(path) != len(other):
        return False
    return len([None for one, two in zip(path[:-1], other[:-1], strict=True) if one != two]) == 1


def _reparametrised(nodes: Mapping[Path, Node], *words: str) -> Iterator[Path]:
    """Layers whose weights linen's WeightNorm or SpectralNorm changes before use: what is stored is not what they apply."""
    for path, node in nodes.items():
        if not _says(_last(path), *words):
            continue
        for key in node.arrays:
            if len(parts := key.split("/")) > 2:
                wrapped = (*path[:-1], *parts[:-2])
                yield from (
                    other for other in nodes if other == wrapped or (other[-1:] == wrapped[-1:] and _beside(other, wrapped))
                )


def _weight_norms(nodes: Mapping[Path, Node]) -> dict[Path, tuple[str, Shape]]:
    """Layers of which linen's WeightNorm changes the kernel and nothing else -> what multiplies the normed kernel."""
    found: dict[Path, list[tuple[str, tuple[str, Shape]]]] = {}
    for path, node in nodes.items():
        for key, scale in node.arrays.items():
            parts = key.split("/")
            layer = (*path[:-1], *parts[:-2])
            if _says(_last(path), "weightnorm") and len(parts) > 2 and parts[-1] == "scale" and layer in nodes:
                found.setdefault(layer, []).append((parts[-2], scale))
    spectral = set(_reparametrised(nodes, "spectralnorm"))
    return {
        path: each[0][1]
        for path, each in found.items()
        if [weight for weight, _ in each] == ["kernel"] and path not in spectral
    }


def _normed(layer: Found, norm: tuple[str, Shape], node: Node) -> Found | None:
    """A layer whose kernel is stored as its direction. Which axis has a norm each is told by its size, if only one has that."""
    if "kernel" not in layer.roles or "kernel" not in node.arrays:
        return None
    (name, axes), shape = layer.roles["kernel"], node.shapes["kernel"]
    if norm[1] != shape[-1:] or shape.count(shape[-1]) > 1:
        return None
    roles = {role: entry for role, entry in layer.roles.items() if role != "kernel"}
    roles |= {"kernel_direction": (name, axes), "kernel_norm": (norm[0], axes.split()[-1])}
    return Found(layer.kind, roles, {**layer.config, "norm_epsilon": 1e-12})


# Layers whose parts are dicts of their own

_ATTENTION = {"query": "query", "key": "key", "value": "value", "out": "output"}
_CELLS: dict[frozenset[str], tuple[str, dict[str, Any]]] = {
    frozenset({"ii", "if", "ig", "io", "hi", "hf", "hg", "ho"}): ("lstm", {"gate_order": "i f g o"}),
    frozenset({"ir", "iz", "in", "hr", "hz", "hn"}): ("gru", {"gate_order": "r z n", "reset_after": True}),
    frozenset({"i", "h"}): ("rnn", {"gate_order": "h"}),
}


def _composite(path: Path, node: Node, nodes: Mapping[Path, Node]) -> tuple[Found, list[str]] | None:
    """A layer made of the dicts in a dict, and which of those belong to it."""
    if node.foreign or node.arrays:
        return None
    parts = {part: nodes[*path, part] for part in node.children if (*path, part) in nodes}
    if node.children in _CELLS and (cell := _cell(parts, *_CELLS[node.children])):
        return cell, list(parts)
    if _ATTENTION.keys() <= node.children and (attention := _attention({part: parts[part] for part in _ATTENTION})):
        return attention, list(_ATTENTION)
    return None


def _plain(node: Node, rank: int) -> bool:
    """Whether a dict holds a kernel of `rank` axes and perhaps a bias, and nothing else."""
    keys = node.arrays.keys()
    return (
        not node.foreign
        and not node.children
        and "kernel" in keys
        and keys <= {"kernel", "bias"}
        and len(node.shapes["kernel"]) == rank
    )


def _cell(parts: Mapping[str, Node], kind: str, config: dict[str, Any]) -> Found | None:
    if not all(_plain(node, 2) for node in parts.values()):
        return None
    # Every gate has the same units, which the recurrent kernels read too.
    if len({size for part, node in parts.items() for size in node.shapes["kernel"][part[0] == "i" :]}) != 1:
        return None
    if any(node.shapes.get("bias", node.shapes["kernel"][1:]) != node.shapes["kernel"][1:] for node in parts.values()):
        return None
    roles: dict[str, tuple[str, str]] = {}
    for part in sorted(parts):
        base, gate, arrays = {"i": "input", "h": "recurrent"}[part[0]], part[1:], parts[part].arrays
        suffix = f":{gate}" if gate else ""
        roles[f"{base}_kernel{suffix}"] = (arrays["kernel"][0], "in unit" if base == "input" else "out unit")
        if "bias" in arrays:
            roles[f"{base}_bias{suffix}"] = (arrays["bias"][0], "unit")
    return Found(kind, roles, dict(config))


def _attention(parts: Mapping[str, Node]) -> Found | None:
    if not all(_plain(node, 3) for node in parts.values()):
        return None
    kernels = {part: node.shapes["kernel"] for part, node in parts.items()}
    heads, key_heads = kernels["query"][1], kernels["key"][1]
    if kernels["value"][1] != key_heads or heads % key_heads or kernels["out"][:2] != (heads, kernels["value"][2]):
        return None
    roles: dict[str, tuple[str, str]] = {}
    for part, role in _ATTENTION.items():
        kernel, arrays = kernels[part], parts[part].arrays
        inward = part != "out"
        if parts[part].shapes.get("bias", kernel[1:] if inward else kernel[2:]) != (kernel[1:] if inward else kernel[2:]):
            return None
        roles[f"{role}_kernel"] = (arrays["kernel"][0], "in head hd" if inward else "head hd out")
        if "bias" in arrays:
            roles[f"{role}_bias"] = (arrays["bias"][0], "head hd" if inward else "out")
    return Found("attention", roles, {"heads": heads, **({"key_heads": key_heads} if key_heads != heads else {})})
