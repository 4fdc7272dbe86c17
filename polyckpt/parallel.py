"""Work on many tensors in a few threads: reading, hashing and copying release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_SMALL = 1 << 14
_T = TypeVar("_T")


def in_threads(items: Iterable[_T], work: Callable[[_T], object], *, size: Callable[[_T], int]) -> None:
    """Do work that releases the GIL in a few threads. size: of an item, in elements or bytes. Raises the first error.

    >>> done = []
    >>> in_threads([1, 2, 3], done.append, size=lambda item: item)
    >>> done
    [1, 2, 3]
    """
    large: list[_T] = []
    small: list[_T] = []
    for item in items:
        (small if size(item) < _SMALL else large).append(item)
    if len(large) < 2:
        for item in (*large, *small):
            work(item)
        return
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        tasks = [pool.submit(work, item) for item in large]
        # To hand over a task costs more than to hash a kilobyte.
        for item in small:
            work(item)
        for task in tasks:
            task.result()
