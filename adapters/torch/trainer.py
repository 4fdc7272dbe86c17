"""What transformers.Trainer saves beside a model: optimizer, schedule, and how far it came."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from polyckpt import objects, registry
from polyckpt.adapter import Contents, ModelCapture
from polyckpt.adapters.torch import files, pickles, state_dicts
from polyckpt.formats.archives import Records
from polyckpt.formats.described import Like, aligned, fitted
from polyckpt.formats.huggingface import TRAINER, json_of
from polyckpt.leaves import Leaf

_NO_METRICS = re.compile(r"(_runtime|_per_second|_flos|^epoch|^step|^learning_rate|^grad_norm|^total_flos)$")
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names of parameters that the Trainer keeps from weight decay (`Trainer.get_decay_parameter_names`)."""


def contents_of(
    folder: Path, weights: Mapping[str, Leaf], like: Like | None, left_out: list[str], records: Records
) -> Contents:
    """The contents of a checkpoint of a Trainer. left_out: gets what of it is not read; records: the checksums of its files."""
    model = fitted(weights, like) or ModelCapture(type="state_dict", weights=aligned(weights, like), order="definition")
    state = json_of(folder / TRAINER)
    optimizer = None
    if (folder / "optimizer.pt").is_file():
        loaded = pickles.load_file(folder / "optimizer.pt", records)
        orders = [_order(like, model)] if like is not None and isinstance(like.model, nn.Module) else []
        if files.is_optimizer(loaded):
            optimizer = state_dicts.optimizer_capture([loaded], model, like, left_out, orders)
        else:
            left_out.append("optimizer.pt: not the state of an optimizer of torch")
    scheduler = None
    if (folder / "scheduler.pt").is_file() and files.is_scheduler(loaded := pickles.load_file(folder / "scheduler.pt")):
        scheduler = state_dicts.scheduler_entry(loaded)
    rng = _random_states(folder, left_out)
    epoch = state.get("epoch")
    step = state.get("global_step")
    return Contents(
        adapter="torch",
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        epoch=math.floor(epoch) if isinstance(epoch, int | float) and math.isfinite(epoch) and epoch >= 0 else None,
        step=step if isinstance(step, int) and step >= 0 else None,
        metrics=dict(_metrics(state.get("log_history"), step)),
        left_out=left_out,
        # The history of the metrics, the best of them, and the epoch with its fraction.
        extra={"trainer_state": objects.capture(state, "trainer_state")},
        rng=rng,
        check=records.check,
    )


def _random_states(folder: Path, left_out: list[str]) -> dict[str, Any]:
    """The random states that one process saved, as the adapters keep them."""
    path = folder / "rng_state.pth"
    if not path.is_file():
        return {}
    loaded = pickles.load_file(path)
    try:
        version, words, gauss = loaded["python"]
        kind, key, position, has_gauss, cached = loaded["numpy"]
        host = {
            "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
            "numpy": {
                "bit_generator": kind,
                "state": {"key": key, "pos": position},
                "has_gauss": has_gauss,
                "gauss": cached,
            },
        }
        devices = {name: states for name, states in loaded.items() if name not in host}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        left_out.append(f"{path.name}: not the random states that a Trainer of transformers 5 saves")
        return {}
    # One tensor for the CPU; for others one of each device, or that of the only one.
    several = {name: [states] if isinstance(states, torch.Tensor) else states for name, states in devices.items()}
    return {registry.HOST: host, "torch": {**several, **{name: devices[name] for name in devices if name == "cpu"}}}


def _metrics(history: Any, step: Any) -> Iterator[tuple[str, float]]:
    """What was measured at this step."""
    for entry in history if isinstance(history, list) else ():
        if isinstance(entry, dict) and entry.get("step") == step:
            for name, value in entry.items():
                if isinstance(value, int | float) and not _NO_METRICS.search(name):
                    yield name, float(value)


def _order(like: Like, model: ModelCapture) -> Sequence[str]:
    """The parameters in the order of the Trainer's groups: those that decay first."""
    norms = {f"{path}." for path, module in like.model.named_modules() if isinstance(module, nn.LayerNorm)}
    trained = [name for name, parameter in like.captured.parameters if parameter.requires_grad]
    kept = [name for name in trained if _UNDECAYED.search(name.lower()) or any(map(name.startswith, norms))]
    return [*(name for name in trained if name not in kept), *kept]
