"""What Lightning puts into its checkpoints beside the state dicts: where its loops were, and what its callbacks measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_VERSION = "pytorch-lightning_version"


def is_one(others: Mapping[str, Any]) -> bool:
    """Whether a file is Lightning's."""
    return _VERSION in others and "global_step" in others


def progress(others: dict[str, Any], left_out: list[str]) -> dict[str, Any]:
    """How far training was, taken out of what a file holds besides, as members of Contents. left_out: gets what is not read.

    `epoch` in the file is the index of the epoch under way, which at its end may be over: its loops tell how many are done.
    """
    epoch, step, loops = others.pop("epoch", None), others.pop("global_step"), others.pop("loops", None)
    batch = None
    try:
        fit = loops["fit_loop"]
        epochs = fit["epoch_progress"]["current"]
        epoch = epochs["processed"]
        if epochs["started"] > epoch:
            batch = fit["epoch_loop.batch_progress"]["current"]["processed"]
    except (KeyError, TypeError):
        left_out.append("loops: not as Lightning 2 writes them, so the epoch is the one that the file calls its own")
    if loops is not None:
        left_out.append("loops: where Lightning's own loops were, beyond epoch, batch and step")
    for name in (_VERSION, "hparams_name"):
        others.pop(name, None)
    return {"epoch": epoch, "step": step, "batch": batch, "metrics": _metrics(others.get("callbacks"))}


def _metrics(callbacks: Any) -> dict[str, float]:
    """What callbacks saw last of the metrics that they monitor."""
    found = {}
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping) and isinstance(state.get("monitor"), str):
            score = state.get("current_score")
            if isinstance(score, torch.Tensor) and score.numel() == 1:
                found[state["monitor"]] = float(score)
    return found
