"""A training that is killed: ``python -m tests.training_child DIRECTORY STEPS``.

It reads lines from stdin; each forks a process that trains in DIRECTORY from where the last one was, so that torch is imported
once. A trainer writes what it knows to be committed to DIRECTORY/../committed, and its final weights to DIRECTORY/../final.npy.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

import polyckpt

torch.set_num_threads(1)


def tell(word: str) -> None:
    os.write(1, f"{word}\n".encode())


def train(directory: Path, steps: int) -> None:
    warnings.simplefilter("error")  # nothing may be damaged
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    options = {"monitor": "loss", "keep_best": 2, "keep_last": 2, "async_save": True}
    committed = directory.parent / "committed"
    with polyckpt.CheckpointManager(directory, every=polyckpt.Every(steps=2), **options) as ckpts:
        start = ckpts.restore(model, optimizer, scheduler=scheduler)
        tell("training")
        known = int(committed.read_text() or 0) if committed.exists() else 0
        assert start.step is not None and start.step >= known, f"resumed from {start.step}, but {known} was committed"
        for step in range(start.step, steps):
            optimizer.zero_grad()
            loss = (model(torch.ones(4, 64)) - torch.arange(8.0)).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            ckpts.save(model, optimizer, scheduler=scheduler, step=step + 1, metrics={"loss": loss})
            if there := ckpts.checkpoints:
                temporary = committed.with_suffix(".new")
                temporary.write_text(str(there[-1].step))
                os.replace(temporary, committed)
        ckpts.wait()
        np.save(directory.parent / "final.npy", torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy())


def main(directory: Path, steps: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        train(Path(scratch, "run"), 3)  # everything is imported by then
    tell("ready")
    for _ in sys.stdin:
        told, tells = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(told, 1)  # not before its parent told of it
            try:
                train(directory, steps)
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        tell(f"pid {child}")
        os.write(tells, b"g")
        _, status = os.waitpid(child, 0)
        os.close(told)
        os.close(tells)
        tell(f"exit {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
