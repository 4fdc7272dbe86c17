"""The one checksum of the format: 128-bit XXH3, written as "xxh3-128:" and 32 hexadecimal digits."""

from __future__ import annotations

import xxhash

PREFIX = "xxh3-128:"
BLOCK_BYTES = 1 << 22
"""Bytes hashed at a time: few enough to stay in a CPU cache for the copy or write that follows."""


class Hasher:
    """An incremental checksum."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        self._state.update(data)

    def result(self) -> str:
        """The checksum of all bytes so far."""
        return PREFIX + self._state.hexdigest()


def checksum_in_blocks(data: memoryview) -> str:
    """As `checksum`, for data of any size: other threads run meanwhile."""
    if len(data) <= BLOCK_BYTES:
        return checksum(data)
    hasher = Hasher()
    for start in range(0, len(data), BLOCK_BYTES):
        hasher.update(data[start : start + BLOCK_BYTES])
    return hasher.result()


def checksum(data: bytes | memoryview) -> str:
    """The checksum of `data`.

    >>> checksum(b"polyckpt")
    'xxh3-128:9c850c632cdbbf36b91947238f5d3537'
    """
    return PREFIX + xxhash.xxh3_128_hexdigest(data)
