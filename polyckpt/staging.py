"""Copies of tensors that training goes on changing while they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from msgspec.structs import replace

from polyckpt.dtypes import lookup
from polyckpt.leaves import Leaf
from polyckpt.parallel import in_threads

_ALIGNMENT_BYTES = 64


class Staging:
    """One buffer on the host, reused from save to save: memory already mapped is copied into several times faster."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def copy(self, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """The same leaves with values of their own; those that nobody changes are read, not copied.

        They hold until the next call.
        """
        spans, end = {}, 0
        for key, leaf in leaves.items():
            if not leaf.frozen:
                size_bytes = math.prod(leaf.shape) * lookup(leaf.dtype, key).itemsize
                spans[key] = (end, end + size_bytes)
                end += size_bytes + -size_bytes % _ALIGNMENT_BYTES
        if end > self._buffer.size:
            self._buffer = np.empty(end, np.uint8)
        places = {key: self._buffer[slice(*span)] for key, span in spans.items()}

        def copy(key: str) -> None:
            np.copyto(places[key], leaves[key].read().reshape(-1).view(np.uint8))

        in_threads(places, copy, size=lambda key: places[key].size)
        return {key: _held(leaf, places[key] if key in places else leaf.read()) for key, leaf in leaves.items()}


def _held(leaf: Leaf, values: np.ndarray) -> Leaf:
    return replace(leaf, read=lambda: values, frozen=True, live=None)  # which may be given up meanwhile
