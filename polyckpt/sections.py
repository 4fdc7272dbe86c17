"""The tensors of a save by section, and the tensor files they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyckpt import scalars, schema, unchanged
from polyckpt.checkpoint import Checkpoint
from polyckpt.errors import UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.names import join, split
from polyckpt.staging import Staging
from polyckpt.storage import array_directory, tensor_file


class Sections:
    """The tensors of a save by section, each stored once however many names it has. leaves: section -> name -> tensor."""

    def __init__(self) -> None:
        self.leaves: dict[str, dict[str, Leaf]] = {"weights": {}, "optimizer": {}, "state": {}}
        self._by_identity: dict[tuple[str, str, Any], str] = {}

    def add(self, section: str, name: str, leaf: Leaf) -> str:
        """Add a tensor; returns the name that it is stored under, which is another one where it is there already."""
        identity = (section, leaf.dtype, leaf.identity)
        if leaf.identity is not None and identity in self._by_identity:
            return self._by_identity[identity]
        if name in self.leaves[section]:
            raise UnsupportedError(f"{section}: two tensors are named {name!r}")
        self.leaves[section][name] = leaf
        self._by_identity[identity] = name
        return name

    def add_weights(self, weights: Mapping[str, Leaf]) -> dict[str, str]:
        """Add a model's tensors; returns the aliases among their names."""
        stored = {name: self.add("weights", scalars.text(name, "weights"), leaf) for name, leaf in weights.items()}
        return {name: target for name, target in stored.items() if name != target}

    def add_state(self, path: tuple[Any, ...], leaf: Leaf) -> str:
        """Add a tensor of native residue under its path."""
        name = join(path)
        suffix = 1
        # Keys of different types may be written alike, and a key may itself be a tensor.
        while name in self.leaves["state"]:
            suffix += 1
            name = join([*path, f"({suffix})"])
        return self.add("state", name, leaf)

    def compare(self, check: Callable[[np.ndarray], None]) -> None:
        """Have `check` compare the bytes of every tensor when it is checked."""
        for leaves in self.leaves.values():
            leaves.update({name: leaf.compared(check) for name, leaf in leaves.items()})

    def check_reads(self) -> None:
        """Have every tensor of a file with checksums of its own compared with them before it is read."""
        for leaves in self.leaves.values():
            leaves.update({name: leaf.checked() for name, leaf in leaves.items()})

    def stage(self, staging: Staging) -> None:
        """Make all tensors independent of the live ones."""
        flat = {f"{section}/{name}": leaf for section, leaves in self.leaves.items() for name, leaf in leaves.items()}
        for key, leaf in staging.copy(flat).items():
            section, _, name = key.partition("/")
            self.leaves[section][name] = leaf

    def write(
        self, directory: Path, metadata: Mapping[str, str], store: str | None = None, before: Checkpoint | None = None
    ) -> dict[str, Any]:
        """Write all tensors; returns the members of the manifest that say where they lie.

        One tensor file per section that has tensors, weights always. store: what writes weights and slots instead, into an
        array directory. before: a checkpoint whose files are linked where they hold what has not changed.
        """
        held = self._given_to(store)
        arrays = {}
        if any(held.values()):
            assert store is not None
            arrays[array_directory.NAME] = array_directory.write(directory, store, held)
        ours = {
            section: {name: leaf for name, leaf in leaves.items() if name not in held[section]}
            for section, leaves in self.leaves.items()
        }
        linked = unchanged.link(before, ours, directory) if before is not None else unchanged.NOTHING
        files: dict[str, schema.TensorFile] = {**linked.files}
        tensors: dict[str, dict[str, schema.Tensor]] = {}
        for section, leaves in self.leaves.items():
            found = {
                name: _whole(leaf, array_directory.NAME, join([section, *split(name)]), array_directory.checksum_of(leaf))
                for name, leaf in held[section].items()
            }
            found |= linked.tensors.get(section, {})
            rest = {name: leaf for name, leaf in leaves.items() if name not in found}
            tensors[section] = found
            if not rest and (found or section != "weights"):
                continue
            file = f"{section}.safetensors"
            keys = {_key(name, leaves): leaf for name, leaf in rest.items()}
            written = tensor_file.write(directory / file, keys, metadata if section == "weights" else {})
            files[file] = written.entry
            for (name, leaf), key in zip(rest.items(), keys, strict=True):
                found[name] = _whole(leaf, file, key, written.checksums[key])
            tensors[section] = {name: found[name] for name in leaves}
        return {"files": files, "tensors": tensors, "arrays": arrays}

    def _given_to(self, store: str | None) -> dict[str, dict[str, Leaf]]:
        """What a store is given of each section: weights and slots, but what has no elements, which arrays cannot be of."""
        return {
            section: {name: leaf for name, leaf in leaves.items() if store and section != "state" and 0 not in leaf.shape}
            for section, leaves in self.leaves.items()
        }


def _whole(leaf: Leaf, file: str, key: str, checksum: str) -> schema.Tensor:
    """A tensor in one chunk."""
    chunk = schema.Chunk(file=file, key=key, offset=(0,) * len(leaf.shape), shape=leaf.shape, checksum=checksum)
    return schema.Tensor(dtype=leaf.dtype, shape=leaf.shape, chunks=(chunk,))


def _key(name: str, taken: Mapping[str, Leaf]) -> str:
    """The key of a tensor in its file: its name, unless that is the one which safetensors reserves."""
    key = name
    while key == "__metadata__" or (key != name and key in taken):
        key += "~"
    return key
