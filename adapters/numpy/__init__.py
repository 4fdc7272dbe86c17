"""The adapter of host values: dicts and lists of NumPy arrays as models, and the random states of Python and NumPy."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import numpy as np

from polyckpt import names, residue
from polyckpt.adapter import (
    NO_OPTIMIZER,
    Continuation,
    ModelCapture,
    OptimizerCapture,
    Parts,
    Recorder,
    Restore,
    Schedule,
    StoredModel,
    StoredOptimizer,
    another_kind,
    running,
    uncallable,
)
from polyckpt.checkpoint import StoredTensor
from polyckpt.dtypes import DTYPES, numpy_name
from polyckpt.errors import CorruptError, PolyckptError, Problem, UnsupportedError
from polyckpt.leaves import Leaf, array_leaf
from polyckpt.names import type_name
from polyckpt.residue import Constant

_SLOTS = "tree"


class NumpyAdapter:
    """NumPy arrays in nested dicts, lists and tuples. They are restored as new values of the template's structure."""

    name: ClassVar[str] = "numpy"

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def recognises(self, value: Any) -> bool:
        return False

    def parts(self, model: Any, optimizer: Any | None, tx: Any = None) -> Parts:
        return Parts(model=model, optimizer=None if optimizer is NO_OPTIMIZER else optimizer)

    def capture_model(self, model: Any) -> ModelCapture:
        weights, native = _flatten(model, "model")
        return ModelCapture(type=type_name(model), weights=weights, order="definition", native=native)

    def capture_optimizer(self, optimizer: Any, model: ModelCapture) -> OptimizerCapture:
        slots, native = _flatten(optimizer, "optimizer")
        return OptimizerCapture(type=type_name(optimizer), family="custom", slots={_SLOTS: slots}, native=native)

    def prepare_model(self, model: Any, stored: StoredModel, *, rng: bool) -> Restore:
        return _prepare_tree(model, stored.weights, {} if stored.native is None else stored.native, "weights")

    def parameters(self, model: Any) -> Sequence[tuple[str, Any]]:
        return []

    def prepare_optimizer(
        self, optimizer: Any, stored: StoredOptimizer, parameters: Sequence[tuple[str, Any]], model: Any
    ) -> Restore:
        return _prepare_tree(optimizer, stored.slots.get(_SLOTS, {}), stored.native, "optimizer")

    def continue_optimizer(self, optimizer: Any, continuation: Continuation, captured: ModelCapture, model: Any) -> Restore:
        raise UnsupportedError("optimizer: arrays of NumPy have no formula that could go on")

    def schedule(self, value: Any) -> Schedule | None:
        return None

    def capture_object(self, value: Any) -> tuple[str, Any] | None:
        if isinstance(value, random.SystemRandom):
            raise UnsupportedError("a random.SystemRandom has no state that could be saved")
        for kind, (cls, get, _) in _GENERATORS.items():
            if isinstance(value, cls):
                return kind, get(value)
        return None

    def prepare_object(self, value: Any, kind: str, tree: Any, *, path: str) -> Restore:
        if kind not in _GENERATORS or not isinstance(value, _GENERATORS[kind][0]):
            return another_kind(value, kind, path)
        _, get, put = _GENERATORS[kind]
        live, stored = (get(value), tree) if isinstance(tree, dict) else ({}, {})
        if live.get("bit_generator") != stored.get("bit_generator"):
            names_of = {"stored": str(stored.get("bit_generator")), "live": str(live.get("bit_generator"))}
            return Restore(apply=lambda: value, problems=[Problem("value", "extra", path, **names_of)])
        _try(lambda: put(copy.deepcopy(value), residue.live(tree)), path)
        before: list[Any] = []

        def apply() -> Any:
            before.append(get(value))
            put(value, residue.live(tree))
            return value

        return Restore(apply=apply, tensors=residue.tensors(tree), undo=lambda: before and put(value, before[0]))

    def capture_rng(self) -> Any:
        # The bit generator behind np.random.* is MT19937 unless a program replaced it.
        return {"python": _python_state(random), "numpy": np.random.get_state(legacy=False)}

    def trace(
        self, model: Any, arguments: tuple[Any, ...], recorder: Recorder, apply: Callable[..., Any] | None
    ) -> Sequence[np.ndarray]:
        if apply is None:
            raise uncallable(model)
        with running():
            outputs = apply(model, *arguments)
        return [np.asarray(each) for each in (outputs if isinstance(outputs, tuple | list) else [outputs])]

    def prepare_rng(self, tree: Any) -> Restore:
        state = _try(lambda: residue.live(tree), "rng")
        stored, live = _try(lambda: state["numpy"]["bit_generator"], "rng"), np.random.get_state(legacy=False)["bit_generator"]
        if stored != live:
            return Restore(apply=lambda: None, problems=[Problem("value", "rng", "numpy", stored=str(stored), live=str(live))])
        # On copies first, since nothing that comes so late in a load may fail.
        _try(lambda: _set_python_state(random.Random(0), state["python"]), "rng python")
        _try(lambda: np.random.RandomState(copy.deepcopy(_global_bit_generator())).set_state(state["numpy"]), "rng numpy")

        def apply() -> None:
            _set_python_state(random, state["python"])
            np.random.set_state(state["numpy"])

        return Restore(apply=apply, tensors=residue.tensors(tree))

    def leaf(self, value: Any) -> Leaf | Constant | None:
        if isinstance(value, np.ndarray):
            return array_leaf(value)
        if isinstance(value, np.generic):
            return array_leaf(np.asarray(value), "numpy.scalar")
        if isinstance(value, np.dtype):
            # By name, which says nothing of byte order or fields: only types whose name says all.
            return Constant("numpy.dtype", value.name) if value.name in DTYPES and DTYPES[value.name].numpy == value else None
        return None

    def tensor(self, stored: StoredTensor, kind: str) -> Any:
        array = stored.numpy().copy()
        return array[()] if kind == "numpy.scalar" else array

    def constant(self, value: Any, kind: str) -> Any:
        if kind != "numpy.dtype" or value not in DTYPES:
            raise ValueError(f"{kind!r} {value!r} is no constant of NumPy")
        return DTYPES[value].numpy


def _global_bit_generator() -> Any:
    # Public, but missing in NumPy's own list of what numpy.random exports.
    return getattr(np.random, "get_bit_generator")()  # noqa: B009


def _try(action: Callable[[], Any], what: str) -> Any:
    """Run an action on copies that fails where a stored random state is not one."""
    try:
        return action()
    except PolyckptError:
        raise
    except Exception as error:
        raise CorruptError(f"{what}: the checkpoint holds no valid random state: {error!r}") from error


def _python_state(generator: Any) -> dict[str, Any]:
    version, words, gauss = generator.getstate()
    return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}


def _set_python_state(generator: Any, state: Mapping[str, Any]) -> None:
    if not isinstance(state["gauss"], float | None):
        raise TypeError(f"gauss is {state['gauss']!r}")
    generator.setstate((state["version"], tuple(int(word) for word in state["words"]), state["gauss"]))


def _set_bit_generator(generator: Any, state: Any) -> None:
    generator.bit_generator.state = state


_GENERATORS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    "python.Random": (random.Random, _python_state, _set_python_state),
    "numpy.RandomState": (
        np.random.RandomState,
        lambda generator: generator.get_state(legacy=False),
        lambda generator, state: generator.set_state(state),
    ),
    "numpy.Generator": (np.random.Generator, lambda generator: generator.bit_generator.state, _set_bit_generator),
}
"""Kind -> class, reading its state, writing it."""


def _flatten(tree: Any, what: str) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """The arrays of a tree by name, and its other leaves by name."""
    arrays: dict[str, Leaf] = {}
    others: dict[str, Any] = {}
    for path, leaf in residue.walk(tree):
        name = names.join(path)
        if name in arrays or name in others:
            raise UnsupportedError(f"{what}: two entries are named {name!r}: keys that differ only in type")
        if isinstance(leaf, np.ndarray):
            try:
                arrays[name] = array_leaf(leaf)
            except UnsupportedError as error:
                raise UnsupportedError(f"{what}: {name}: {error}") from error
        else:
            others[name] = leaf
    return arrays, others


def _prepare_tree(template: Any, tensors: Mapping[str, StoredTensor], others: Mapping[str, Any], section: str) -> Restore:
    if not isinstance(others, dict):
        raise CorruptError(f"{section}: native residue is {others!r:.80}, not an object")
    live = {names.join(path): leaf for path, leaf in residue.walk(template)}
    problems = []
    for name, leaf in live.items():
        if name in tensors and isinstance(leaf, np.ndarray):
            there = tensors[name]
            if (there.shape, there.dtype) == (leaf.shape, numpy_name(leaf.dtype)):
                continue
        shown = f"{leaf.dtype.name}{list(leaf.shape)}" if isinstance(leaf, np.ndarray) else repr(leaf)
        if isinstance(leaf, np.ndarray) != (name in tensors) and (name in tensors or name in others):
            stored = str(tensors[name]) if name in tensors else repr(others[name])
            problems.append(Problem("dtype", section, name, stored=stored, live=shown))
        elif name not in tensors and name not in others:
            problems.append(Problem("missing", section, name, live=shown))
        elif name in tensors and tensors[name].shape != leaf.shape:
            problems.append(Problem("shape", section, name, stored=str(tensors[name]), live=shown))
        elif name in tensors:
            problems.append(Problem("dtype", section, name, stored=str(tensors[name]), live=shown))
    for name in {**tensors, **others}:
        if name not in live:
            stored = str(tensors[name]) if name in tensors else repr(others[name])
            problems.append(Problem("unexpected", section, name, stored=stored))
    unfit = {problem.name for problem in problems}
    # Equal names of one stored tensor come back as one array: tied as they were.
    made: dict[int, np.ndarray] = {}

    def value(path: tuple[Any, ...], leaf: Any) -> Any:
        name = names.join(path)
        if name in unfit:
            return leaf
        if name not in tensors:
            return residue.live(others[name])
        stored = tensors[name]
        return made.setdefault(id(stored), stored.numpy().copy()) if id(stored) not in made else made[id(stored)]

    return Restore(
        apply=lambda: _rebuild(template, value),
        problems=problems,
        tensors=[*tensors.values(), *residue.tensors(dict(others))],
    )


def _rebuild(tree: Any, value: Callable[[tuple[Any, ...], Any], Any], path: tuple[Any, ...] = ()) -> Any:
    """A tree of the same containers with `value(path, leaf)` for each leaf."""
    if isinstance(tree, Mapping):
        children = {key: _rebuild(child, value, (*path, key)) for key, child in tree.items()}
        if isinstance(tree, MutableMapping):
            # Not by its constructor: a defaultdict's wants a factory first.
            rebuilt = copy.copy(tree)
            rebuilt.update(children)
            return rebuilt
        constructor: Callable[[dict[Any, Any]], Any] = type(tree)
        return constructor(children)
    if isinstance(tree, list | tuple):
        items = [_rebuild(child, value, (*path, index)) for index, child in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return value(path, tree)
