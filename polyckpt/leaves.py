"""A tensor on its way from a framework into a file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import msgspec
import numpy as np

from polyckpt.errors import UnsupportedError


class Leaf(msgspec.Struct, frozen=True, gc=False):
    """A tensor that a save will write.

    dtype: a name of polyckpt.dtypes. shape: in elements. read: returns the C-contiguous bytes on the host, as an array of
    any element type that holds them bit for bit; called once, when the tensor's turn to be written has come, so that a
    device tensor is never copied before. identity: equal for tensors that share memory and are to be stored once and
    re-tied; None for one that shares with nobody. kind: who rebuilds it where it stands in native residue ("numpy",
    "torch", ...). frozen: whether nobody will ever change what `read` returns. live: the tensor itself, for a store of its own
    framework, which may write it shard by shard; None where `read` alone gives it. check: of a file with checksums of its own,
    compares them with the bytes, raising CorruptError; None where there are none.

    Python's garbage collector does not look at leaves, of which there may be a hundred thousand: nothing that a leaf refers to
    may refer to the leaf.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    identity: Hashable | None = None
    kind: str = "numpy"
    frozen: bool = False
    live: Any = None
    check: Callable[[], None] | None = None

    def compared(self, compare: Callable[[np.ndarray], None]) -> Leaf:
        """This tensor, with `compare` called with its bytes, once, as its check."""
        read, done = self.read, False

        def check() -> None:
            nonlocal done
            if not done:
                compare(np.ascontiguousarray(read()).reshape(-1).view(np.uint8))
                done = True

        return msgspec.structs.replace(self, check=check)

    def checked(self) -> Leaf:
        """This tensor, read only once its bytes have been checked."""
        check, read = self.check, self.read
        if check is None:
            return self

        def checked_read() -> np.ndarray:
            check()
            return read()

        return msgspec.structs.replace(self, read=checked_read)


@functools.cache
def name_of(dtype: np.dtype) -> str:
    """The neutral name of a NumPy type. Raises UnsupportedError for what are no numbers."""
    # Only numbers have a bit pattern that another program can read; ml_dtypes register as kind "V".
    if dtype.hasobject or dtype.names or dtype.kind in "OSUMm" or dtype.name.startswith(("void", "longdouble")):
        raise UnsupportedError(f"a NumPy array of dtype {dtype} cannot be stored: only numbers and booleans can")
    return dtype.name


def array_leaf(array: np.ndarray, kind: str = "numpy") -> Leaf:
    """The leaf of a NumPy array of any layout. Raises UnsupportedError for element types that are not numbers."""
    dtype = array.dtype
    name = name_of(dtype)
    pointer = array.__array_interface__["data"][0]
    if isinstance(array, np.ma.MaskedArray):
        raise UnsupportedError("a masked array cannot be stored: its mask would be lost. Store data and mask apart")
    return Leaf(
        dtype=name,
        shape=array.shape,
        read=functools.partial(_in_order, array),
        identity=(pointer, array.shape, array.strides, dtype.byteorder) if array.size else None,
        kind=kind,
    )


def _in_order(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else None)
