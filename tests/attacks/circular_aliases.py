"""Wants the victim's process to run in circles: tied tensors stand for each other, and none of them is stored."""

from __future__ import annotations

from pathlib import Path

import polyckpt
from tests.sealing import edit, save_small

REFUSED = r"aliases: x stands for y, which is not stored(?s:.*)y stands for x, which is not stored"


def attack(directory: Path) -> None:
    path = save_small(directory / "c")
    edit(path, lambda raw: raw["model"]["aliases"].update(x="y", y="x", itself="itself", w="x"))
    polyckpt.inspect(path).verify()
