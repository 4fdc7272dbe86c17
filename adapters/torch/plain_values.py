"""Values of other packages that checkpoints hold beside tensors: numbers and arrays of NumPy, paths, arguments.

A pickle names functions that make them, which torch does not run. What they hold is plain and can be read without: a function
here stands for one that a pickle may name, takes the same arguments, and makes a value of Python or an array of numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_KINDS = "biufc"


class _Dtype:
    """numpy.dtype of numbers."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in _KINDS:
            raise ValueError(f"arrays of {self.dtype} are not of numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class _Array:
    """numpy.ndarray, which gets its values after it is made."""

    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        self.value = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if by_columns else "C").copy()


class _Arguments:
    """argparse.Namespace."""

    def __init__(self) -> None:
        self.value: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value = dict(state)


def _array(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0].item()


def _path(*segments: str) -> str:
    return "/".join(segments).replace("//", "/")


_STAND_INS: dict[str, Any] = {
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "argparse.Namespace": _Arguments,
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")},
}
"""What a pickle may name -> what is called in its stead."""

_LOCK = threading.Lock()


@contextmanager
def readable() -> Iterator[None]:
    """In this block torch reads such values, as `plain` takes them; but what the user has allowed is done as it says."""
    with _LOCK:
        own = {each[1] if isinstance(each, tuple) else each.__module__ for each in torch.serialization.get_safe_globals()}
        taken = {name.partition(".")[0] for name in own}
        stand_ins: list[Any] = [(value, name) for name, value in _STAND_INS.items() if name.partition(".")[0] not in taken]
        with torch.serialization.safe_globals(stand_ins):
            yield


def plain(value: Any) -> Any:
    """What was read, with the values themselves in place of what stood in for them."""
    if isinstance(value, _Array | _Arguments):
        return plain(value.value)
    if type(value) is dict:
        return {key: plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(each) for each in value)
    return value
