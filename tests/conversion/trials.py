"""Loading a checkpoint into mutants of its model, counted by what came of it."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from pathlib import Path

import torch

import polyckpt
from polyckpt import parity
from tests.conversion import mutants, torch_models

torch.set_num_threads(1)  # the models are tiny, and tests run beside each other


def outcomes(name: str, kind: str, seeds: range, directory: Path, *, probe: bool) -> Counter[str]:
    """How many mutants of one kind got the right weights, were refused, or got wrong ones."""
    torch.manual_seed(0)
    model, batch = torch_models.MODELS[name]()
    mutants.randomize(model, torch.Generator().manual_seed(1))
    model.eval()
    path = polyckpt.save(directory / "checkpoint", model, probe=batch if probe else None, overwrite=True)
    counts: Counter[str] = Counter()
    for seed in seeds:
        mutant = mutants.mutant(model, kind, random.Random(zlib.crc32(f"{name} {kind} {seed}".encode()))).eval()
        before = {key: value.clone() for key, value in mutant.state_dict().items()}
        try:
            polyckpt.load(path, mutant)
        except polyckpt.MismatchError:
            # What is refused has changed nothing, to the last bit.
            assert all(torch.equal(before[key], value) for key, value in mutant.state_dict().items())
            counts["refused"] += 1
        else:
            counts["right" if parity.compare(model, mutant, batch).agrees else "wrong"] += 1
    return counts
