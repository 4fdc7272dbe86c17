"""Who takes part: libraries put to one kind of work each."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager

import polyckpt
from benchmarks.peers.libraries import Library, Load
from benchmarks.peers.measuring import Contender, clear, require, sync_tree
from benchmarks.peers.values import JaxRun, TorchRun


def saving(library: Library, directory: Path, *, durably: bool) -> Contender:
    """One that saves; where that is to be durable, what does not sync its files by itself is followed by a sync of them."""
    path = library.path(directory)

    def save_and_sync() -> None:
        library.save(path)
        sync_tree(path)

    if durably:
        durable = "by itself" if library.durable else "synced here"
    else:
        durable = library.note or "no"
    return Contender(
        name=library.name,
        prepare=lambda: clear(path),
        run=save_and_sync if durably and not library.durable else lambda: library.save(path),
        check=lambda _: require(path.exists(), f"{library.name} saved nothing"),
        notes={"checksums": "yes" if library.checksums else "no", "durable": durable},
    )


def loading(library: Library, load: Load, directory: Path) -> Contender:
    """One that loads what the library saved there."""
    path = library.path(directory)
    return Contender(
        name=load.name,
        run=lambda: load.run(path),
        settle=lambda _: library.reset(),
        spoil=library.spoil,
        check=load.check,
        notes={"verified": "yes" if load.verified else "no", "remark": load.note},
    )


def blocking_torch(run: TorchRun, directory: Path, stack: contextlib.ExitStack) -> list[Contender]:
    """Those that save a torch model in the background, after a training step each; the stack closes them."""
    found = [
        _managed("polyckpt", run.train, lambda: (run.model, run.optimizer), directory, stack),
        Contender(name="one copy", prepare=run.train, run=_copy(run), notes={"how": "into mapped memory, nothing saved"}),
        _dcp("DCP async_save", run, directory, None, "as it comes"),
    ]
    if run.device != "cpu":  # it pins its memory, which takes a GPU
        stager = BlockingAsyncStager(cache_staged_state_dict=True)
        found.append(_dcp("DCP async_save, memory reused", run, directory, stager, "BlockingAsyncStager, cached"))
    return found


def blocking_jax(run: JaxRun, directory: Path, stack: contextlib.ExitStack) -> list[Contender]:
    """Those that save JAX arrays in the background, new ones each time."""
    orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    stack.callback(orbax.close)
    path = directory / "orbax"

    def prepare() -> None:
        clear(path)
        run.train()

    def settle(_: Any) -> None:
        orbax.wait_until_finished()
        require(path.exists(), "Orbax saved nothing")

    return [
        _managed("polyckpt (JAX)", run.train, lambda: (run.tree,), directory, stack),
        Contender(
            name="Orbax AsyncCheckpointer",
            prepare=prepare,
            run=lambda: orbax.save(path, args=ocp.args.StandardSave(run.tree)),
            settle=settle,
            notes={"how": "as it comes"},
        ),
    ]


def linking(run: TorchRun, directory: Path, stack: contextlib.ExitStack) -> list[Contender]:
    """Saves of a run, most of which does not change: all of it written, and the second and third that link the rest."""
    step = itertools.count(1)
    managers: dict[bool, polyckpt.CheckpointManager] = {}

    def begin(link_unchanged: bool) -> None:
        if link_unchanged in managers:
            managers.pop(link_unchanged).close()
        where = directory / ("linking" if link_unchanged else "full")
        clear(where)
        managers[link_unchanged] = polyckpt.CheckpointManager(where, link_unchanged=link_unchanged)
        save(link_unchanged)
        train()

    def train() -> None:
        run.train()
        os.sync()

    def save(link_unchanged: bool) -> Path:
        path = managers[link_unchanged].save(run.model, run.optimizer, step=next(step))
        assert path is not None
        return path

    def close() -> None:
        for manager in managers.values():
            manager.close()

    def verify(path: Path) -> None:
        polyckpt.inspect(path).verify()

    stack.callback(close)
    return [
        Contender(name="polyckpt, full save", prepare=lambda: begin(False), run=lambda: save(False), check=verify),
        Contender(name="polyckpt, 2nd save of a run", prepare=lambda: begin(True), run=lambda: save(True), check=verify),
        Contender(name="polyckpt, 3rd save of a run", prepare=train, run=lambda: save(True), check=verify),
    ]


def inspecting(library: Library, shapes: dict[str, tuple[int, ...]], directory: Path) -> Contender:
    """One that lists names and shapes, and reads no value."""
    path, inspect = library.path(directory), {"polyckpt": _polyckpt_shapes, "safetensors": _safetensors_shapes}[library.name]
    return Contender(
        name=library.name,
        run=lambda: inspect(path),
        check=lambda found: require(found == shapes, f"{library.name}: other shapes than were saved"),
    )


def process(name: str, command: Sequence[str], directory: Path, shown: str = "") -> Contender:
    """A new process, whose output must hold `shown`. Its byte code is compiled once, as where a package was installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")

    def run() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=directory, env=environment).stdout

    return Contender(
        name=name,
        run=run,
        check=lambda output: require(shown in output, f"{name} does not show {shown}: {output}"),
    )


def _managed(
    name: str, train: Callable[[], None], values: Callable[[], tuple[Any, ...]], directory: Path, stack: contextlib.ExitStack
) -> Contender:
    manager = stack.enter_context(polyckpt.CheckpointManager(directory / "runs" / name, keep_last=1, async_save=True))
    step = itertools.count(1)

    def settle(path: Path) -> None:
        manager.wait()
        require((path / "manifest.json").exists(), f"{name} saved nothing")

    return Contender(
        name=name,
        prepare=train,
        run=lambda: manager.save(*values(), step=next(step)),
        settle=settle,
        notes={"how": "CheckpointManager(async_save=True)"},
    )


def _dcp(name: str, run: TorchRun, directory: Path, stager: BlockingAsyncStager | None, how: str) -> Contender:
    path = directory / "dcp"

    def prepare() -> None:
        clear(path)
        run.train()

    def settle(future: Any) -> None:
        future.result()
        require((path / ".metadata").exists(), f"{name} saved nothing")

    return Contender(
        name=name,
        prepare=prepare,
        run=lambda: dcp.async_save(run.state(), checkpoint_id=path, async_stager=stager),
        settle=settle,
        notes={"how": how},
    )


def _copy(run: TorchRun) -> Callable[[], None]:
    """One copy of all tensors to memory on the host that was written to before."""
    on_gpu = run.device != "cpu"
    memory = {name: torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu) for name, tensor in run.tensors().items()}

    def copy() -> None:
        for name, tensor in run.tensors().items():
            if on_gpu:
                memory[name].copy_(tensor)
            else:
                np.copyto(memory[name].numpy(), tensor.numpy())

    copy()
    return copy


def _polyckpt_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in polyckpt.inspect(path).weights.stored.items()}


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
