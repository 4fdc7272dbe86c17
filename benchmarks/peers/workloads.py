"""What is measured side by side: each workload is a generator, whose values live only as long as it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed

import polyckpt
from benchmarks.peers import contenders, libraries
from benchmarks.peers.libraries import Library
from benchmarks.peers.measuring import MB, Work, clear, extra_memory, not_durable, seconds, written
from benchmarks.peers.values import Adapted, JaxRun, KerasRun, TorchRun, many_arrays, small_arrays

PARAMETERS = 100_000_000
TENSORS = 100_000
CHECKPOINTS = 1_000


def large(scale: float, directory: Path) -> Iterator[Work]:
    """(a) weights and Adam moments, on the host, and on a GPU where there is one."""
    parameters = int(PARAMETERS * scale)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield from _large_on_host(parameters, directory)
        if torch.cuda.is_available():
            yield from _large_on_gpu(parameters, directory)
    finally:
        torch.distributed.destroy_process_group()


def _large_on_host(parameters: int, directory: Path) -> Iterator[Work]:
    run = TorchRun(parameters)
    arrays = JaxRun({name: tensor.numpy() for name, tensor in run.tensors().items() if tensor.ndim})
    of_torch = libraries.torch_libraries(run)
    peers = [*of_torch, *libraries.jax_libraries(arrays), *libraries.keras_libraries(KerasRun(parameters))]
    title = f"(a) {parameters / 1e6:,.1f} M parameters + Adam, {run.size_bytes / MB:,.0f} MB"
    yield _saves("a", title, peers, directory, run.size_bytes, durably=True)
    yield from _saves_and_loads("a", title, peers, directory, run.size_bytes)
    with contextlib.ExitStack() as stack:
        blocking = contenders.blocking_torch(run, directory, stack) + contenders.blocking_jax(arrays, directory, stack)
        yield Work(key="a/blocked", title=f"{title}: training blocked by an async save", contenders=blocking, meter=seconds)
    run.reset()
    yield _extra_memory(title, {library.name: library for library in of_torch}, directory)


def _large_on_gpu(parameters: int, directory: Path) -> Iterator[Work]:
    run = TorchRun(parameters, device="cuda")
    peers = libraries.torch_libraries(run)
    title = f"(a) on {torch.cuda.get_device_name()}"
    yield _saves("gpu", title, peers, directory, run.size_bytes, durably=True)
    yield from _saves_and_loads("gpu", title, peers, directory, run.size_bytes)
    with contextlib.ExitStack() as stack:
        blocking = contenders.blocking_torch(run, directory, stack)
        yield Work(key="gpu/blocked", title=f"{title}: training blocked by an async save", contenders=blocking, meter=seconds)


def small(_: float, directory: Path) -> Iterator[Work]:
    """(b) 40 arrays, on tmpfs: what counts is all but the bytes."""
    arrays = small_arrays()
    safetensors = [each for each in libraries.numpy_libraries(arrays) if each.name == "safetensors"]
    peers = [*libraries.jax_libraries(JaxRun(arrays)), *safetensors, libraries.torch_save(arrays), libraries.raw_host(arrays)]
    yield from _saves_and_loads("b", "(b) 40 arrays, 84 KB, on tmpfs", peers, directory, None)


def many(scale: float, directory: Path) -> Iterator[Work]:
    """(c) very many small tensors."""
    arrays = many_arrays(int(TENSORS * scale))
    title = f"(c) {len(arrays):,} tensors of 4 KB"
    peers = libraries.numpy_libraries(arrays)
    everybody = [*peers, libraries.raw_host(arrays)]
    yield from _saves_and_loads("c", title, everybody, directory, sum(array.nbytes for array in arrays.values()))
    for library in peers:
        library.save(library.path(directory))
    shapes = {name: array.shape for name, array in arrays.items()}
    inspecting = [contenders.inspecting(library, shapes, directory) for library in peers]
    yield Work(key="c/inspect", title=f"{title}: list names and shapes", contenders=inspecting, meter=seconds)


def adapted(scale: float, directory: Path) -> Iterator[Work]:
    """(d) a frozen model with small trained adapters."""
    run = TorchRun(int(PARAMETERS * scale), Adapted)
    title = f"(d) {run.size_bytes / MB:,.0f} MB, of which {run.frozen_bytes / run.size_bytes:.0%} never change"
    with contextlib.ExitStack() as stack:
        saves = contenders.linking(run, directory, stack)
        yield Work(key="d/time", title=f"{title}: durable save", contenders=saves, meter=seconds)
        yield Work(key="d/bytes", title=f"{title}: bytes written", contenders=saves, meter=written, unit="MB")


def startup(scale: float, directory: Path) -> Iterator[Work]:
    """What a command takes until it is done."""
    count, run = max(10, int(CHECKPOINTS * scale)), directory / "run"
    with not_durable(), polyckpt.CheckpointManager(run, keep_last=None) as manager:
        for step in range(1, count + 1):
            manager.save({"w": np.full((3, 2), step, np.float32)}, step=step, metrics={"loss": 1 / step})
    ours, python = str(Path(sys.executable).parent / "polyckpt"), sys.executable
    processes = [
        contenders.process("import polyckpt", [python, "-c", "import polyckpt"], directory),
        contenders.process("polyckpt.save, not called", [python, "-c", "import polyckpt; polyckpt.save"], directory),
        contenders.process("polyckpt ls", [ours, "ls", str(run)], directory, shown=f"step-{count:08d}"),
        contenders.process("python, nothing imported", [python, "-c", ""], directory),
        contenders.process("import numpy", [python, "-c", "import numpy"], directory),
        contenders.process("import typer, rich", [python, "-c", "import typer, rich"], directory),
    ]
    title = f"New processes, start to end; ls of {count:,} checkpoints"
    yield Work(key="startup", title=title, contenders=processes, meter=seconds, more_rounds=2)


WORKLOADS: dict[str, Callable[[float, Path], Iterator[Work]]] = {
    "a": large,
    "b": small,
    "c": many,
    "d": adapted,
    "startup": startup,
}


def _saves(key: str, title: str, peers: list[Library], directory: Path, size_bytes: int | None, *, durably: bool) -> Work:
    return Work(
        key=f"{key}/{'durable' if durably else 'save'}",
        title=f"{title}: {'durable save' if durably else 'save, not durable'}",
        contenders=[contenders.saving(library, directory, durably=durably) for library in peers],
        meter=seconds,
        size_bytes=size_bytes,
        setting=contextlib.nullcontext if durably else not_durable,
        more_rounds=4 if durably else 0,  # disks vary most
    )


def _saves_and_loads(key: str, title: str, peers: list[Library], directory: Path, size_bytes: int | None) -> Iterator[Work]:
    """Saves that sync nothing, and loads from the page cache."""
    yield _saves(key, title, peers, directory, size_bytes, durably=False)
    loads = [contenders.loading(library, load, directory) for library in peers for load in library.loads]
    yield Work(key=f"{key}/load", title=f"{title}: load", contenders=loads, meter=seconds, size_bytes=size_bytes)
    for library in peers:
        clear(library.path(directory))


def _extra_memory(title: str, peers: dict[str, Library], directory: Path) -> Work:
    saves = [contenders.saving(peers[name], directory, durably=False) for name in ("polyckpt", "torch.save")]
    loads = [contenders.loading(peers[name], peers[name].loads[0], directory) for name in ("polyckpt", "torch.save")]
    names = ("polyckpt.save", "torch.save", "polyckpt.load", "torch.load + load_state_dict")
    renamed = [
        dataclasses.replace(contender, name=name, notes={}) for contender, name in zip([*saves, *loads], names, strict=True)
    ]
    return Work(
        key="a/memory",
        title=f"{title}: extra memory",
        contenders=renamed,
        meter=extra_memory,
        unit="MB",
        setting=not_durable,
    )
