"""Element types: the neutral name, how a tensor file holds it, and how NumPy sees it.

A tensor file is safetensors, whose own types are a subset. A type that it lacks is stored bit for bit under another one of
the same size (`stored_code`), with trailing axes where one element needs several of those (`stored_suffix`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from polyckpt.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type: `itemsize` is in bytes, `stored_code` is the safetensors code."""

    name: str
    itemsize: int
    stored_code: str
    stored_suffix: tuple[int, ...] = ()

    @property
    def numpy(self) -> np.dtype:
        """The NumPy type of this name; types that NumPy lacks come from ml_dtypes."""
        return _numpy(self.name)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of `shape` in the header of its file."""
        return shape + self.stored_suffix


_ROWS = (
    Dtype("bool", 1, "BOOL"),
    Dtype("int8", 1, "I8"),
    Dtype("int16", 2, "I16"),
    Dtype("int32", 4, "I32"),
    Dtype("int64", 8, "I64"),
    Dtype("uint8", 1, "U8"),
    Dtype("uint16", 2, "U16"),
    Dtype("uint32", 4, "U32"),
    Dtype("uint64", 8, "U64"),
    Dtype("float16", 2, "F16"),
    Dtype("bfloat16", 2, "BF16"),
    Dtype("float32", 4, "F32"),
    Dtype("float64", 8, "F64"),
    Dtype("complex64", 8, "C64"),
    Dtype("complex128", 16, "F64", (2,)),
    Dtype("float8_e4m3fn", 1, "F8_E4M3"),
    Dtype("float8_e5m2", 1, "F8_E5M2"),
    Dtype("float8_e8m0fnu", 1, "F8_E8M0"),
    Dtype("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
    Dtype("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
    # One byte an element, as ml_dtypes holds them in memory.
    *(
        Dtype(name, 1, "U8")
        for name in (
            "float8_e3m4",
            "float8_e4m3",
            "float8_e4m3b11fnuz",
            "float6_e2m3fn",
            "float6_e3m2fn",
            "float4_e2m1fn",
            "int2",
            "int4",
            "uint2",
            "uint4",
        )
    ),
)

DTYPES: dict[str, Dtype] = {row.name: row for row in _ROWS}
"""Every element type of format 1 by its neutral name."""


@cache
def _numpy(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        found: np.dtype = np.dtype(getattr(ml_dtypes, name))
        return found


@cache
def numpy_name(dtype: np.dtype) -> str:
    """The name of a NumPy type, which NumPy puts together each time that it is asked."""
    return dtype.name


MAX_AXES = 64
"""What NumPy can hold."""


def size_problem(shape: tuple[int, ...], itemsize: int) -> str | None:
    """What is wrong with `shape`, cheaply even where it is absurd; None where nothing is.

    >>> size_problem((2, -1), 4)
    'shape [2, -1] has a negative size'
    >>> size_problem((0, 1 << 62), 4)
    'shape [0, 4611686018427387904] is too large to address'
    """
    if len(shape) > MAX_AXES:
        return f"its shape has {len(shape)} axes; at most {MAX_AXES} are allowed"
    if shape and not (min(shape) >= 0 and max(shape) < 1 << 63):
        # str() of a longer integer would raise.
        shown = [size if abs(size) < 1 << 64 else "..." for size in shape]
        return f"shape {shown} has a {'negative' if min(shape) < 0 else 'too large'} size"
    if (math.prod(shape) or math.prod(size or 1 for size in shape)) * itemsize >= 1 << 63:
        return f"shape {list(shape)} is too large to address"
    return None


@lru_cache(1024)  # most tensors of a model have few shapes; what raises is not kept
def size_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """The bytes of a tensor. Raises ValueError where `size_problem` has something to say.

    >>> size_bytes((2, 3), 4)
    24
    """
    if problem := size_problem(shape, itemsize):
        raise ValueError(problem)
    return int(math.prod(shape)) * itemsize  # what is kept is found for equal numbers of any type


def lookup(name: str, where: str) -> Dtype:
    """The row of `name`, or UnsupportedError that names `where` it stands."""
    try:
        return DTYPES[name]
    except KeyError:
        raise UnsupportedError(
            f"{where}: element type {name!r} is not part of the format; it holds {', '.join(DTYPES)}"
        ) from None


def of_code(code: str, where: str) -> Dtype:
    """The element type that a safetensors file calls `code`, or UnsupportedError that names `where` it stands."""
    for row in _ROWS:
        if row.stored_code == code and not row.stored_suffix:
            return row
    raise UnsupportedError(f"{where}: safetensors element type {code!r} is not known")


def widens(stored: str, live: str) -> bool:
    """Whether every value of one type is one of the other.

    >>> widens("bfloat16", "float32"), widens("float64", "float32")
    (True, False)
    """
    return stored == live or bool(np.can_cast(lookup(stored, "").numpy, lookup(live, "").numpy, "safe"))
