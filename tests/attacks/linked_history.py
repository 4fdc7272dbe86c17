"""Wants lines appended to a file of the victim's: the history of a run is a symbolic link to it."""

from __future__ import annotations

from pathlib import Path

import polyckpt
from tests.managed import finished, params, tell

REFUSED = r"history\.jsonl: a symbolic link, behind which nothing is written"
PRECIOUS = "export PATH=/bin\nhalf a line"


def attack(directory: Path) -> None:
    (directory / "precious").write_text(PRECIOUS)
    run = finished(directory / "run", 1)
    (run / "history.jsonl").unlink()
    (run / "history.jsonl").symlink_to(directory / "precious")
    with polyckpt.CheckpointManager(run, monitor="loss") as ckpts:
        assert ckpts.restore(params()).epoch == 1
        tell(ckpts, 0.5, first=2)


def harm(directory: Path) -> str | None:
    return None if (directory / "precious").read_text() == PRECIOUS else "the file was written to"
