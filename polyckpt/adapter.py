"""The Adapter protocol: all that a framework must offer to be saved and restored.

An adapter crosses the boundary between live objects and the neutral checkpoint. It decides what is a tensor, what it is
called and what it means; the core decides how it is stored. Saving is `capture_*`, which must not change training.
Restoring is two steps: `prepare_*` compares everything and returns a `Restore`, whose `apply` writes. Nothing is written
before every part of a load has been prepared, and what cannot be rolled back must not fail.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from polyckpt import schema
from polyckpt.checkpoint import StoredTensor
from polyckpt.errors import Problem, UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.residue import Constant
from polyckpt.updates import Form

NO_OPTIMIZER = False
"""What a caller passes as `optimizer` to leave out one that the model carries."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the objects given to `save` or `load` consist of.

    `join(model, optimizer)` puts restored parts back into the forms the caller gave: a pair of model and optimizer.
    `tx(optimizer)` gives the transformation that a restored state is of, where the caller gave one.
    """

    model: Any
    optimizer: Any | None
    join: Callable[[Any, Any], tuple[Any, Any]] = lambda model, optimizer: (model, optimizer)
    tx: Callable[[Any], Any] = lambda optimizer: None


@dataclass(frozen=True, kw_only=True)
class ModelCapture:
    """A model about to be written.

    type: its class. weights: tensors by the producer's name. layers, order: as in schema.Model. parameters: the trainable
    ones as (name of the weight, an object that an optimizer may hold for it), in the model's order. native: what is no
    tensor and belongs to the weights (tree for polyckpt.residue). rng: the model's own random states, restored only with the
    RNG. metadata: for the header of the weights file. assumptions: as in schema.Manifest.
    """

    type: str
    weights: Mapping[str, Leaf]
    layers: Sequence[schema.Layer] = ()
    order: Literal["execution", "definition", "name"] = "definition"
    parameters: Sequence[tuple[str, Any]] = ()
    native: Any = None
    rng: Any = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    assumptions: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class OptimizerCapture:
    """An optimizer about to be written.

    slots: slot -> parameter name -> tensor. meanings: slot -> row of polyckpt.optimizers. native: all else that the same
    framework needs to go on exactly (tree for polyckpt.residue). The rest as in schema.Optimizer. learning_rate: one, or
    one per group, None where the optimizer does not hold it. settable: hyperparameters that each group of a live optimizer can
    be given; choices: conventions of each, with what they can be set to; rates: where
    the learning rate follows a schedule, from completed updates (n,) to those of all groups (n, groups). wrappers: meanings of
    slots that it will have besides those of its family, before it has any.
    """

    type: str
    family: str
    slots: Mapping[str, Mapping[str, Leaf]]
    meanings: Mapping[str, str] = field(default_factory=dict)
    groups: Sequence[schema.ParameterGroup] = ()
    conventions: Mapping[str, str] = field(default_factory=dict)
    step: int | None = None
    native: Any = None
    learning_rate: float | tuple[float, ...] | None = None
    settable: Sequence[frozenset[str]] = ()
    choices: Sequence[Mapping[str, frozenset[str]]] = ()
    rates: Callable[[np.ndarray], np.ndarray] | None = None
    wrappers: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A run as adapters captured it, or as the reader of another format found it.

    adapter: whose names and layouts these are. optimizer_adapter: who restores the optimizer, where that is another one.
    scheduler, extra: entries of polyckpt.objects. probe: of polyckpt.parity. rng: tree by adapter. learning_rate: by default
    that of the optimizer. rates: of a schedule. versions: of packages. left_out: what of a file is not read, one line each.
    check: of a file with checksums of its own, compares them with the bytes of a tensor, raising CorruptError.
    """

    adapter: str
    model: ModelCapture
    optimizer: OptimizerCapture | None = None
    optimizer_adapter: str | None = None
    scheduler: Mapping[str, Any] | None = None
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    probe: Any = None
    rng: Mapping[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    step: int | None = None
    batch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rate: Any = None
    rates: schema.Rates | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    check: Callable[[np.ndarray], None] | None = None


@dataclass(frozen=True, kw_only=True)
class ContinuedGroup:
    """One group of a live optimizer that goes on from a checkpoint of another framework.

    hyperparameters, conventions: what is to be set. form: what every update is to compute, where the optimizer's own formula
    is another one that will not do; then slots are those of `form`.
    """

    parameters: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    conventions: Mapping[str, str]
    form: Form | None = None


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """How a live optimizer goes on from a checkpoint of another framework.

    step: completed updates. groups: one for each that the optimizer was described with. slots: meaning -> parameter -> tensor,
    of the shape of the parameter or of what `updates.slots_of` says.
    """

    step: int
    groups: Sequence[ContinuedGroup]
    slots: Mapping[str, Mapping[str, StoredTensor]]


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """What a checkpoint holds of a model: `weights` with tied names included; `native` and `rng` as trees.

    native: None where there is nothing but tensors. rng: None where there is none.
    The leaves of a stored tree are TensorRef: adapters turn them into tensors with `residue.live` when they apply.
    """

    type: str
    weights: Mapping[str, StoredTensor]
    aliases: Mapping[str, str]
    native: Any
    rng: Any


@dataclass(frozen=True, kw_only=True)
class StoredOptimizer:
    """What a checkpoint holds of an optimizer: `slots` as in OptimizerCapture, `native` as a tree.

    Two entries that are the same StoredTensor were one tensor when they were saved.
    """

    type: str
    slots: Mapping[str, Mapping[str, StoredTensor]]
    native: Any


@dataclass(frozen=True, kw_only=True)
class Restore:
    """A prepared restore: what does not fit, and the function that writes all that fits and returns the restored object.

    tensors: what `apply` will read, so that it can be verified before. undo: for an `apply` that runs foreign code and so
    may fail; it puts back what was there before, and is called too where the `apply` of a later part fails. finish: what
    cannot fail, called once every `apply` of the load is over. names: of a model's weights -> those that the checkpoint has for
    them, where the same model was made in another way and names them otherwise.
    """

    apply: Callable[[], Any]
    problems: Sequence[Problem] = ()
    tensors: Sequence[StoredTensor] = ()
    undo: Callable[[], Any] | None = None
    finish: Callable[[], None] = lambda: None
    names: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, parameters: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """Parameters of the model under the names that they have in the checkpoint."""
        return [(self.names.get(name, name), value) for name, value in parameters]


class Schedule(Protocol):
    """A learning rate scheduler beside the optimizer, whose rates follow from how often it was called."""

    calls: int

    def rates(self) -> Iterator[tuple[float, ...]]:
        """The rates of all groups now, after one more call, and so on as far as it goes; the scheduler stays where it is."""
        ...

    def advance(self, calls: int) -> None:
        """Call it so many times."""
        ...


class Recorder(Protocol):
    """Told by `Adapter.trace` what happens while a model runs."""

    def ran(self, path: str, output: np.ndarray) -> None:
        """The layer `path`, as in schema.Layer, made `output`; called for each call of one, as it ends."""
        ...

    def flattened(self, path: str, shape: tuple[int, ...]) -> None:
        """The layer `path` (linear) reads a tensor of `shape`, without its batch axis, whose axes were merged into one."""
        ...


def another_kind(value: Any, kind: str, path: str) -> Restore:
    """The refusal to restore what was stored as a `kind` into a live `value` that is none."""
    problem = Problem("value", "extra", path, stored=f"a {kind}", live=f"a {type(value).__name__}")
    return Restore(apply=lambda: value, problems=[problem])


@contextlib.contextmanager
def running() -> Iterator[None]:
    """In this block a model runs on a batch, for `Adapter.trace`: what it raises becomes an UnsupportedError, and Python's and
    NumPy's random states are put back.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(f"model: it cannot be run on the batch: {type(error).__name__}: {error}") from error
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def uncallable(model: Any) -> UnsupportedError:
    """The refusal to run what is no function."""
    kind = type(model).__name__
    return UnsupportedError(f"model: a {kind} cannot be called: pass apply=, a function of it and the batch")


class Adapter(Protocol):
    """One framework. Instances hold no state; making one imports the framework."""

    name: ClassVar[str]

    def versions(self) -> dict[str, str]:
        """Versions of the packages that shape the checkpoint, by package name."""
        ...

    def recognises(self, value: Any) -> bool:
        """Whether `value`, whose class is of no known package, is this framework's all the same (a registered pytree)."""
        ...

    def parts(self, model: Any, optimizer: Any | None, tx: Any = None) -> Parts:
        """Take apart what the caller gave: a model may carry its optimizer, be wrapped, or be a whole train state.

        optimizer: the caller's; None means the one the model carries, NO_OPTIMIZER that it is to be left out.
        tx: the transformation of a bare optimizer state (optax).
        """
        ...

    def capture_model(self, model: Any) -> ModelCapture:
        """Describe a model and name its tensors. Raises UnsupportedError for what cannot be stored."""
        ...

    def capture_optimizer(self, optimizer: Any, model: ModelCapture) -> OptimizerCapture:
        """Describe an optimizer over the parameters of `model`, without changing it."""
        ...

    def prepare_model(self, model: Any, stored: StoredModel, *, rng: bool) -> Restore:
        """Compare a live model with a stored one. rng: whether to restore its random states too."""
        ...

    def parameters(self, model: Any) -> Sequence[tuple[str, Any]]:
        """The trainable parameters of a live model, as in ModelCapture."""
        ...

    def prepare_optimizer(
        self, optimizer: Any, stored: StoredOptimizer, parameters: Sequence[tuple[str, Any]], model: Any
    ) -> Restore:
        """Compare a live optimizer with a stored one. `parameters` are those of the live `model`, by its own adapter."""
        ...

    def continue_optimizer(self, optimizer: Any, continuation: Continuation, captured: ModelCapture, model: Any) -> Restore:
        """Prepare a live optimizer to go on where one of another framework stopped. `captured` describes the live `model`."""
        ...

    def schedule(self, value: Any) -> Schedule | None:
        """What a scheduler says of the rates to come; None for what does not say it."""
        ...

    def capture_object(self, value: Any) -> tuple[str, Any] | None:
        """(kind, tree) of a stateful object (scheduler, scaler, generator, module), or None for a plain value."""
        ...

    def prepare_object(self, value: Any, kind: str, tree: Any, *, path: str) -> Restore:
        """Compare a live stateful object with the tree of one that was captured. The leaves of `tree` are TensorRef."""
        ...

    def capture_rng(self) -> Any:
        """The framework's global random state on every device, as a tree; None where it has none."""
        ...

    def prepare_rng(self, tree: Any) -> Restore:
        """Compare the devices there are with those of a captured random state."""
        ...

    def trace(
        self, model: Any, arguments: tuple[Any, ...], recorder: Recorder, apply: Callable[..., Any] | None
    ) -> Sequence[np.ndarray]:
        """Run `model` on a batch as for inference and return its outputs, flat; nothing of it or of random states changes.

        arguments: positional ones, trees of NumPy arrays. apply: what to call instead, as apply(model, *arguments), for
        models that are no functions (a linen or Haiku tree). Raises UnsupportedError where the model cannot be called.
        """
        ...

    def leaf(self, value: Any) -> Leaf | Constant | None:
        """A tensor or constant of this framework that stands in a tree, or None for anything else."""
        ...

    def tensor(self, stored: StoredTensor, kind: str) -> Any:
        """The live, independent tensor of a leaf of this `kind`."""
        ...

    def constant(self, value: Any, kind: str) -> Any:
        """The live value of a constant of this `kind`. Raises ValueError for one it does not know."""
        ...
