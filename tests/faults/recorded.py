"""Saves whose calls are recorded as operations of tests.faults.disk, in a process that may be killed at any of them."""

from __future__ import annotations

import ast
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyckpt.storage import local
from tests.faults.calls import Call, Layer
from tests.faults.disk import Operation
from tests.faults.single import NEW, NEXT, OLD, arrays, manager, slots, tell
from tests.sealing import save_small


class Recorder:
    """Turns calls into operations as they are made."""

    def __init__(self, root: Path, told: Callable[[Operation], None], kill: int = 0) -> None:
        self.root, self.told, self.kill, self.made = root, told, kill, 0
        self.offsets: dict[int, int] = {}
        self.layer = Layer(root, self.before, self.after)

    def before(self, call: Call, number: int) -> None:
        self.existed = call.name != "open" or os.path.lexists(call.path)
        if call.changes:
            self.made += 1
            if self.made == self.kill:
                os.kill(os.getpid(), signal.SIGKILL)

    def after(self, call: Call, result: Any) -> None:
        path = self._relative(call.path)
        name, arguments = call.name, call.arguments
        if name == "open":
            self.offsets[result] = 0
            if not self.existed:
                self.told(("create", path))
            assert not arguments[1] & os.O_TRUNC, "a file that is emptied is not modelled"
            if arguments[1] & os.O_APPEND:
                self.offsets[result] = os.stat(call.path).st_size
        elif name in ("write", "pwrite"):
            descriptor, data = arguments[0], bytes(arguments[1])[:result]
            offset = arguments[2] if name == "pwrite" else self.offsets[descriptor]
            if name == "write":
                self.offsets[descriptor] = offset + result
            self.told(("write", path, offset, data))
        elif name in ("ftruncate", "truncate"):
            self.told(("truncate", path, arguments[1]))
            self.offsets[arguments[0]] = min(self.offsets.get(arguments[0], 0), arguments[1])
        elif name in ("fsync", "fdatasync"):
            self.told(("sync", path))
        elif name in ("mkdir", "rmdir", "unlink", "remove"):
            self.told(("unlink" if name == "remove" else name, path))
        elif name in ("rename", "replace", "link"):
            self.told(("link" if name == "link" else "rename", self._relative(arguments[0]), path))
        elif name == "symlink":
            self.told(("symlink", arguments[0], path))
        elif name == "renameat2":
            if result:
                self.told(("exchange", self._relative(arguments[0]), path))
        else:
            assert not call.changes, f"{call} is not modelled"

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)


Mark = Callable[[Any], None]


def prepare_target(directory: Path, mark: Mark) -> None:
    for name in ("earlier", "target"):
        save_small(directory / name, OLD)


def save(directory: Path, mark: Mark) -> None:
    save_small(directory / "new", NEW)
    mark(NEW)


def replace(directory: Path, mark: Mark) -> None:
    save_small(directory / "target", NEW, overwrite=True)
    mark(NEW)


def replace_again(directory: Path, mark: Mark) -> None:
    save_small(directory / "target", NEXT, overwrite=True)
    mark(NEXT)


def prepare_run(directory: Path, mark: Mark) -> None:
    (directory / "run").mkdir()


def train(directory: Path, mark: Mark) -> None:
    """Four steps, of which the later ones delete checkpoints and move links."""
    with manager(directory / "run") as ckpts:
        start = ckpts.restore(arrays(0), slots(0))
        mark(start.step)
        for step in range(start.step + 1, start.step + 5):
            tell(ckpts, step)
            mark(step)


def record(directory: Path, *works: Callable[[Path, Mark], None], kill: int = 0, plain: bool = False) -> list[Operation]:
    """The operations of `works`, done in a process of its own. All but the last are done undisturbed.

    kill: the change before which the process is killed, counted from 1 in the last work. plain: as if the system could not
    exchange directories.
    """
    told, tells = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(told)
        try:
            _recorded(directory, works, kill, plain, tells)
        finally:
            os._exit(0)
    os.close(tells)
    with os.fdopen(told, "rb") as file:
        lines = file.read().splitlines()
    os.waitpid(process, 0)
    operations = [ast.literal_eval(line.decode()) for line in lines]
    assert kill or operations[-1] == ("mark", "end"), operations[-1:]
    return operations


def _recorded(directory: Path, works: tuple[Callable[[Path, Mark], None], ...], kill: int, plain: bool, pipe: int) -> None:
    warnings.simplefilter("ignore")
    if plain:
        local._exchange = lambda *_: False
    write = os.write

    def told(operation: Operation) -> None:
        write(pipe, repr(operation).encode() + b"\n")

    recorder = Recorder(directory, told)
    for number, work in enumerate(works, 1):
        if number == len(works):
            recorder.made, recorder.kill = 0, kill
        work(directory, lambda value: told(("mark", value)))
        told(("mark", "end"))
