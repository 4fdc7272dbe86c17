"""A tensor of a file of another format, as one of an opened checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from polyckpt.checkpoint import StoredTensor
from polyckpt.checksums import checksum
from polyckpt.dtypes import lookup
from polyckpt.errors import CorruptError
from polyckpt.leaves import Leaf


class ReadTensor(StoredTensor):
    """A tensor of a file of another format, read when it is asked for. Such files have no checksums but their own, if any."""

    def __init__(self, path: Path, name: str, leaf: Leaf) -> None:
        self.name, self.dtype, self.shape = name, leaf.dtype, leaf.shape
        self._path, self._leaf = path, leaf

    @property
    def checksums(self) -> tuple[str, ...]:
        return (checksum(self.raw().data),)

    def locate(self) -> None:
        return

    def verify(self) -> None:
        """Compare what the file itself notes of its bytes, where it does. Raises CorruptError."""
        if self._leaf.check is not None:
            self._leaf.check()

    def raw(self) -> np.ndarray:
        array = np.asarray(self._leaf.read())
        expected = math.prod(self.shape) * lookup(self.dtype, self.name).itemsize
        if array.nbytes != expected:
            raise CorruptError(f"{self._path}: {self.name}: {self} is {expected} bytes, the file has {array.nbytes}")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return data if data.flags.writeable else data.copy()
