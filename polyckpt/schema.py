"""The neutral checkpoint as frozen structs: what a manifest says. FORMAT.md is the prose to it.

Every struct ignores members that it does not know, so that a later minor version can add some; `manifest.decode` keeps
them. JSON lacks NaN and the infinities: wherever a number may be one of them it is a `Number`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

FORMAT_NAME = "polyckpt"
FORMAT_MAJOR = 1
FORMAT_MINOR = 2


class NonFinite(msgspec.Struct, frozen=True, kw_only=True):
    """A number that JSON cannot hold, as `{"$float": "nan"}`."""

    value: Literal["nan", "inf", "-inf"] = msgspec.field(name="$float")


Number = int | float | NonFinite
Count = Annotated[int, msgspec.Meta(ge=0)]
Hyperparameter = bool | Number | str | None | tuple[Number, ...]


class Chunk(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A box of a tensor and where it lies: the tensor `key` of the tensor file or array directory `file`.

    checksum: of its bytes, row-major.
    """

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    checksum: str


class Tensor(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A tensor of `shape`, cut into chunks that cover it without overlap (one chunk unless several processes wrote it)."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class TensorFile(msgspec.Struct, frozen=True, kw_only=True):
    """A safetensors file of the checkpoint. The header is not part of any tensor and has a checksum of its own."""

    size_bytes: Count
    header_checksum: str


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an array directory."""

    size_bytes: Count
    checksum: str


class ArrayDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """A directory of the checkpoint in which another library keeps tensors (format 1.2). files: by path within it."""

    kind: Literal["orbax"]
    files: dict[str, StoredFile]


class Role(msgspec.Struct, frozen=True, kw_only=True):
    """What a tensor is to its layer. `axes` names every axis, einops style: "out in", "(gate unit) in", "" for 0-d."""

    tensor: str
    axes: str


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One layer: `kind` is a row of polyckpt.layers, `type` the producer's class, `config` what matters to meaning."""

    path: str
    kind: str
    type: str
    config: dict[str, bool | Number | str | None] = {}
    roles: dict[str, Role] = {}


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The described model. `aliases` maps a tied tensor's further names to the name that it is stored under.

    order: of `layers`: `execution`, `definition`, or `name` (sorted; says nothing about either).
    """

    type: str
    order: Literal["execution", "definition", "name"]
    layers: tuple[Layer, ...] = ()
    aliases: dict[str, str] = {}


class ParameterGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters (names of weights) that share hyperparameters; names of those are in polyckpt.optimizers.

    family, conventions: where they are others than those of the optimizer (format 1.2).
    """

    parameters: tuple[str, ...]
    hyperparameters: dict[str, Hyperparameter]
    family: str | None = None
    conventions: dict[str, str] = {}


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One slot: `meaning` is a row of polyckpt.optimizers or "custom"; `tensors` maps a parameter to an optimizer tensor."""

    meaning: str
    tensors: dict[str, str]


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a schedule has to come: `values[i]` is the learning rate of each group `updates[i]` updates after the save."""

    updates: tuple[Count, ...]
    values: tuple[tuple[Number, ...], ...]


class Optimizer(msgspec.Struct, frozen=True, kw_only=True):
    """The described optimizer. `step` counts completed updates, None where the producer keeps no count.

    rates: where a schedule is known, from format 1.2 on.
    """

    type: str
    family: str
    conventions: dict[str, str] = {}
    groups: tuple[ParameterGroup, ...] = ()
    step: Count | None = None
    slots: dict[str, Slot] = {}
    rates: Rates | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far training came: completed epochs, completed steps, and batches consumed of the epoch under way."""

    epoch: Count | None = None
    step: Count | None = None
    batch: Count | None = None


class Producer(msgspec.Struct, frozen=True, kw_only=True):
    """Who wrote the checkpoint: `adapter` restores it; `versions` are those of the packages involved."""

    library_version: str
    adapter: str
    versions: dict[str, str]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The run whose manager wrote the checkpoint, and its place among the decisions of that run, from 1 (format 1.1)."""

    id: str
    sequence: Annotated[int, msgspec.Meta(ge=1)]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A whole checkpoint but for the bytes of its tensors.

    tensors: by section: `weights` (names of the producer), `optimizer` (slots), `state` (all else).
    native: what only the same framework can use, in the tagged JSON of polyckpt.residue.
    assumptions: what a writer had to assume about meaning, one sentence each. run: only where a manager wrote it.
    arrays: where tensors are not in files of ours (format 1.2).
    """

    format: Literal["polyckpt"]
    version: str
    saved_at_utc: str
    producer: Producer
    progress: Progress
    metrics: dict[str, Number]
    learning_rate: Number | tuple[Number, ...] | None
    model: Model
    optimizer: Optimizer | None
    files: dict[str, TensorFile]
    tensors: dict[str, dict[str, Tensor]]
    native: dict[str, Any]
    assumptions: tuple[str, ...] = ()
    run: Run | None = None
    arrays: dict[str, ArrayDirectory] = {}


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The members of a manifest that say when it was saved and how good it was; its tensors may be a thousand times more."""

    saved_at_utc: str
    progress: Progress
    metrics: dict[str, Number]
    run: Run | None = None


def to_number(value: float | int) -> Number:
    """`value`, or its NonFinite form."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return NonFinite(value="nan" if value != value else "inf" if value > 0 else "-inf")
    return value


def from_number(number: Number) -> float | int:
    """The Python number that `to_number` was given."""
    return float(number.value) if isinstance(number, NonFinite) else number
