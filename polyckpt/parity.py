"""The same input through two models: their outputs, and the first layer that diverges.

A probe is a batch that a checkpoint holds together with what the model made of it: the outputs, and a fingerprint of what each
layer made. A fingerprint is the number of values and some of them in sorted order, so it is the same in whatever order of axes
a framework holds them, and close where the values are close.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyckpt import registry
from polyckpt.dtypes import lookup
from polyckpt.errors import ParityError
from polyckpt.leaves import Leaf

FINGERPRINT_VALUES = 256
_TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
_MAX_PERMUTED_AXES = 5


@dataclass(frozen=True)
class Ran:
    """What a layer made in one call: how many values, and some of them in sorted order."""

    path: str
    size: int
    values: np.ndarray


@dataclass
class Recording:
    """What a model did with a batch. layers: in the order in which their calls ended. flattened: as in Recorder."""

    outputs: Sequence[np.ndarray] = ()
    layers: list[Ran] = field(default_factory=list)
    flattened_into: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def ran(self, path: str, output: np.ndarray) -> None:
        self.layers.append(Ran(path, output.size, fingerprint(output)))

    def flattened(self, path: str, shape: tuple[int, ...]) -> None:
        self.flattened_into[path] = tuple(shape)


@dataclass(frozen=True)
class Probe:
    """A batch and what the model that was saved made of it."""

    arguments: tuple[Any, ...]
    recording: Recording


@dataclass(frozen=True)
class Comparison:
    """Two recordings of one batch.

    error: the largest difference of outputs, over the largest output. difference: the largest difference itself. first: the
    path of the first layer whose output differs by more than the tolerance, with how much (relative); None where none is seen
    to. compared: how many layers could be compared.
    """

    error: float
    difference: float
    tolerance: float
    first: tuple[str, float] | None = None
    compared: int = 0

    @property
    def agrees(self) -> bool:
        """Whether the outputs are equal within the tolerance; NaN never is."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        text = f"max |diff| {self.difference:.2g} (relative {self.error:.2g}, tolerance {self.tolerance:.2g})"
        if self.agrees or self.first is None:
            return text
        return f"{text}; the first layer that diverges is {self.first[0]} (relative {self.first[1]:.2g})"


def fingerprint(array: np.ndarray) -> np.ndarray:
    """Values of `array` at even ranks, sorted; all of them where there are few.

    >>> fingerprint(np.array([[3.0, 1.0], [2.0, 0.0]]))
    array([0., 1., 2., 3.])
    """
    flat = np.sort(np.asarray(array, np.float64), axis=None)
    if flat.size <= FINGERPRINT_VALUES:
        return flat
    return flat[np.round(np.linspace(0, flat.size - 1, FINGERPRINT_VALUES)).astype(np.int64)]


def record(adapter: Any, model: Any, arguments: tuple[Any, ...], apply: Any = None) -> Recording:
    """Run a live model on a batch as for inference. Raises UnsupportedError where it cannot be run."""
    recording = Recording()
    recording.outputs = [np.asarray(each) for each in adapter.trace(model, arguments, recording, apply)]
    return recording


def arguments_of(batch: Any) -> tuple[Any, ...]:
    """A probe as positional arguments: a tuple or list is several, anything else is one."""
    return tuple(_host(each) for each in batch) if isinstance(batch, tuple | list) else (_host(batch),)


def compare_recordings(
    expected: Recording, found: Recording, *, tolerance: float | None = None, partners: Mapping[str, str] | None = None
) -> Comparison:
    """Compare what two models made of one batch.

    tolerance: relative; by default 1e-5 in float32, 1e-10 in float64. partners: layer of `found` -> layer of `expected`.
    """
    limit = _tolerance(expected.outputs, found.outputs) if tolerance is None else tolerance
    error, difference = _outputs(expected.outputs, found.outputs)
    calls = _by_call(expected)
    # Rounding adds up from layer to layer, and a sorted value may be any one's.
    first, compared = None, 0
    for key, ran in _by_call(found).items():
        path, call = key
        partner = (partners or {}).get(path, path)
        other = calls.get((partner, call))
        if other is None or other.size != ran.size:
            continue
        compared += 1
        apart = _relative(other.values, ran.values)[0]
        if first is None and not apart <= 10 * limit:
            first = (path, apart)
    return Comparison(error, difference, limit, first, compared)


def compare(model_a: Any, model_b: Any, batch: Any, *, batch_b: Any = None, tolerance: float | None = None) -> Comparison:
    """The same batch through two live models, of one framework or two. Nothing of either changes.

    batch: one array, or a tuple of the positional arguments. batch_b: the batch for the second where it wants other axes, by
    default the same. Outputs are compared in whatever order of axes agrees best. Raises ParityError where there are none to
    compare, AdapterError, UnsupportedError.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> compare(layer, torch.nn.Sequential(layer), np.ones((4, 3), np.float32)).agrees
    True
    """
    recordings = [
        record(registry.adapter_for(model, "model"), model, arguments_of(given))
        for model, given in ((model_a, batch), (model_b, batch if batch_b is None else batch_b))
    ]
    return compare_recordings(*recordings, tolerance=tolerance)


def _host(tree: Any) -> Any:
    """A tree of arrays of any framework as one of NumPy arrays."""
    if isinstance(tree, Mapping):
        return {key: _host(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_host(value) for value in tree)
    adapter = registry.by_class(tree)
    leaf = adapter.leaf(tree) if adapter else None
    if not isinstance(leaf, Leaf):
        return np.asarray(tree)
    return leaf.read().reshape(-1).view(np.uint8).view(lookup(leaf.dtype, "probe").numpy).reshape(leaf.shape).copy()


def _by_call(recording: Recording) -> dict[tuple[str, int], Ran]:
    counts: dict[str, int] = {}
    found = {}
    for ran in recording.layers:
        counts[ran.path] = counts.get(ran.path, -1) + 1
        found[ran.path, counts[ran.path]] = ran
    return found


def _outputs(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> tuple[float, float]:
    """The largest relative and absolute difference; where one side has more outputs, of those that the other has too."""
    few, many = sorted((list(expected), list(found)), key=len)
    if not few:
        raise ParityError("one of the models has no outputs to compare")
    worst = (0.0, 0.0)
    for place, output in enumerate(few):
        candidates = [many[place]] if len(few) == len(many) else many
        errors = [error for each in candidates for error in _permuted(output, each)]
        if not errors:
            shapes = f"{list(output.shape)} and {', '.join(str(list(each.shape)) for each in candidates)}"
            raise ParityError(f"outputs of shapes {shapes} cannot be compared")
        worst = max(worst, min(errors, key=_rank), key=_rank)
    return worst


def _rank(error: tuple[float, float]) -> float:
    return math.inf if math.isnan(error[0]) else error[0]


def _permuted(one: np.ndarray, other: np.ndarray) -> list[tuple[float, float]]:
    """The errors in every order of axes that the shapes allow."""
    if sorted(one.shape) != sorted(other.shape):
        return []
    identity = tuple(range(one.ndim))
    orders = itertools.permutations(identity) if 2 < one.ndim <= _MAX_PERMUTED_AXES else [identity]
    return [
        _relative(one, other.transpose(order)) for order in orders if one.shape == tuple(other.shape[axis] for axis in order)
    ]


def _relative(expected: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    if not expected.size:
        return 0.0, 0.0
    one, other = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.abs(one - other)
    # Infinities of one sign are equal; they stand for masked places.
    apart[one == other] = 0.0
    difference = float(apart.max())
    finite = np.abs(one[np.isfinite(one)])
    scale = float(finite.max()) if finite.size else 0.0
    return (difference / scale if scale else difference), difference


def _tolerance(*outputs: Sequence[np.ndarray]) -> float:
    names = [each.dtype.name for side in outputs for each in side]
    return max((_TOLERANCES.get(name, 0.0) for name in names), default=0.0) or _TOLERANCES["float32"]


# As a checkpoint holds it.


def encode(probe: Probe) -> dict[str, Any]:
    """A probe as a tree for polyckpt.residue."""
    recording = probe.recording
    values = [ran.values for ran in recording.layers]
    return {
        "arguments": probe.arguments,
        "outputs": list(recording.outputs),
        "layers": [[ran.path, ran.size, len(ran.values)] for ran in recording.layers],
        "fingerprints": np.concatenate([np.zeros(0), *values]),
        "flattened": {path: list(shape) for path, shape in recording.flattened_into.items()},
    }


def decode(tree: Any) -> Probe | None:
    """The probe of a checkpoint; None where it has none. Raises ValueError, KeyError or TypeError for what is none."""
    if tree is None:
        return None
    fingerprints = np.asarray(tree["fingerprints"], np.float64)
    layers, start = [], 0
    for path, size, count in tree["layers"]:
        layers.append(Ran(str(path), int(size), fingerprints[start : start + int(count)]))
        start += int(count)
    if start != len(fingerprints):
        raise ValueError(f"{len(fingerprints)} values of fingerprints for {start}")
    flattened = {str(path): tuple(map(int, shape)) for path, shape in tree["flattened"].items()}
    return Probe(tuple(tree["arguments"]), Recording(list(tree["outputs"]), layers, flattened))
