"""Files of eqx.tree_serialise_leaves: one array after the other, as numpy.save writes them, without a name."""

from __future__ import annotations

from pathlib import Path

from polyckpt.formats.table import Format

_MAGIC = b"\x93NUMPY"


def recognises(path: Path) -> bool:
    """Whether it begins as an array that NumPy saved does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


FILE = Format(
    name="equinox",
    title="a file of eqx.tree_serialise_leaves",
    adapter="jax",
    recognises=recognises,
    reader="polyckpt.adapters.jax.equinox_files:read",
    writer="polyckpt.adapters.jax.equinox_files:write",
    suffixes=(".eqx",),
    needs="polyckpt[equinox]",
)
