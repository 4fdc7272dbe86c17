"""MessagePack written by Flax itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import serialization

from polyckpt import names
from polyckpt.adapters.jax import trees
from polyckpt.formats.writing import Source


def write_msgpack(source: Source, target: Path) -> None:
    """Write live objects, which `flax.serialization.from_bytes` gives back to ones like them, or weights as a nested dict."""
    if source.model is not None:
        live = source.model if source.optimizer is None else {"model": source.model, "optimizer": source.optimizer}
        target.write_bytes(serialization.to_bytes(_pure(live)))
        return
    tree: dict[str, Any] = {}
    for name, stored in source.checkpoint.weights.stored.items():
        node = tree
        *above, last = names.split(name)
        for segment in above:
            node = node.setdefault(segment, {})
        node[last] = stored.numpy()
    target.write_bytes(serialization.msgpack_serialize(tree))


def _pure(live: Any) -> Any:
    """Objects of nnx as the nested dict that they hold."""
    nnx = trees.nnx()
    if isinstance(live, dict) and set(live) == {"model", "optimizer"}:
        return {name: _pure(each) for name, each in live.items()}
    return nnx.to_pure_dict(nnx.state(live)) if nnx is not None and trees.is_graph(live) else live
