"""Many small checks in one process, where importing the framework takes longer than all of them."""

from __future__ import annotations

import ast
import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def names(path: Path) -> list[str]:
    """The checks in a module, which is not imported."""
    return [node.name for node in ast.parse(path.read_text()).body if getattr(node, "name", "").startswith("check_")]


def run_checks(namespace: Mapping[str, Any], path: str) -> None:
    """Run every `check_...` and write a JSON object to `path`: name -> "" or a traceback."""
    found = {}
    for name, check in list(namespace.items()):
        if name.startswith("check_"):
            try:
                check()
            except BaseException:
                found[name] = traceback.format_exc()
            else:
                found[name] = ""
    Path(path).write_text(json.dumps(found))
