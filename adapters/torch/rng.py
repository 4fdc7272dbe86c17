"""torch's random states: the global one of the CPU and of every accelerator in use, and registered generators."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from polyckpt import residue
from polyckpt.adapter import Restore
from polyckpt.adapters.torch import tensors
from polyckpt.errors import Problem


def capture() -> dict[str, Any]:
    """The states of the CPU and of all devices of each accelerator that this process has begun to use."""
    return {"cpu": torch.get_rng_state(), **{name: module.get_rng_state_all() for name, module in _accelerators()}}


def put_back(states: Mapping[str, Any]) -> None:
    """Set what `capture` gave in this process."""
    torch.set_rng_state(states["cpu"])
    for name, module in _accelerators():
        if name in states:
            module.set_rng_state_all(states[name])


def prepare(tree: Mapping[str, Any]) -> Restore:
    """Compare the devices there are with those whose states were saved."""
    accelerators = dict(_accelerators(restoring=True))
    problems: list[Problem] = []
    for name, states in tree.items():
        stored = [states] if name == "cpu" else list(states)
        live = [torch.get_rng_state()] if name == "cpu" else []
        if name in accelerators:
            live = accelerators[name].get_rng_state_all()
        if len(stored) != len(live):
            counts = {"stored": f"{len(stored)} devices", "live": f"{len(live)} (rng=False ignores it)"}
            problems.append(Problem("value", "rng", name, **counts))
        problems += filter(None, map(functools.partial(_compare_state, "rng", name), stored, live))
    unfit = {problem.name for problem in problems}

    def apply() -> None:
        for name, states in tree.items():
            if name not in unfit:
                setter = torch.set_rng_state if name == "cpu" else accelerators[name].set_rng_state_all
                setter(residue.live(states))

    return Restore(apply=apply, problems=problems, tensors=residue.tensors(dict(tree)))


def capture_generator(generator: torch.Generator) -> dict[str, Any]:
    """A generator's state and its device."""
    return {"device": str(generator.device), "state": generator.get_state()}


def prepare_generator(generator: torch.Generator, tree: Mapping[str, Any], path: str) -> Restore:
    """Compare a generator's kind of device with that of a stored one: their states differ in form."""
    stored, live = torch.device(tree["device"]).type, generator.device.type
    problem = _compare_state("extra", path, tree["state"], generator.get_state())
    if stored != live:
        problem = Problem("value", "extra", path, stored=f"a generator on {stored}", live=f"one on {live}")
    before: list[torch.Tensor] = []

    def apply() -> torch.Generator:
        if problem is None:
            before.append(generator.get_state())
            generator.set_state(residue.live(tree["state"]))
        return generator

    return Restore(
        apply=apply,
        problems=[problem] if problem else [],
        tensors=residue.tensors(dict(tree)),
        undo=lambda: before and generator.set_state(before[0]),
    )


def _compare_state(section: str, name: str, stored: Any, live: torch.Tensor) -> Problem | None:
    """What keeps a stored state from being one: setting a state comes last in a load and must not fail."""
    shown = str(stored.stored) if isinstance(stored, residue.TensorRef) else repr(stored)
    return None if shown == tensors.show(live) else Problem("value", section, name, stored=shown, live=tensors.show(live))


def _accelerators(restoring: bool = False) -> Iterator[tuple[str, Any]]:
    """Accelerator modules with per-device states; while saving only those in use, since asking the others wakes them."""
    for name in ("cuda", "xpu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available() and (restoring or module.is_initialized()):
            yield name, module
