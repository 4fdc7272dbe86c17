"""Wants the victim's time and memory: the header of a tensor file nests as deep and lists as much as some megabytes hold."""

from __future__ import annotations

import struct
from pathlib import Path

import polyckpt
from tests.sealing import restate, save_small

REFUSED = r"weights\.safetensors: its header is not that of a tensor file"


def attack(directory: Path) -> None:
    path = save_small(directory / "c")
    for header in (b'{"a":' + b"[" * 8_000_000, b"[" + b"{}," * 2_000_000 + b"{}]", b'{"a":[' + b"0," * 4_000_000 + b"0]}"):
        (path / "weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        restate(path, "weights.safetensors")
        try:
            polyckpt.inspect(path)
        except polyckpt.CorruptError as error:
            refused = error
        else:
            return
    raise refused
