"""Values of JAX for tests: of every element type, compared by their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import polyckpt
from polyckpt.dtypes import DTYPES

# Without 64 bits, which are off here, and six bits, which JAX does not have.
JAX_DTYPES = [
    name for name in DTYPES if not name.startswith("float6") and name not in ("float64", "int64", "uint64", "complex128")
]


def bits(value: Any) -> bytes:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value).tobytes()


def same(one: Any, other: Any) -> None:
    """Same structure, and leaf by leaf the same type, dtype, weak type, shape and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True):
        where = jax.tree_util.keystr(path)
        assert type(a) is type(b), where
        if hasattr(a, "dtype"):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), where
            assert bits(a) == bits(b), where
            assert getattr(a, "weak_type", None) == getattr(b, "weak_type", None), where
        else:
            assert a == b, where


def round_trip(path: Path, tree: Any, template: Any) -> Any:
    polyckpt.save(path / "c", tree)
    return polyckpt.load(path / "c", template).model


def zero(leaf: Any) -> Any:
    """Another value of the same type."""
    return (jnp if isinstance(leaf, jax.Array) else np).zeros_like(leaf) if hasattr(leaf, "dtype") else type(leaf)()


def problems(path: Path, *live: Any, **options: Any) -> dict[str, str]:
    with pytest.raises(polyckpt.MismatchError) as caught:
        polyckpt.load(path, *live, **options)
    return {problem.name: problem.kind for problem in caught.value.problems}


def random_array(name: str, shape: tuple[int, ...]) -> jax.Array:
    """Random bits of any element type, NaN patterns included."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    raw = np.random.default_rng(len(name)).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    if name == "bool":
        raw &= 1
    elif name in ("int2", "uint2", "int4", "uint4", "float4_e2m1fn"):
        bits = int("".join(filter(str.isdigit, name.partition("_")[0])))
        raw &= (1 << bits) - 1
        if name.startswith("int"):  # sign-extended in their byte
            raw = np.where(raw >> (bits - 1), raw | (0xFF << bits) & 0xFF, raw).astype(np.uint8)
    return jax.device_put(raw.view(dtype).reshape(shape))


class Pair(NamedTuple):
    left: Any
    right: Any


PARAMS = {"a": {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, "s": jnp.ones(())}
