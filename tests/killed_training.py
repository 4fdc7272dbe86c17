"""Trainings that are killed at their n-th call on the file system: ``python -m tests.killed_training KIND DIRECTORY``.

KIND is numpy or torch. Each line of stdin is a number: a process is forked that trains in DIRECTORY/run from where the last
one was, and is killed (SIGKILL) at that call, which a write has then done by half; 0 stands for never. Frameworks are imported
once. A trainer notes in DIRECTORY/committed the step that it knows to be committed, and in DIRECTORY/final.npy its final
weights. The answer is a line with its exit code and the step that it was resumed from.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt
from tests.interrupted import STEPS as CALLS
from tests.interrupted import File, Steps

STEPS = {"numpy": 3000, "torch": 600}
OPTIONS: dict[str, dict[str, Any]] = {
    "numpy": {
        "keep_best": 2,
        "keep_last": 2,
        "keep": [polyckpt.KeepEvery(steps=1000), polyckpt.BestBy("acc")],
        "every": polyckpt.Every(steps=5, epochs=1) | polyckpt.OnImprovement(0.5),
        "patience": 600,
        "min_delta": 2e-3,
    },
    "torch": {"keep_best": 1, "keep_last": 1, "every": polyckpt.Every(steps=4)},
}
PER_EPOCH = 40
really_write = os.write


def strike(at: int) -> None:
    """Let this process be killed at its `at`-th call, in whichever thread that is."""
    steps = Steps(at, "kill")
    for name in (*CALLS, "replace", "symlink", "ftruncate", "truncate", "pwrite"):
        setattr(os, name, steps.before(name, getattr(os, name)))
    really_open = builtins.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if "x" not in mode:
            return really_open(file, mode, *arguments, **keywords)
        steps.step("open")
        return File(really_open(file, mode, *arguments, **keywords), steps)

    def write(descriptor: int, data: bytes) -> int:
        if steps.count + 1 == at:  # by half only then: what another thread appends must not come between two halves
            really_write(descriptor, data[: len(data) // 2])
        steps.step("write")
        return really_write(descriptor, data)

    builtins.open, os.write = opened, write  # type: ignore[assignment]


def numpy_training() -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, float]]]:
    """What is saved, and a step that changes it and measures: noisy descent with momentum and dropout."""
    state = {
        "model": {"w": np.full((16, 16), 2.0), "b": np.zeros(16, np.float32)},
        "optimizer": {"w": np.zeros((16, 16)), "b": np.zeros(16, np.float32)},
        "extra": {"random": np.random.default_rng(0), "rate": 0.01},
    }

    def step(state: dict[str, Any]) -> dict[str, float]:
        random = state["extra"]["random"]
        for name, weight in state["model"].items():
            gradient = (weight - 0.5 + random.normal(size=weight.shape)) * (random.random(weight.shape) > 0.5)
            slot = state["optimizer"][name]
            slot *= 0.9
            slot += gradient
            weight -= (state["extra"]["rate"] * slot).astype(weight.dtype)
        state["extra"]["rate"] = max(0.999 * state["extra"]["rate"], 0.002)
        error = float(np.abs(state["model"]["w"] - 0.5).mean())
        return {"loss": error, "acc": round(1 - error, 3)}

    return state, step


def torch_training() -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, float]]]:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 32))
    model[2].weight = model[0].weight  # tied
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS["torch"])

    def step(state: dict[str, Any]) -> dict[str, float]:
        optimizer.zero_grad()
        loss = (model(torch.randn(4, 32)) - torch.arange(32.0) / 32).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return {"loss": loss}

    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}, step


TRAININGS = {"numpy": numpy_training, "torch": torch_training}


def train(kind: str, directory: Path, steps: int, tell: Callable[[int], None]) -> None:
    run, committed = directory / "run", os.open(directory / "committed", os.O_RDWR | os.O_CREAT)
    state, train_step = TRAININGS[kind]()
    with polyckpt.CheckpointManager(run, monitor="loss", async_save=True, **OPTIONS[kind]) as ckpts:
        start = ckpts.restore(**state)
        for name in ("model", "optimizer"):
            state[name] = getattr(start, name)
        state.get("extra", {}).update(start.extra)
        known = int(os.pread(committed, 20, 0) or b"0")
        assert start.step >= known, f"resumed from {start.step}, but {known} was committed"
        assert start.epoch == start.step // PER_EPOCH and (start.batch or 0) == start.step % PER_EPOCH
        if start.checkpoint is not None:
            start.checkpoint.verify()
        assert not list(run.glob(".polyckpt-tmp-*")), "leftovers of the killed"
        tell(start.step)
        for step in range(start.step + 1, steps + 1):
            if ckpts.should_stop:
                break
            metrics = train_step(state)
            epoch, batch = divmod(step, PER_EPOCH)
            ckpts.save(**state, step=step, epoch=epoch, batch=batch or None, metrics=metrics)
            if there := ckpts.checkpoints:
                os.lseek(committed, 0, os.SEEK_SET)
                really_write(committed, b"%020d" % (there[-1].step or 0))
    model = state["model"]
    arrays = [array.detach().numpy() for array in model.parameters()] if kind == "torch" else list(model.values())
    np.save(directory / "final.npy", np.concatenate([array.reshape(-1).astype(np.float64) for array in arrays]))


def forked(kind: str, directory: Path, steps: int, at: int) -> None:
    """One process; writes a line: its exit code and where it was resumed."""
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if at:
                strike(at)
            train(kind, directory, steps, lambda step: really_write(tells, b"%d" % step) and None)
            code = 0
        except BaseException as error:
            really_write(2, f"{error!r}\n".encode())
        os._exit(code)
    os.close(tells)
    _, status = os.waitpid(child, 0)
    resumed = os.read(told, 20)
    os.close(told)
    sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), int(resumed) if resumed else None]) + "\n")
    sys.stdout.flush()


def main(kind: str, directory: Path) -> None:
    warnings.simplefilter("error")  # nothing may be damaged
    signal.alarm(600)
    with tempfile.TemporaryDirectory() as scratch:
        train(kind, Path(scratch), 2, lambda step: None)  # everything is imported by then
    for line in sys.stdin:
        forked(kind, directory, STEPS[kind], int(line))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
