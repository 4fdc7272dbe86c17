"""Native residue of an opened checkpoint: what only the framework that wrote it can use, decoded by its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyckpt import registry, residue
from polyckpt.checkpoint import Checkpoint
from polyckpt.errors import CorruptError


def native_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The native residue of a checkpoint, its tensors not read yet. Raises CorruptError where it is not as `save` writes it."""
    state = checkpoint.state.stored
    made: dict[tuple[str, str], Any] = {}

    def tensor(name: str, kind: str) -> residue.TensorRef:
        registry.check_known(_package(kind))

        # Two references to one stored tensor were one tensor when they were saved.
        def make() -> Any:
            if (name, kind) not in made:
                made[name, kind] = registry.named(_package(kind)).tensor(state[name], kind)
            return made[name, kind]

        return residue.TensorRef(state[name], make)

    def constant(value: Any, kind: str) -> Any:
        return registry.named(_package(kind)).constant(value, kind)

    try:
        native: dict[str, Any] = residue.decode(checkpoint.manifest.native, residue.Decoders(tensor=tensor, constant=constant))
    except RecursionError as error:
        raise CorruptError(f"{checkpoint.path}: native residue is nested too deep") from error
    if problems := list(_native_problems(native)):
        raise CorruptError("\n  ".join([f"{checkpoint.path}: native residue is not of the format:", *problems]))
    return native


def _native_problems(native: Any) -> Iterator[str]:
    """What of native residue is not as `save` writes it, one line each."""
    if not isinstance(native, dict):
        yield "it is no object"
        return
    for member in ("extra", "rng"):
        if not isinstance(native.get(member) or {}, dict):
            yield f"{member} is no object"
            return
    entries = {f"extra {name}": entry for name, entry in (native.get("extra") or {}).items()}
    for name, entry in {**entries, "scheduler": native.get("scheduler")}.items():
        if name == "scheduler" and entry is None:
            continue
        texts = [entry.get(member) for member in ("kind", "type")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or "state" not in entry:
            yield f"{name} lacks adapter, kind, type or state"
        elif not isinstance(entry.get("adapter"), str | None) or "adapter" not in entry:
            yield f"{name} names no adapter"
    optimizer = native.get("optimizer")
    if optimizer is not None and not (
        isinstance(optimizer, dict) and isinstance(optimizer.get("adapter"), str) and "state" in optimizer
    ):
        yield "optimizer lacks adapter or state"
    if not all(isinstance(name, str) for name in native.get("rng") or {}):
        yield "rng: an adapter's name is no string"


def _package(kind: str) -> str:
    """The adapter of a leaf or constant: its kind up to the first dot."""
    if not isinstance(kind, str):
        raise TypeError(f"{kind!r} is no kind of a tensor or constant")
    return kind.partition(".")[0]
