"""Save and load beside the peers, interleaved in one process, as ratios: python benchmarks/save_load.py [MiB] [rounds]

A torch model with AdamW state, and the same arrays as a JAX tree for Orbax. Every writer is followed by the same sync of its
files to disk, since polyckpt always does that and the peers do not. Loading verifies checksums in polyckpt alone.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import polyckpt

MIB = 1 << 20


def build(size_mib: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model whose weights and two slots take `size_mib` together, after one step."""
    layers = max(1, size_mib // 12)
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(layers)])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


def flat(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of the run by name, for peers that know no optimizer."""
    slots = optimizer.state_dict()["state"]
    return {
        **model.state_dict(),
        **{f"{slot}.{index}": tensor for index, state in slots.items() for slot, tensor in state.items()},
    }


def sync(path: Path) -> None:
    """Everything under `path` to disk."""
    for file in [path, *path.rglob("*")]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def main(size_mib: int, rounds: int) -> None:
    model, optimizer = build(size_mib)
    tensors = flat(model, optimizer)
    tree = {name: jax.numpy.asarray(tensor.detach().numpy()) for name, tensor in tensors.items()}
    directory = Path(tempfile.mkdtemp(dir="."))
    paths = {name: directory / name for name in ("polyckpt", "polyckpt (JAX)", "torch.save", "safetensors", "orbax")}
    checkpointer = ocp.StandardCheckpointer()

    def orbax_save() -> None:
        checkpointer.save(paths["orbax"].absolute(), tree)
        checkpointer.wait_until_finished()

    savers: dict[str, Callable[[], object]] = {
        "polyckpt": lambda: polyckpt.save(paths["polyckpt"], model, optimizer),
        "torch.save": lambda: torch.save({"m": model.state_dict(), "o": optimizer.state_dict()}, paths["torch.save"]),
        "safetensors": lambda: save_file(tensors, paths["safetensors"]),
        "polyckpt (JAX)": lambda: polyckpt.save(paths["polyckpt (JAX)"], tree),
        "orbax": orbax_save,
    }

    def torch_load() -> None:
        state = torch.load(paths["torch.save"], weights_only=True, mmap=True)
        model.load_state_dict(state["m"])
        optimizer.load_state_dict(state["o"])

    def safetensors_load() -> None:
        for name, tensor in load_file(paths["safetensors"]).items():
            tensors[name].data.copy_(tensor)

    loaders: dict[str, Callable[[], object]] = {
        "polyckpt": lambda: polyckpt.load(paths["polyckpt"], model, optimizer),
        "torch.save": torch_load,
        "safetensors": safetensors_load,
        "polyckpt (JAX)": lambda: polyckpt.load(paths["polyckpt (JAX)"], tree),
        "orbax": lambda: checkpointer.restore(paths["orbax"].absolute(), tree),
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    try:
        for _ in range(rounds):
            for name, saver in savers.items():
                shutil.rmtree(paths[name], ignore_errors=True)
                paths[name].unlink(missing_ok=True)
                start = time.perf_counter()
                saver()
                sync(paths[name])
                seconds.setdefault(("save", name), []).append(time.perf_counter() - start)
            for name, loader in loaders.items():
                start = time.perf_counter()
                loader()
                seconds.setdefault(("load", name), []).append(time.perf_counter() - start)
    finally:
        shutil.rmtree(directory)
    size = sum(tensor.nbytes for tensor in tensors.values()) / MIB
    table = Table(title=f"{len(tensors)} tensors, {size:.0f} MiB, median of {rounds} interleaved rounds")
    for column in ("", "save s", "of polyckpt", "load s", "of polyckpt"):
        table.add_column(column, justify="right")
    for name in savers:
        base = "polyckpt (JAX)" if name in ("polyckpt (JAX)", "orbax") else "polyckpt"
        cells = []
        for action in ("save", "load"):
            median = statistics.median(seconds[action, name])
            cells += [f"{median:.3f}", f"{median / statistics.median(seconds[action, base]):.2f}x"]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256, int(sys.argv[2]) if len(sys.argv) > 2 else 5)
