"""A safetensors file: tensors by name, of whoever its metadata says wrote it."""

from __future__ import annotations

import functools
from pathlib import Path

from polyckpt.adapter import Contents
from polyckpt.checkpoint import StoredTensor
from polyckpt.dtypes import of_code
from polyckpt.formats.described import Like, contents_of
from polyckpt.formats.table import Format
from polyckpt.formats.writing import Source
from polyckpt.leaves import Leaf
from polyckpt.storage import tensor_file
from polyckpt.storage.tensor_file import TensorFileReader

ADAPTERS = {"pt": "torch", "flax": "jax", "tf": "keras", "np": "numpy"}
"""What the metadata of a file call the framework of its tensors -> our name of it."""


def recognises(path: Path) -> bool:
    """Whether it begins as such a file does: the length of a header, and the header, an object of JSON."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        prefix = file.read(9)
    return len(prefix) == 9 and prefix[8:] == b"{" and int.from_bytes(prefix[:8], "little") <= path.stat().st_size


def read(path: Path, like: Like | None) -> Contents:
    """The tensors of a file, mapped."""
    reader = TensorFileReader(path.parent, path.name)
    adapter = ADAPTERS.get(reader.metadata.get("format", ""), "numpy")
    return contents_of(leaves(reader), like, adapter=adapter, type="safetensors")


def leaves(reader: TensorFileReader) -> dict[str, Leaf]:
    """The tensors of an open file by name."""
    found = {}
    for name, entry in reader.entries.items():
        dtype = of_code(entry.dtype, f"{reader.path}: {name}")
        found[name] = Leaf(dtype=dtype.name, shape=entry.shape, read=functools.partial(reader.raw, name), frozen=True)
    return found


def write(source: Source, target: Path) -> None:
    """Write the weights, tied ones under each of their names once."""
    stored = source.checkpoint.weights.stored
    adapter = source.checkpoint.manifest.producer.adapter
    told = next((name for name, each in ADAPTERS.items() if each == adapter), "np")
    tensor_file.write(target, {name: leaf_of(tensor) for name, tensor in stored.items()}, {"format": told})


def leaf_of(tensor: StoredTensor) -> Leaf:
    """A stored tensor on its way into another file."""
    return Leaf(dtype=tensor.dtype, shape=tensor.shape, read=tensor.numpy, frozen=True)


FILE = Format(
    name="safetensors",
    title="a safetensors file",
    adapter="",
    recognises=recognises,
    reader="polyckpt.formats.safetensors:read",
    writer="polyckpt.formats.safetensors:write",
    suffixes=(".safetensors",),
)
