"""Wants a file of the victim's opened: an array directory whose files lie outside of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import polyckpt
from tests.sealing import edit, save_small

REFUSED = r"'\.\./secret' is not a path inside that directory(?s:.*)'\.\./up' is not a plain name of a directory"


def attack(directory: Path) -> None:
    (directory / "secret").write_text("mine")
    path = save_small(directory / "c")
    file = {"size_bytes": 4, "checksum": "xxh3-128:" + "0" * 32}
    inside = {"kind": "orbax", "files": {"../secret": file, "a/../../secret": file, "/etc/passwd": file, "a//b": file}}
    edit(path, lambda raw: raw["arrays"].update({"arrays": inside, "../up": {**inside, "files": {}}}))
    polyckpt.inspect(path).verify()
