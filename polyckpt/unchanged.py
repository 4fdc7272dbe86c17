"""Tensors that are as they were at the save before: the file that holds them is linked, not written again."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from polyckpt import schema
from polyckpt.checkpoint import Checkpoint, StoredTensor
from polyckpt.errors import CorruptError
from polyckpt.leaves import Leaf
from polyckpt.parallel import in_threads
from polyckpt.storage import local

_PREFIX = "unchanged-"
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True)
class Unchanged:
    """What of a save lies in linked files: entries of the manifest. tensors: section -> name -> tensor."""

    files: Mapping[str, schema.TensorFile]
    tensors: Mapping[str, Mapping[str, schema.Tensor]]


NOTHING = Unchanged({}, {})


def link(before: Checkpoint, sections: Mapping[str, Mapping[str, Leaf]], directory: Path) -> Unchanged:
    """Link those files of the checkpoint `before` into `directory` most of whose bytes are what the tensors hold now.

    Each byte is compared with that on the disk, so that no damage is handed on. before: opened with verify=False. Nothing is
    linked where the file system has no links.
    """
    candidates = [
        (section, name, leaf, stored)
        for section, leaves in sections.items()
        for name, leaf in leaves.items()
        if (stored := getattr(before, section).stored.get(name)) is not None and _may_be(leaf, stored, before.manifest)
    ]
    same: dict[str, list[tuple[str, str, StoredTensor]]] = defaultdict(list)

    def compare(candidate: tuple[str, str, Leaf, StoredTensor]) -> None:
        section, name, leaf, stored = candidate
        if _equal(leaf.read().reshape(-1).view(np.uint8), stored.raw()):
            same[stored.chunks[0].file].append((section, name, stored))

    in_threads(candidates, compare, size=lambda candidate: candidate[3].size_bytes)
    files: dict[str, schema.TensorFile] = {}
    tensors: dict[str, dict[str, schema.Tensor]] = {section: {} for section in sections}
    taken = {*before.manifest.files}
    for file, inside in sorted(same.items()):
        entry = before.manifest.files[file]
        if 2 * sum(stored.size_bytes for _, _, stored in inside) < entry.size_bytes:
            continue  # what is out of date in it would keep more of the disk than it saves
        free = (each for number in count(1) if (each := f"{_PREFIX}{number}.safetensors") not in taken)
        new = file if file.startswith(_PREFIX) else next(free)
        if not local.link(before.path / file, directory / new):
            continue
        taken.add(new)
        files[new] = entry
        for section, name, stored in inside:
            chunk = replace(stored.chunks[0], file=new)
            tensors[section][name] = schema.Tensor(dtype=stored.dtype, shape=stored.shape, chunks=(chunk,))
    return Unchanged(files, tensors)


def _may_be(leaf: Leaf, stored: StoredTensor, manifest: schema.Manifest) -> bool:
    if len(stored.chunks) != 1 or stored.chunks[0].file not in manifest.files:
        return False
    if (leaf.dtype, leaf.shape) != (stored.dtype, stored.shape):
        return False
    try:
        stored.locate()
    except CorruptError:
        return False
    return True


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    # NumPy would make an array of the comparison; this makes none, and other threads run meanwhile.
    compared: int = _memcmp(one.ctypes.data, other.ctypes.data, one.size)
    return compared == 0
