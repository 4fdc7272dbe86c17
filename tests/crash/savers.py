"""The processes that are killed: each goes on with what the one before left, saves in a loop, and tells what it did.

What a saver tells is one line of JSON on a pipe, written in one piece: ``["begin", n]`` before the n-th save, ``["done", n]``
once that is committed, and whatever else the parent compares. The values that are saved follow from n alone, so that a parent
knows what must be found.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import polyckpt
from polyckpt.storage import local

KEEP_LAST, KEEP_BEST = 2, 2
Tell = Callable[..., None]


def contents(number: int) -> dict[str, Any]:
    """What the n-th save holds."""
    return {
        "w": np.arange(20_000, dtype=np.float32).reshape(100, 200) + number,
        "b": np.full(3, number, np.float64),
        "deep": {"k": np.full((7, 5), number, np.int16)},
        "frozen": np.arange(25_000, dtype=np.float32),
    }


def slots(number: int) -> dict[str, Any]:
    return {"m": np.full((11, 13), -number, np.float32)}


def loss(number: int) -> float:
    """What is measured at n: it repeats, so that the best is not always the newest, and ties occur."""
    return random.Random(number).randrange(50) / 10 + 5 / number


def number_in(model: Any, optimizer: Any) -> int:
    """The n whose contents these are. Fails where they are those of two saves, or of none."""
    number = int(model["b"][0])
    for name, there, wanted in (("model", model, contents(number)), ("optimizer", optimizer, slots(number))):
        for found, expected in zip(arrays(there), arrays(wanted), strict=True):
            assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes(), (name, number)
    return number


def arrays(tree: Any) -> list[np.ndarray]:
    if isinstance(tree, Mapping):
        return [array for name in sorted(tree) for array in arrays(tree[name])]
    return [tree]


def temporaries(directory: Path) -> int:
    return len(list(directory.glob(f"{local.TEMPORARY_PREFIX}*")))


@dataclass(frozen=True)
class Mode:
    """A way of saving. options: of the manager. exchange: whether the system swaps directories in one step."""

    save: Callable[[Path, Mode, Tell], None]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    exchange: bool = True


def manage(directory: Path, mode: Mode, tell: Tell) -> None:
    """A training loop with a manager."""
    run, asynchronous = directory / "run", bool(mode.options.get("async_save"))
    with polyckpt.CheckpointManager(run, monitor="loss", keep_last=KEEP_LAST, keep_best=KEEP_BEST, **mode.options) as ckpts:
        start = ckpts.restore(contents(1), slots(1))
        if start.checkpoint is not None:
            assert number_in(start.model, start.optimizer) == start.step
        tell("resumed", start.step, temporaries(run))
        before = start.step if start.checkpoint is not None else None
        for number in range(start.step + 1, 1_000_000):
            tell("begin", number)
            path = ckpts.save(contents(number), slots(number), step=number, metrics={"loss": loss(number)})
            if asynchronous and path is not None and before is not None:
                tell("done", before)  # the one before is committed when the next may begin
            elif not asynchronous:
                best, kept = ckpts.best, [record.step for record in ckpts.checkpoints]
                tell("decided", number, best and best.step, kept)
                if path is not None:
                    tell("done", number)
            before = number if path is not None else before


def overwrite(directory: Path, mode: Mode, tell: Tell) -> None:
    """One path, replaced again and again."""
    if not mode.exchange:
        local._exchange = lambda *_: False
    path, number = directory / "checkpoint", 0
    if os.path.lexists(path) or list(directory.glob("*replaced")):
        start = polyckpt.load(path, contents(1), slots(1))
        number = number_in(start.model, start.optimizer)
        assert start.step == number
    tell("resumed", number, 0)
    while True:
        number += 1
        tell("begin", number)
        polyckpt.save(path, contents(number), slots(number), step=number, metrics={"loss": loss(number)}, overwrite=True)
        tell("done", number)
        assert os.listdir(directory) == ["checkpoint"], "leftovers of the killed"


def collect(directory: Path, mode: Mode, tell: Tell) -> None:
    """One path for each save, none of which is ever deleted."""
    number = max((int(path.name) for path in directory.glob("[0-9]*")), default=0)
    tell("resumed", number, 0)
    while True:
        number += 1
        tell("begin", number)
        polyckpt.save(directory / str(number), contents(number), slots(number), step=number)
        tell("done", number)
        assert not temporaries(directory), "leftovers of the killed"


MODES = {
    "sync": Mode(manage),
    "async": Mode(manage, MappingProxyType({"async_save": True})),
    "some": Mode(manage, MappingProxyType({"every": polyckpt.Every(steps=3) | polyckpt.OnImprovement()})),
    "linking": Mode(manage, MappingProxyType({"link_unchanged": True})),
    "overwrite": Mode(overwrite),
    "overwrite without exchange": Mode(overwrite, exchange=False),
    "collect": Mode(collect),
}


def saver(directory: Path, mode: Mode, pipe: int) -> None:
    """The whole life of a forked process."""
    code = 1
    try:
        warnings.simplefilter("error")  # nothing may be damaged
        mode.save(directory, mode, lambda *what: os.write(pipe, json.dumps(what).encode() + b"\n") and None)
    except BaseException as error:
        os.write(pipe, json.dumps(["failed", repr(error)]).encode() + b"\n")
    finally:
        os._exit(code)
