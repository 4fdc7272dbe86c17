"""The garbage collector of Python, which looks at all objects again and again while many are made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collection in this block, which makes many objects and leaves no cycles: a hundred thousand tensors take a third.

    For work on names and numbers alone. What waits for a disk must not keep the garbage of a training beside it in memory.

    >>> with paused():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
