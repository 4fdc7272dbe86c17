"""Copies of tensors that training goes on changing while they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from polyckpt.dtypes import lookup
from polyckpt.leaves import Leaf

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
        return {key: _held(leaf, self._buffer[slice(*spans[key])] if key in spans else None) for key, leaf in leaves.items()}


def _held(leaf: Leaf, place: np.ndarray | None) -> Leaf:
    values = leaf.read()
    if place is not None:
        np.copyto(place, values.reshape(-1).view(np.uint8))
        values = place
    return replace(leaf, read=lambda: values, frozen=True, live=None)  # which may be given up meanwhile
