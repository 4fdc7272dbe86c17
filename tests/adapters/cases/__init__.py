"""Training runs to save and resume, one module per framework.

Each module has `CASES`: name -> function of a seed that builds a `Run` with random parameters. Frameworks are imported inside
these functions alone, so that the names can be listed without any of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Run(Protocol):
    """A training run under way. Data and dropout must draw from the random states that a checkpoint restores."""

    def step(self) -> float:
        """One training step; returns its loss."""
        ...

    def save(self, path: Path) -> None:
        """Save all of it."""
        ...

    def load(self, path: Path) -> None:
        """Resume from `path`."""
        ...

    def state(self) -> dict[str, Any]:
        """Every array of the run by name, as NumPy arrays: parameters, slots, counters, random states.
        Reading it must draw nothing."""
        ...
