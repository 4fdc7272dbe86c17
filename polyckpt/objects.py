"""Stateful objects beside the model: whatever has `state_dict()` and `load_state_dict()`, and what adapters know better."""

from __future__ import annotations

import copy
from typing import Any

from polyckpt import registry, residue
from polyckpt.adapter import Restore
from polyckpt.errors import MismatchError, Problem, UnsupportedError
from polyckpt.names import type_name

VALUE = "value"
"""The kind of what has no state of its own: it comes back as a new value."""
STATE_DICT = "state_dict"


def capture(value: Any, path: str) -> dict[str, Any]:
    """A tree entry {adapter, kind, type, state} of any object or value. Raises UnsupportedError for a function or a class."""
    adapter = registry.find(value)
    if callable(value) and (isinstance(value, type) or not hasattr(value, "state_dict")) and adapter is None:
        raise UnsupportedError(f"{path}: {value!r} holds no state that could be saved; rebuild it in code and leave it out")
    if adapter and (captured := adapter.capture_object(value)):
        kind, state = captured
        return {"adapter": adapter.name, "kind": kind, "type": type_name(value), "state": state}
    if _has_state_dict(value):
        return {"adapter": None, "kind": STATE_DICT, "type": type_name(value), "state": value.state_dict()}
    return {"adapter": None, "kind": VALUE, "type": type_name(value), "state": value}


def prepare(live: Any, entry: dict[str, Any], path: str) -> Restore:
    """Prepare the restore of the stored `entry` into `live`, or, for a value, its return as a new one."""
    kind, state, owner = entry["kind"], entry["state"], entry["adapter"]
    tensors = residue.tensors(state)
    if kind == VALUE:
        return Restore(apply=lambda: residue.live(state), tensors=tensors)
    if kind == STATE_DICT:
        if not _has_state_dict(live):
            return _refused(live, path, f"the state of a {entry['type'] or 'scheduler'}")
        if not entry["type"]:
            # A file of others does not say of which class it is; what it consists of does.
            there = live.state_dict().keys()
            if there == state.keys():
                return _prepare_state_dict(live, state, path)
            return _refused(live, path, f"the state of one with {', '.join(map(str, sorted(state.keys() ^ there)))} or without")
        # Many load_state_dict() take anything; a module moved to another file is still the same class.
        if entry["type"].rpartition(".")[2] != type(live).__name__:
            return _refused(live, path, f"the state of a {entry['type']}")
        return _prepare_state_dict(live, state, path)
    adapter = registry.find(live)
    if adapter is None or adapter.name != owner:
        return _refused(live, path, f"a {kind} of {owner}")
    return adapter.prepare_object(live, kind, state, path=path)


def _prepare_state_dict(live: Any, state: Any, path: str) -> Restore:
    before: list[Any] = []

    def apply() -> Any:
        before.append(copy.deepcopy(live.state_dict()))
        try:
            live.load_state_dict(residue.live(state))
        except Exception as error:
            raise MismatchError(f"{path}: {type(live).__name__}.load_state_dict() refused what was stored: {error}") from error
        return live

    def undo() -> None:
        if before:
            live.load_state_dict(before[0])

    return Restore(apply=apply, tensors=residue.tensors(state), undo=undo)


def _refused(live: Any, path: str, stored: str) -> Restore:
    section, _, name = path.partition(" ")
    problem = Problem("value", section, name or section, stored=stored, live=f"a {type(live).__name__}")
    return Restore(apply=lambda: live, problems=[problem])


def _has_state_dict(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
