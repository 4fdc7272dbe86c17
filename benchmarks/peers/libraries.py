"""How each library saves and loads, with the defaults that its users get."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import polyckpt
from benchmarks.peers.measuring import nothing
from benchmarks.peers.values import JaxRun, KerasRun, TorchRun, require_equal


@dataclass(frozen=True, kw_only=True)
class Load:
    """A way to load. verified: whether bytes are compared with checksums. check: given what `run` returned."""

    name: str
    run: Callable[[Path], Any]
    check: Callable[[Any], None]
    verified: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library over live values.

    checksums: whether a save stores any that a load compares. durable: whether a save is on disk when it returns. suffix:
    what a path must end with. spoil, reset: make the live values zero, and what they were in the beginning.
    """

    name: str
    save: Callable[[Path], object]
    loads: Sequence[Load]
    checksums: bool = False
    durable: bool = False
    note: str = ""
    suffix: str = ""
    spoil: Callable[[], None] = nothing
    reset: Callable[[], None] = nothing

    def path(self, directory: Path) -> Path:
        """Where it saves to, in `directory`."""
        return directory / (self.name.replace(" ", "-") + self.suffix)


_OURS = functools.partial(Library, checksums=True, durable=True)


def torch_libraries(run: TorchRun) -> list[Library]:
    """All that save torch tensors; each loads into the live model and optimizer."""
    library = functools.partial(Library, spoil=run.spoil, reset=run.reset)

    def load(name: str, into: Callable[[Path], object], **more: Any) -> Load:
        return Load(name=name, run=into, check=lambda _: run.check(name), **more)

    def copied(path: Path) -> None:
        state = torch.load(path, mmap=True)
        run.model.load_state_dict(state["model"])
        for live, stored in zip(
            run.optimizer.state_dict()["state"].values(), state["optimizer"]["state"].values(), strict=True
        ):
            for slot, tensor in stored.items():
                live[slot].copy_(tensor)

    def safetensors_load(path: Path) -> None:
        live = run.tensors()
        for name, tensor in safetensors.torch.load_file(path, device=run.device).items():
            live[name].copy_(tensor)

    return [
        _OURS(
            name="polyckpt",
            save=lambda path: polyckpt.save(path, run.model, run.optimizer),
            loads=[
                load("polyckpt", lambda path: polyckpt.load(path, run.model, run.optimizer), verified=True),
                load("polyckpt, verify=False", lambda path: polyckpt.load(path, run.model, run.optimizer, verify=False)),
            ],
            spoil=run.spoil,
            reset=run.reset,
        ),
        _raw(run.tensors, run.spoil, run.reset, run.check),
        library(
            name="torch.save",
            save=lambda path: torch.save(run.state(), path),
            loads=[
                load("torch.load + load_state_dict", lambda path: run.set_state(torch.load(path))),
                load(
                    "torch.load(mmap=True) + load_state_dict",
                    lambda path: run.set_state(torch.load(path, mmap=True)),
                    note="leaves the moments in the file, unread",
                ),
                load("torch.load(mmap=True) + copy_", copied, note="all of it is read"),
            ],
        ),
        library(
            name="safetensors",
            save=lambda path: safetensors.torch.save_file(run.tensors(), path),
            loads=[load("safetensors load_file + copy_", safetensors_load)],
        ),
        library(
            name="DCP",
            save=lambda path: dcp.save(run.state(), checkpoint_id=path),
            loads=[load("DCP load in place", lambda path: dcp.load(run.state(), checkpoint_id=path))],
        ),
    ]


def _raw(
    tensors: Callable[[], Mapping[str, torch.Tensor]],
    spoil: Callable[[], None],
    reset: Callable[[], None],
    check: Callable[[str], None],
) -> Library:
    """The same bytes one after another in a file, and back into the live tensors, by way of the host."""

    def save(path: Path) -> None:
        with open(path, "xb", buffering=0) as file:
            for tensor in tensors().values():
                _write_all(file, tensor.cpu().numpy())

    def load(path: Path) -> None:
        with open(path, "rb", buffering=0) as file:
            for tensor in tensors().values():
                host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
                _read_all(file, host.numpy())
                if host is not tensor:
                    tensor.copy_(host)

    loads = [Load(name="raw read", run=load, check=lambda _: check("raw read"), note="into warm memory")]
    return Library(name="raw write", save=save, loads=loads, spoil=spoil, reset=reset)


def jax_libraries(run: JaxRun) -> list[Library]:
    """All that save JAX arrays; each returns new ones in the structure of the tree."""
    orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def orbax_load(path: Path) -> Any:
        return jax.block_until_ready(orbax.restore(path, args=ocp.args.StandardRestore(run.tree)))

    return [
        _OURS(
            name="polyckpt (JAX)",
            save=lambda path: polyckpt.save(path, run.tree),
            loads=[
                Load(
                    name="polyckpt (JAX)",
                    run=lambda path: jax.block_until_ready(polyckpt.load(path, run.tree).model),
                    check=lambda tree: run.check(tree, "polyckpt (JAX)"),
                    verified=True,
                    note="new arrays",
                )
            ],
        ),
        Library(
            name="Orbax",
            save=lambda path: orbax.save(path, args=ocp.args.StandardSave(run.tree)),
            loads=[
                Load(name="Orbax", run=orbax_load, check=lambda tree: run.check(tree, "Orbax"), note="new arrays"),
            ],
            note="TensorStore syncs the data files",
        ),
    ]


def keras_libraries(run: KerasRun) -> list[Library]:
    """All that save a Keras model with its optimizer."""

    def load(name: str, into: Callable[[Path], object], **more: Any) -> Load:
        def ready(path: Path) -> None:
            into(path)
            run.ready()

        return Load(name=name, run=ready, check=lambda _: run.check(name), **more)

    return [
        _OURS(
            name="polyckpt (Keras)",
            save=lambda path: polyckpt.save(path, run.model),
            loads=[load("polyckpt (Keras)", lambda path: polyckpt.load(path, run.model), verified=True)],
            spoil=run.spoil,
        ),
        Library(
            name="Keras",
            save=lambda path: run.model.save_weights(path),
            loads=[load("Keras load_weights", lambda path: run.model.load_weights(path))],
            suffix=".weights.h5",
            spoil=run.spoil,
        ),
    ]


def numpy_libraries(arrays: Mapping[str, np.ndarray]) -> list[Library]:
    """All that save NumPy arrays; each returns new ones."""

    def load(name: str, values: Callable[[Path], Mapping[str, np.ndarray]], **more: Any) -> Load:
        return Load(name=name, run=values, check=lambda found: require_equal(found, arrays, name), **more)

    return [
        _OURS(
            name="polyckpt",
            save=lambda path: polyckpt.save(path, arrays),
            loads=[load("polyckpt", lambda path: polyckpt.load(path, arrays).model, verified=True)],
        ),
        Library(
            name="safetensors",
            save=lambda path: safetensors.numpy.save_file(arrays, path),
            loads=[load("safetensors", safetensors.numpy.load_file)],
        ),
    ]


def torch_save(arrays: Mapping[str, np.ndarray]) -> Library:
    """A dict of tensors by torch.save."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Library(
        name="torch.save",
        save=lambda path: torch.save(tensors, path),
        loads=[Load(name="torch.load", run=torch.load, check=lambda found: require_equal(found, arrays, "torch.load"))],
    )


def raw_host(arrays: Mapping[str, np.ndarray]) -> Library:
    """The raw library over arrays on the host, which it loads into memory of its own."""
    memory = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def spoil() -> None:
        for tensor in memory.values():
            tensor.zero_()

    def reset() -> None:
        for name, tensor in memory.items():
            tensor.copy_(torch.from_numpy(arrays[name]))

    return _raw(lambda: memory, spoil, reset, lambda who: require_equal(memory, arrays, who))


def _write_all(file: Any, array: np.ndarray) -> None:
    """All bytes of `array`; the system may take less than it is given."""
    data = array.reshape(-1).view(np.uint8).data
    while data:
        data = data[file.write(data) :]


def _read_all(file: Any, array: np.ndarray) -> None:
    """All bytes of `array` from `file`."""
    data = array.reshape(-1).view(np.uint8).data
    while data:
        count = file.readinto(data)
        if not count:
            raise EOFError(os.fspath(file.name))
        data = data[count:]
