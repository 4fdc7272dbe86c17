"""Directories that Orbax wrote, read with tensorstore alone: an item, a step, or all steps of a CheckpointManager."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from polyckpt import names
from polyckpt.adapter import Contents
from polyckpt.errors import CheckpointError, CorruptError, UnsupportedError
from polyckpt.formats.described import Like
from polyckpt.formats.detyped import Tree, contents_of
from polyckpt.formats.table import Format
from polyckpt.leaves import Leaf
from polyckpt.storage.zarr_arrays import METADATA, ZarrArrays

_CHECKPOINT = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"
_METRICS = "metrics"
_STEP = re.compile(r"(?:(?P<prefix>.+)_)?0*(?P<step>\d+)")
"""What a CheckpointManager calls a step."""
_ITEM_PREFIXES = ("", "checkpoint")
"""Of steps that are an item themselves, as flax.training names them; whoever names a directory resnet_50 means no step."""
_SAVED_ALONE = "orbax.checkpoint"
"""A file that v1 puts into what was saved to a path of its own, by no manager."""
_HANDLERS_OF_ARRAYS = re.compile("Standard|PyTree")


class _Step(msgspec.Struct):
    item_handlers: dict[str, str | None] | str | None = None


def recognises(path: Path) -> bool:
    """Whether it is an item, a step that holds items, or a manager's directory, and finished."""
    if not path.is_dir() or _UNFINISHED in path.name:
        return False
    return (path / METADATA).is_file() or (path / _CHECKPOINT).is_file() or bool(steps(path))


def steps(path: Path) -> list[Path]:
    """The steps in the directory of a CheckpointManager in order, whole or not; none where it is none, or one of several."""
    if (path / _CHECKPOINT).is_file() or (path / METADATA).is_file():
        return []
    named = [(child, found) for child in path.iterdir() if (found := _STEP.fullmatch(child.name)) and child.is_dir()]
    prefixes = {found["prefix"] or "" for child, found in named if _is_step(child, found["prefix"] or "")}
    if len(prefixes) != 1:
        return []
    inside = [(int(found["step"]), child) for child, found in named if (found["prefix"] or "") in prefixes]
    return [child for _, child in sorted(inside)]


def _is_step(path: Path, prefix: str) -> bool:
    items = _items(path)
    return bool(items) and not (path / _SAVED_ALONE).exists() and ("" not in items or prefix in _ITEM_PREFIXES)


def _items(path: Path) -> dict[str, Path]:
    """The items with arrays in a directory by name; "" for one that is such an item itself."""
    if (path / METADATA).is_file():
        return {"": path}
    if not (path / _CHECKPOINT).is_file():
        return {}
    inside = (child for child in path.iterdir() if child.is_dir() and _UNFINISHED not in child.name)
    return {child.name: child for child in sorted(inside) if (child / METADATA).is_file()}


def read(path: Path, like: Like | None) -> Contents:
    """The contents of an item or a step; several items of one step are one tree, each below its name."""
    with _told(path):
        items = _items(path)
        handlers = _handlers(path) if "" not in items else {}
        for name, handler in handlers.items():
            if _HANDLERS_OF_ARRAYS.search(handler) and name not in items:
                raise CorruptError(
                    f"{path / name}: no {METADATA} in it, but {_CHECKPOINT} says that {handler} wrote arrays there"
                )
        if not items:
            raise UnsupportedError(f"{path}: no item of arrays in it; there are {', '.join(sorted(handlers)) or 'none'}")
        left_out: list[str] = []
        leaves: dict[str, Leaf] = {}
        texts: dict[str, str] = {}
        for name, item in items.items():
            prefix = [name] if len(items) > 1 else []
            arrays = ZarrArrays(item)
            leaves |= _leaves(path, arrays, prefix)
            texts |= {names.join([*prefix, *place]): text for place, text in arrays.texts.items()}
            left_out += _unread(arrays, prefix)
        more: dict[str, Any] = {"metrics": {}}
        if "" not in items:
            more["metrics"] = _metrics(path, left_out)
            left_out += [
                f"{each.name}: an item of {handlers.get(each.name, 'something else')}, not of arrays"
                for each in _others(path, items)
            ]
        if (step := _step_of(path, items)) is not None:
            more["step"] = step
        return contents_of(str(path), Tree(leaves, texts), like, left_out, **more)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of a step of a manager name the step before it, from which a run can go on."""
    try:
        yield
    except CheckpointError as error:
        before: list[Path] = []
        with contextlib.suppress(OSError):
            siblings = steps(path.parent)
            if path in siblings:
                before = [each for each in siblings[: siblings.index(path)] if _items(each)]
        if not before:
            raise
        raise type(error)(f"{error}. The step before it is {before[-1]}") from error


def _handlers(path: Path) -> dict[str, str]:
    """Which class of Orbax wrote each item of a step, where it says so; "" stands for a directory that was one itself."""
    source = path / _CHECKPOINT
    try:
        told = msgspec.json.decode(source.read_bytes(), type=_Step).item_handlers
    except FileNotFoundError as error:
        raise CorruptError(f"{path}: neither {METADATA} nor {_CHECKPOINT} in it, so not a whole checkpoint of Orbax") from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptError(f"{source}: not what Orbax writes: {error}") from error
    found = told if isinstance(told, dict) else {"": told}
    return {name: handler.rpartition(".")[2] for name, handler in found.items() if handler}


def _step_of(path: Path, items: dict[str, Path]) -> int | None:
    """The step that a directory is named after."""
    found = _STEP.fullmatch(path.name)
    if found is None or (path / _SAVED_ALONE).exists() or (path.parent / _CHECKPOINT).exists():
        return None
    return int(found["step"]) if "" not in items or (found["prefix"] or "") in _ITEM_PREFIXES else None


def _others(path: Path, items: dict[str, Path]) -> list[Path]:
    return [child for child in sorted(path.iterdir()) if child.is_dir() and child.name not in {*items, _METRICS}]


def _leaves(path: Path, arrays: ZarrArrays, prefix: list[str]) -> dict[str, Leaf]:
    def read_array(place: tuple[str, ...]) -> np.ndarray:
        with _told(path):
            return arrays.read(place)

    return {
        names.join([*prefix, *place]): Leaf(
            dtype=entry.dtype, shape=entry.shape, read=functools.partial(read_array, place), frozen=True
        )
        for place, entry in arrays.entries.items()
    }


_STRUCTURE = ("None", "Dict", "List")


def _unread(arrays: ZarrArrays, prefix: list[str]) -> list[str]:
    return [
        f"{names.join([*prefix, *leaf.path])}: a {leaf.value_type}"
        for leaf in arrays.leaves
        if not leaf.is_array and leaf.path not in arrays.texts and leaf.value_type not in _STRUCTURE
    ]


def _metrics(path: Path, left_out: list[str]) -> dict[str, float]:
    source = path / _METRICS / _METRICS
    if not source.is_file():
        return {}
    try:
        told = msgspec.json.decode(source.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptError(f"{source}: not an object of JSON: {error}") from error
    left_out += [f"metric {name}: {value!r:.80}" for name, value in told.items() if not _is_number(value)]
    return {name: float(value) for name, value in told.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


DIRECTORY = Format(
    name="orbax",
    title="a directory of Orbax",
    adapter="jax",
    recognises=recognises,
    steps=steps,
    reader="polyckpt.formats.orbax:read",
    writer="polyckpt.adapters.jax.orbax_store:export",
    needs="polyckpt[orbax]",
)
