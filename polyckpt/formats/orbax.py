"""Directories that Orbax wrote: an item, or a step of a CheckpointManager, read with tensorstore alone."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import msgspec

from polyckpt import names
from polyckpt.adapter import Contents
from polyckpt.errors import CorruptError, UnsupportedError
from polyckpt.formats.described import Like
from polyckpt.formats.detyped import Tree, contents_of
from polyckpt.formats.table import Format
from polyckpt.leaves import Leaf
from polyckpt.storage.zarr_arrays import METADATA, ZarrArrays

_CHECKPOINT = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"
_METRICS = "metrics"
_STEP = re.compile(r"(?:^|_)0*(\d+)$")
_STRINGS = "_strings.json"


def recognises(path: Path) -> bool:
    """Whether it is an item, or a step that holds items, and finished."""
    return path.is_dir() and _UNFINISHED not in path.name and bool(_items(path))


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
    items = _items(path)
    if not items:
        raise UnsupportedError(f"{path}: no finished item of Orbax in it")
    left_out: list[str] = []
    leaves: dict[str, Leaf] = {}
    for name, item in items.items():
        prefix = [name] if len(items) > 1 else []
        leaves |= _leaves(item, prefix, left_out)
    more: dict[str, Any] = {"metrics": {}}
    if "" not in items:
        more["metrics"] = _metrics(path, left_out)
        left_out += [f"{each.name}: not an item of arrays" for each in _others(path, items)]
        if (match := _STEP.search(path.name)) is not None:
            more["step"] = int(match[1])
    return contents_of(str(path), Tree(leaves), like, left_out, **more)


def _others(path: Path, items: dict[str, Path]) -> list[Path]:
    return [child for child in sorted(path.iterdir()) if child.is_dir() and child.name not in {*items, _METRICS}]


def _leaves(item: Path, prefix: list[str], left_out: list[str]) -> dict[str, Leaf]:
    arrays = ZarrArrays(item)
    found = {
        names.join([*prefix, *path]): Leaf(
            dtype=entry.dtype, shape=entry.shape, read=functools.partial(arrays.read, path), frozen=True
        )
        for path, entry in arrays.entries.items()
    }
    left_out += [
        f"{names.join([*prefix, *leaf.path])}: a {leaf.value_type}"
        for leaf in arrays.leaves
        if not leaf.is_array and leaf.value_type not in ("None", "Dict", "List")
    ]
    return found


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
    reader="polyckpt.formats.orbax:read",
    writer="polyckpt.adapters.jax.orbax_store:export",
    needs="polyckpt[orbax]",
)
