"""Pictures of a run: its metrics, with what is best and what was kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from polyckpt.errors import AdapterError
from polyckpt.policy import Record, value_of

_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], width: int = 40) -> str:
    """Values as a line of blocks, of `width` characters at most; what is no number is a blank.

    >>> sparkline([0, 1, None, 7, float("nan")])
    '▁▂ █ '
    """
    if len(values) > width:
        values = [values[index * (len(values) - 1) // (width - 1)] for index in range(width)]
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if not numbers:
        return " " * len(values)
    low, high = min(numbers), max(numbers)
    spread = (high - low) or 1.0

    def level(value: float) -> str:
        return _LEVELS[min(int((value - low) / spread * len(_LEVELS)), len(_LEVELS) - 1)]

    return "".join(level(value) if value is not None and math.isfinite(value) else " " for value in values)


def axis_of(records: Sequence[Record]) -> str:
    """What all records count: steps, else epochs, else their place."""
    return next((name for name in ("step", "epoch") if all(getattr(each, name) is not None for each in records)), "sequence")


def plot(records: Sequence[Record], best: str | None, metrics: Sequence[str], target: Path) -> None:
    """Draw metrics over the steps of a run into `target` (.png, .svg or .pdf), what was kept as dots and the best as a star.

    Raises AdapterError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise AdapterError("plotting needs matplotlib: pip install 'polyckpt[cli]'") from error
    along = axis_of(records)
    figure = Figure(figsize=(8, 2.6 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    for panel, metric in zip(panels, metrics, strict=True):
        measured = [(getattr(each, along), value, each) for each in records if (value := value_of(each, metric)) is not None]
        panel.plot([x for x, _, _ in measured], [y for _, y, _ in measured], linewidth=1.2, label=metric)
        kept = [(x, y) for x, y, each in measured if each.name is not None]
        panel.plot([x for x, _ in kept], [y for _, y in kept], "o", markersize=4, label="on disk")
        stars = [(x, y) for x, y, each in measured if each.name is not None and each.name == best]
        panel.plot([x for x, _ in stars], [y for _, y in stars], "*", markersize=14, label="best")
        panel.set_ylabel(metric)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    panels[-1].set_xlabel(along)
    figure.savefig(target, dpi=150)
