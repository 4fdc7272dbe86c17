"""Live models for the command line: functions that the user names as module:function."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from polyckpt import registry
from polyckpt.checkpoint import Checkpoint
from polyckpt.errors import MismatchError, NotACheckpointError, UnsupportedError
from polyckpt.formats import table
from polyckpt.formats.described import Like
from polyckpt.formats.opened import open_
from polyckpt.storage import local


@dataclass(frozen=True)
class Made:
    """What a function made: a model, and the optimizer where it returned both. adapter: of the model."""

    name: str
    adapter: str
    model: Any
    optimizer: Any = None


def made(names: Sequence[str] | None) -> list[Made]:
    """What the functions `names`, each module:function, make. Raises UnsupportedError, saying what of one there is not."""
    return [_made(name) for name in names or ()]


def _made(name: str) -> Made:
    module, separator, function = name.partition(":")
    if not (module and separator and function):
        raise UnsupportedError(f"--like {name}: write it as module:function, of a function that makes the model")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"--like {name}: {error} (modules are looked for here and where Python looks)") from error
    factory = getattr(found, function, None)
    if not callable(factory):
        there = ", ".join(sorted(each for each, value in vars(found).items() if callable(value) and each[0] != "_"))
        raise UnsupportedError(f"--like {name}: {module} has no function {function!r}; it has {there or 'none'}")
    try:
        result = factory()
    except TypeError as error:
        raise UnsupportedError(f"--like {name}: {function}() without arguments: {error}") from error
    model, optimizer = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    return Made(name, registry.adapter_for(model, f"--like {name}").name, model, optimizer)


def opened(path: Path, like: Sequence[Made] = (), *, verify: bool = True) -> Checkpoint:
    """A checkpoint in whatever format, described by the model of its framework among `like`, where there is one."""
    chosen = source_of(path, like)
    return open_(path, verify=verify, like=lambda: Like.of(chosen.model, chosen.optimizer, required=True) if chosen else None)


def source_of(path: Path, like: Sequence[Made]) -> Made | None:
    """Which model has the names of a file: the one of its framework; where anybody writes such files, the one that fits."""
    try:
        format = table.of(local.absolute(path)) if like and not _is_ours(path) else None
    except NotACheckpointError:
        return None  # opening it says what is wrong
    if format is None:
        return None
    for each in like:
        if format.adapter == each.adapter:
            return each
        if not format.adapter:
            candidate = Like.of(each.model, each.optimizer, required=True)
            try:
                format.read(local.absolute(path), candidate)
            except MismatchError:
                continue
            return each
    return None


def refuse(unused: Made, path: Path, target: str) -> NoReturn:
    """Say why a model has no part in a conversion: MismatchError where its names are not those of the file."""
    open_(path, like=lambda: Like.of(unused.model, unused.optimizer, required=True))
    raise UnsupportedError(
        f"--like {unused.name}: a model of {unused.adapter} has no part in this: {path} is read, and {target} is written, "
        "without it"
    )


def target_of(like: Sequence[Made], adapter: str, source: str) -> Made | None:
    """Which of the models is to be written: the one of the framework `adapter`; where that is "", one not of `source`."""
    return next((each for each in like if (each.adapter == adapter if adapter else each.adapter != source)), None)


def _is_ours(path: Path) -> bool:
    try:
        local.locate(local.absolute(path))
    except NotACheckpointError:
        return False
    return True
