"""Saves and loads at which one call on the system fails: ``python -m tests.faults.single DIRECTORY WORK [ACTION...]``.

Writes JSON: for each action, and each call that it can strike, what the call was and what was found afterwards. Each try is a
process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt
from polyckpt.storage import local
from tests.faults.calls import READS, WRITES, Call, Fault, Layer
from tests.interrupted import found
from tests.sealing import save_small

OLD, NEW, NEXT = 1.0, 2.0, 3.0
ACTIONS = ("EIO", "ENOSPC", "EACCES", "EINTR", "short", "kill")


def arrays(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full((3, 2), value, np.float32), "b": np.full(2, value, np.float64)}


def slots(value: float) -> dict[str, np.ndarray]:
    """Most of them never change, so that a file is linked from one checkpoint to the next."""
    return {"m": np.full(3, value, np.float64), "frozen": np.arange(100.0)}


def tell(ckpts: polyckpt.CheckpointManager, step: int) -> None:
    """The best of the run is step 2; its model is full of its step."""
    ckpts.save(arrays(float(step)), slots(float(step)), step=step, metrics={"loss": abs(step - 2)})


def manager(run: Path) -> polyckpt.CheckpointManager:
    return polyckpt.CheckpointManager(run, monitor="loss", keep_last=2, keep_best=1, link_unchanged=True)


class Loaded:
    """The live objects of a load: all of one value, before and after."""

    def __init__(self) -> None:
        self.model, self.optimizer = arrays(OLD), {"m": np.full(3, OLD)}

    def load(self, path: Path) -> None:
        polyckpt.load(path, self.model, self.optimizer, extra={"k": [OLD]})

    def values(self) -> set[float]:
        return {float(x) for array in (*self.model.values(), *self.optimizer.values()) for x in array.flat}


@dataclass(frozen=True)
class Work:
    """prepare: makes the directory of one try. run: what fails, and runs again where it did. look: what is there, read only.

    go_on: what comes later in another process, and what is there then.
    """

    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    look: Callable[[Path], dict[str, Any]]
    go_on: Callable[[Path], dict[str, Any]]


def _save(directory: Path) -> None:
    save_small(directory / "target", NEW, overwrite=True)


def _save_once(directory: Path) -> None:
    save_small(directory / "target", NEW)


def _look_at_target(directory: Path) -> dict[str, Any]:
    values = {name: found(directory / name) for name in ("target", "earlier")}
    return {**values, "there": sorted(os.listdir(directory))}


def _save_next(directory: Path) -> dict[str, Any]:
    save_small(directory / "target", NEXT, overwrite=True)
    return _look_at_target(directory)


def _prepare_target(directory: Path) -> None:
    save_small(directory / "earlier", OLD)
    save_small(directory / "target", OLD)


def _prepare_run(directory: Path) -> None:
    with manager(directory / "run") as ckpts:
        for step in range(1, 5):
            tell(ckpts, step)


def _save_in_run(directory: Path) -> None:
    with manager(directory / "run") as ckpts:
        ckpts.restore(arrays(0), slots(0))
        tell(ckpts, 5)


def _steps(run: Path) -> list[Any]:
    return [found(path) for path in sorted(run.glob("step-*"))]


def _look_at_run(directory: Path) -> dict[str, Any]:
    run = directory / "run"
    there = sorted(path.name for path in run.iterdir() if not path.name.startswith("step-"))
    return {"steps": [found(path) for path in sorted(run.glob("step-*"))], "best": found(run / "best"), "there": there}


def _go_on_in_run(directory: Path) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught, manager(directory / "run") as ckpts:
        warnings.simplefilter("always")
        resumed = ckpts.restore(arrays(0), slots(0)).step
        tell(ckpts, resumed + 1)
        tell(ckpts, resumed + 2)
        best = ckpts.best
    warned = [str(warning.message) for warning in caught]
    return {**_look_at_run(directory), "resumed": resumed, "best_step": best and best.step, "warned": warned}


def _load(directory: Path) -> None:
    live = Loaded()
    try:
        live.load(directory / "target")
    finally:
        assert live.values() in ({OLD}, {NEW}), "half-loaded"


WORKS = {
    "save": Work(lambda directory: save_small(directory / "earlier", OLD), _save_once, _look_at_target, _save_next),
    "overwrite": Work(_prepare_target, _save, _look_at_target, _save_next),
    "plain": Work(_prepare_target, _save, _look_at_target, _save_next),  # where the system has no exchange of directories
    "manager": Work(_prepare_run, _save_in_run, _look_at_run, _go_on_in_run),
    "load": Work(lambda directory: save_small(directory / "target", NEW), _load, lambda _: {}, lambda _: {}),
}


def described(error: BaseException, action: str) -> str:
    """What was raised: "refused" for the error that a user must get."""
    if not isinstance(error, polyckpt.PolyckptError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, polyckpt.StorageError) and error.errno == getattr(errno, action, None) and "/" in str(error):
        return "refused"
    return f"{type(error).__name__}: {error}"


def strikes(action: str, call: Call) -> bool:
    """Whether a call may end so; where a look cannot fail, or fails like any other, changes are enough."""
    if action == "short":
        return call.name in (*WRITES, *READS)
    return action == "EIO" or call.changes or (action == "EACCES" and call.name in ("open", "scandir"))


def child(directory: Path, work: str, at: int, action: str) -> dict[str, Any]:
    """One try: what came of it, what was there then, and what came of the same work once more."""
    warnings.simplefilter("ignore")
    fault = Fault(at, action)
    fault.install(directory)
    outcomes = [outcome(lambda: WORKS[work].run(directory), action)]
    struck, fault.at = fault.struck, 0
    assert struck is not None, "there were fewer calls than before"
    seen = WORKS[work].look(directory)
    if outcomes != ["done"]:
        outcomes.append(outcome(lambda: WORKS[work].run(directory), action))
    return {"call": str(struck), "changes": struck.changes, "outcomes": outcomes, **seen}


def calls(directory: Path, work: str) -> dict[str, Any]:
    """What is called where nothing fails, one after the other."""
    warnings.simplefilter("ignore")
    made: list[list[Any]] = []
    Layer(directory, lambda call, _: made.append([str(call), call.changes, [a for a in ACTIONS if strikes(a, call)]]))
    WORKS[work].run(directory)
    return {"calls": made}


def outcome(work: Callable[[], Any], action: str) -> str:
    """What came of it: "refused" where the error was the one that a user must get."""
    try:
        work()
    except polyckpt.StorageError as error:
        code = getattr(errno, action, errno.ENOSPC)  # a line that was written by half says that the disk is full
        if error.errno == code and "/" in str(error):
            return "refused"
        return f"another StorageError: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def attempt(directory: Path, what: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any] | None:
    """`what`, in a process of its own; None where that was killed."""
    told, tells = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            finding = what(directory, *arguments)
            os.write(tells, json.dumps(finding).replace(str(directory), "").encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(tells)
    with os.fdopen(told, "rb") as file:
        said = file.read()
    os.waitpid(process, 0)
    return json.loads(said) if said else None


def survey(directory: Path, work: str, actions: Sequence[str], every: int = 1) -> dict[str, list[dict[str, Any]]]:
    """What was found for each action and call; with `every` for as many calls less, not the same ones for each action."""
    place, template = directory / "try", directory / "template"
    template.mkdir()
    WORKS[work].prepare(template)
    exchange = local._exchange
    if work == "plain":
        local._exchange = lambda *_: False

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, place, symlinks=True)

    begin()
    made = (attempt(place, calls, work) or {})["calls"]
    findings: dict[str, list[dict[str, Any]]] = {action: [] for action in actions}
    tries: Counter[str] = Counter(dict(zip(actions, range(len(actions)), strict=True)))
    for number, (call, changes, struck_by) in enumerate(made, 1):
        for action in actions:
            tries[action] += action in struck_by
            if action in struck_by and tries[action] % every == 0:
                begin()
                finding = attempt(place, child, work, number, action)
                finding = finding or {"outcomes": ["killed"], **WORKS[work].look(place)}
                finding = {"call": call, "changes": changes, **finding}  # those of the try, where it lived to tell
                findings[action].append({**finding, "next": WORKS[work].go_on(place)})
    local._exchange = exchange
    return findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults.single", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("actions", nargs="*", default=ACTIONS)
    parser.add_argument("--every", type=int, default=1)
    given = parser.parse_args()
    json.dump(survey(given.directory, given.work, given.actions, given.every), sys.stdout)
