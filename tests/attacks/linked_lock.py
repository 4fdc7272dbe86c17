"""Wants a file of the victim's emptied: the lock of a run is a symbolic link to it, and a manager writes to its lock."""

from __future__ import annotations

from pathlib import Path

import polyckpt
from tests.managed import finished, params, tell

REFUSED = r"\.polyckpt-lock: a symbolic link, behind which nothing is written"
PRECIOUS = "the only copy\n"


def attack(directory: Path) -> None:
    (directory / "precious").write_text(PRECIOUS)
    run = finished(directory / "run", 1)
    (run / ".polyckpt-lock").unlink()
    (run / ".polyckpt-lock").symlink_to(directory / "precious")
    with polyckpt.CheckpointManager(run, monitor="loss") as ckpts:
        assert ckpts.restore(params()).epoch == 1  # reading is free
        tell(ckpts, 0.5, first=2)


def harm(directory: Path) -> str | None:
    return None if (directory / "precious").read_text() == PRECIOUS else "the file was written to"
