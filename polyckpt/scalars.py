"""What callers say about a run (metrics, rates, counts, names), turned into what a manifest can hold."""

from __future__ import annotations

import operator
from typing import Any

from polyckpt import schema
from polyckpt.errors import UnsupportedError

Scalar = Any
"""A number: of Python, or anything 0-dimensional with an `item()` method (NumPy, torch, JAX, TensorFlow scalars)."""


def scalar(value: Scalar, what: str) -> float | int:
    """One Python number. Raises UnsupportedError, naming `what`, for anything else."""
    try:
        number = value.item() if hasattr(value, "item") else value.numpy().item() if hasattr(value, "numpy") else value
        if isinstance(number, str | bytes):
            raise TypeError("text is no number")
        whole = isinstance(number, int) and not isinstance(number, bool) and abs(number) < 1 << 1024
        return int(number) if whole else float(number)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UnsupportedError(f"{what}: {value!r:.200} ({kind}) is not one number: {error}") from error


def learning_rate(lr: Any) -> schema.Number | tuple[schema.Number, ...] | None:
    """A rate, or one per parameter group."""
    if lr is None:
        return None
    if isinstance(lr, list | tuple):
        return tuple(schema.to_number(scalar(each, "lr")) for each in lr)
    return schema.to_number(scalar(lr, "lr"))


def optional_number(number: schema.Number | None) -> float | int | None:
    """The Python number of one that may be absent."""
    return None if number is None else schema.from_number(number)


def count(value: Any, what: str) -> int | None:
    """A whole number that is not negative, or None. Raises UnsupportedError, naming `what`, for anything else."""
    if value is None:
        return None
    try:
        number = operator.index(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedError(f"{what}: {value!r:.200} is not a whole number") from error
    if not 0 <= number < 1 << 63:
        size = "negative" if number < 0 else "too large"
        raise UnsupportedError(f"{what}: a count of {number.bit_length()} bits is {size}; it counts what is completed")
    return number


def text(name: Any, where: str) -> str:
    """A name that JSON and a tensor file can hold. Raises UnsupportedError, saying `where` it stands, for another."""
    if not isinstance(name, str):
        raise UnsupportedError(f"{where}: the name {name!r} is a {type(name).__name__}, not a string")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"{where}: the name {name!r} is not valid Unicode") from error
    return name
