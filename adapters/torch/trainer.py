"""What transformers.Trainer saves beside a model: optimizer, schedule, and how far it came."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from polyckpt.adapter import Contents, ModelCapture
from polyckpt.adapters.torch import files, state_dicts
from polyckpt.formats.described import Like, fitted
from polyckpt.formats.huggingface import TRAINER, json_of
from polyckpt.leaves import Leaf

_NO_METRICS = re.compile(r"(_runtime|_per_second|_flos|^epoch|^step|^learning_rate|^grad_norm|^total_flos)$")
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names of parameters that the Trainer keeps from weight decay (`Trainer.get_decay_parameter_names`)."""


def contents_of(folder: Path, weights: Mapping[str, Leaf], like: Like | None, left_out: list[str]) -> Contents:
    """The contents of a checkpoint of a Trainer. left_out: gets what of it is not read."""
    model = fitted(weights, like) or ModelCapture(type="state_dict", weights=weights, order="definition")
    state = json_of(folder / TRAINER)
    optimizer = None
    if (folder / "optimizer.pt").is_file():
        loaded = files.load_file(folder / "optimizer.pt")
        orders = [_order(like, model)] if like is not None and isinstance(like.model, nn.Module) else []
        if files.is_optimizer(loaded):
            optimizer = state_dicts.optimizer_capture([loaded], model, like, left_out, orders)
        else:
            left_out.append("optimizer.pt: not the state of an optimizer of torch")
    scheduler = None
    if (folder / "scheduler.pt").is_file() and files.is_scheduler(loaded := files.load_file(folder / "scheduler.pt")):
        scheduler = state_dicts.scheduler_entry(loaded)
    epoch = state.get("epoch")
    step = state.get("global_step")
    return Contents(
        adapter="torch",
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        epoch=math.floor(epoch) if isinstance(epoch, int | float) and math.isfinite(epoch) else None,
        step=step if isinstance(step, int) else None,
        metrics=dict(_metrics(state.get("log_history"), step)),
        left_out=left_out,
    )


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
