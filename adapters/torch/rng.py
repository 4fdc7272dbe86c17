"""torch's random states: the global one of the CPU and of every accelerator in use, and registered generators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from polyckpt import residue
from polyckpt.adapter import Restore
from polyckpt.errors import Problem


def capture() -> dict[str, Any]:
    """The states of the CPU and of all devices of each accelerator that this process has begun to use."""
    return {"cpu": torch.get_rng_state(), **{name: module.get_rng_state_all() for name, module in _accelerators()}}


def prepare(tree: Mapping[str, Any]) -> Restore:
    """Compare the devices there are with those whose states were saved."""
    problems = []
    live = dict(_accelerators(restoring=True))
    for name, states in tree.items():
        count = live[name].device_count() if name in live else 0
        if name != "cpu" and count != len(states):
            problems.append(
                Problem("value", "rng", name, stored=f"{len(states)} devices", live=f"{count} (rng=False ignores it)")
            )
    unfit = {problem.name for problem in problems}

    def apply() -> None:
        torch.set_rng_state(residue.live(tree["cpu"]))
        for name, states in tree.items():
            if name != "cpu" and name not in unfit:
                live[name].set_rng_state_all(residue.live(states))

    return Restore(apply=apply, problems=problems, tensors=residue.tensors(dict(tree)))


def capture_generator(generator: torch.Generator) -> dict[str, Any]:
    """A generator's state and its device."""
    return {"device": str(generator.device), "state": generator.get_state()}


def prepare_generator(generator: torch.Generator, tree: Mapping[str, Any], path: str) -> Restore:
    """Compare a generator's kind of device with that of a stored one: their states differ in form."""
    stored, live = torch.device(tree["device"]).type, generator.device.type
    problems = (
        [] if stored == live else [Problem("value", "extra", path, stored=f"a generator on {stored}", live=f"one on {live}")]
    )
    before: list[torch.Tensor] = []

    def apply() -> torch.Generator:
        if not problems:
            before.append(generator.get_state())
            generator.set_state(residue.live(tree["state"]))
        return generator

    return Restore(
        apply=apply,
        problems=problems,
        tensors=residue.tensors(dict(tree)),
        undo=lambda: before and generator.set_state(before[0]),
    )


def _accelerators(restoring: bool = False) -> Iterator[tuple[str, Any]]:
    """Accelerator modules with per-device states; while saving only those in use, since asking the others wakes them."""
    for name in ("cuda", "xpu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available() and (restoring or module.is_initialized()):
            yield name, module
