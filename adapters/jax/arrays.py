"""Arrays, PRNG keys and other leaves of pytrees: what is stored of one, what a template asks for, and making it anew."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from polyckpt.checkpoint import StoredTensor
from polyckpt.dtypes import lookup, numpy_name
from polyckpt.errors import CorruptError, Problem, UnsupportedError
from polyckpt.leaves import Leaf, array_leaf

PYTHON = (bool, int, float, complex, str, bytes)
"""Types of leaves that are stored as they are."""

_ZEROS: dict[str, Any] = {"f": 0.0, "i": 0, "c": 0j}
_NUMBERS: dict[type, Any] = {bool: np.bool_, int: np.integer, float: np.floating, complex: np.complexfloating}
_OF_JAX: tuple[Any, ...] = (jax.Array, jax.ShapeDtypeStruct)
_OF_NUMPY = (np.ndarray, np.generic)
_ARRAYS = (*_OF_JAX, *_OF_NUMPY)


@functools.cache
def is_inexact(dtype: Any) -> bool:
    """Whether a type is one of real or complex numbers."""
    return bool(jnp.issubdtype(dtype, np.inexact))


@functools.cache
def _is_of_keys(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def is_key(value: Any) -> bool:
    """Whether an array, or a ShapeDtypeStruct, is one of typed PRNG keys."""
    return _is_of_keys(value.dtype)


def is_array(value: Any) -> bool:
    """Whether a leaf is an array or stands for one."""
    return isinstance(value, _ARRAYS)


def is_static(value: Any) -> bool:
    """Whether a leaf is structure (a function, a class, a dtype), which a template has and a checkpoint does not."""
    return callable(value) or isinstance(value, np.dtype)


def is_weak(array: jax.Array) -> bool:
    """Whether an array promotes as a Python number does. Only types that a Python number becomes can be made weak again."""
    return bool(array.aval.weak_type) and array.dtype == _weak_dtype(array.dtype)


def _weak_dtype(dtype: Any) -> np.dtype | None:
    """The type that a Python number of the kind of `dtype` becomes in JAX as it is set (64 bits or 32)."""
    zero = _ZEROS.get(np.dtype(dtype).kind)
    return None if zero is None else np.dtype(jnp.result_type(zero))


def impl_name(keys: Any) -> str:
    """The name of the random number generator of typed keys, or of a ShapeDtypeStruct of some."""
    found: list[Any] = []
    jax.eval_shape(lambda each: found.append(jax.random.key_impl(each)), keys)  # key_impl itself refuses abstract keys
    return str(found[0])


def leaf(value: Any, name: str) -> Leaf:
    """The Leaf of an array of JAX or NumPy. Raises UnsupportedError, naming it, for one whose values are not at hand.

    A template (a ShapeDtypeStruct, an array that was donated) has a leaf too, since it can be described: reading raises.
    """
    if not isinstance(value, _OF_JAX):
        try:
            return array_leaf(np.asarray(value), "numpy.scalar" if isinstance(value, np.generic) else "numpy")
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}") from error
    template = isinstance(value, jax.ShapeDtypeStruct)
    if not template:
        check_concrete(value, name)
    keys = is_key(value)
    if keys:
        kind = f"jax.key:{impl_name(value)}"
    else:
        kind = "jax.weak" if not template and is_weak(value) else "jax"
    if (missing := _missing(value)) is not None:
        data = jax.eval_shape(jax.random.key_data, value) if keys else value
        # Not frozen: a save reads what may change at once, also where it writes in the background.
        return Leaf(numpy_name(data.dtype), data.shape, lambda: _refuse(f"{name}: {missing}"), identity=id(value), kind=kind)
    data = jax.random.key_data(value) if keys else value
    return Leaf(numpy_name(data.dtype), data.shape, lambda: _host(data), identity=id(value), kind=kind, frozen=True, live=data)


def _missing(value: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why an array has no values, None for one that has."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value} has no values: it can be a template for load, but cannot be saved"
    if value.is_deleted():
        return "the array was deleted: it was donated to a jitted function (donate_argnums). Save what that returned"
    return None


def _refuse(reason: str) -> np.ndarray:
    raise UnsupportedError(reason)


def check_concrete(value: Any, name: str) -> None:
    """Raises UnsupportedError for a tracer and for an array that this process does not hold whole."""
    if isinstance(value, jax.core.Tracer):
        raise UnsupportedError(
            f"{name}: a tracer has no values: save and load were called inside a function under jit, grad, vmap or scan. "
            "Call them outside"
        )
    sharding = getattr(value, "sharding", None)
    if sharding is not None and not sharding.is_fully_addressable:
        raise UnsupportedError(
            f"{name}: {value.dtype.name}{list(value.shape)} lies on devices of several processes ({sharding}); each process "
            "can reach its own alone. Gather it on every process first (jax.experimental.multihost_utils.process_allgather)"
        )


def _host(array: jax.Array) -> np.ndarray:
    try:
        return np.ascontiguousarray(memoryview(array))  # on a CPU, without a copy
    except BufferError:
        pass
    # np.asarray(array) would keep its copy on the host as long as the array lives; that of a shard goes with the shard.
    if array.is_fully_replicated:
        return np.ascontiguousarray(array.addressable_data(0))
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = np.asarray(shard.data)
    return whole


def show(value: Any) -> str:
    """A live leaf for people."""
    if not is_array(value):
        return f"{value!r:.60} (Python {type(value).__name__})"
    name = f"key<{impl_name(value)}>" if isinstance(value, _OF_JAX) and is_key(value) else value.dtype.name
    return f"{name}{list(value.shape)}"


class Stored(msgspec.Struct, frozen=True):
    """One stored leaf: a `tensor`, or a Python `value`. impl: of typed keys; weak: whether its type is."""

    tensor: StoredTensor | None = None
    value: Any = None
    impl: str | None = None
    weak: bool = False

    def __str__(self) -> str:
        if self.tensor is None:
            return show(self.value)
        return f"key<{self.impl}> of {self.tensor}" if self.impl else str(self.tensor)


def mismatch(live: Any, stored: Stored, section: str, name: str) -> Problem | None:
    """What keeps a stored leaf from standing where `live` stands in the template."""

    def problem(kind: Any, note: str = "") -> Problem:
        return Problem(kind, section, name, stored=str(stored), live=show(live) + note)

    check_concrete(live, name)
    if stored.tensor is not None and not isinstance(live, _OF_NUMPY) and narrows(stored.tensor):
        return problem("dtype", " (jax_enable_x64 is off: JAX would truncate what is stored)")
    if stored.tensor is None or not is_array(live):
        return None if _same_number(live, stored) else problem("dtype")
    keys = is_key(live)
    if (impl_name(live) if keys else None) != stored.impl:
        return problem("dtype")
    expected = jax.eval_shape(jax.random.key_data, live) if keys else live
    if stored.tensor.shape != expected.shape:
        return problem("shape")
    return problem("dtype") if stored.tensor.dtype != numpy_name(expected.dtype) else None


def _same_number(live: Any, stored: Stored) -> bool:
    """Whether one of them is a Python value and the other is of its type, or the 0-d array that updating it makes.

    Counters and sums begin as Python numbers and are arrays after the first jitted step: what was stored is what the run held.
    """
    if stored.tensor is None and not is_array(live):
        return type(live) is type(stored.value)
    if stored.tensor is None:
        python, dtype, shape = type(stored.value), live.dtype, live.shape
    else:
        python, dtype, shape = type(live), _numpy_dtype(stored.tensor), stored.tensor.shape
    return python in _NUMBERS and stored.impl is None and shape == () and jnp.issubdtype(dtype, _NUMBERS[python])


def narrows(tensor: StoredTensor) -> bool:
    """Whether JAX, as it is set, would cast `tensor` to a narrower type."""
    dtype = _numpy_dtype(tensor)
    return bool(jax.dtypes.canonicalize_dtype(dtype) != dtype)


def _numpy_dtype(tensor: StoredTensor) -> np.dtype:
    return lookup(tensor.dtype, tensor.name).numpy


_BATCH_BYTES = 1 << 20
"""Arrays are placed together until they have so many bytes: only those are in memory twice, and calls cost little beside."""


def make(wanted: Iterable[tuple[Any, Stored]]) -> list[Any]:
    """The new leaf for the place of each live one: on its devices, of its framework, sharing no memory with the file.

    One stored tensor comes back as one array for all its places that are alike.
    """
    keys: list[Any] = []
    made: dict[Any, Any] = {}
    batch: dict[Any, jax.sharding.Sharding | None] = {}
    size_bytes = 0
    for live, stored in wanted:
        of_numpy = isinstance(live, _OF_NUMPY)
        where: Any = type(live) if of_numpy else sharding(live)
        key = len(keys) if stored.tensor is None else (id(stored.tensor), stored.impl, where)
        keys.append(key)
        if stored.tensor is None:
            made[key] = stored.value
        elif key in made:
            continue
        elif of_numpy:
            array = stored.tensor.numpy().copy()
            made[key] = array if isinstance(live, np.ndarray) else array[()]
        else:
            made[key], batch[key] = _own(stored.tensor.strided(), impl=stored.impl, weak=stored.weak), where
            size_bytes += made[key].nbytes
        if size_bytes >= _BATCH_BYTES:
            _place(made, batch)
            size_bytes = 0
    _place(made, batch)
    return [made[key] for key in keys]


def _place(made: dict[Any, Any], batch: dict[Any, jax.sharding.Sharding | None]) -> None:
    """Put those of `made` that are in `batch` on their devices, at once: of a call for each, half would be overhead."""
    if batch:
        placed = jax.device_put([made[key] for key in batch], list(batch.values()))
        made.update(zip(batch, placed, strict=True))
        batch.clear()


def sharding(live: Any) -> jax.sharding.Sharding | None:
    """Where the new array for the place of `live` belongs; None leaves JAX free to move it, as it was."""
    fixed = live.committed if isinstance(live, jax.Array) else isinstance(live, jax.ShapeDtypeStruct)
    where: jax.sharding.Sharding | None = live.sharding if fixed else None
    return where


def placed(host: np.ndarray, *, impl: str | None = None, weak: bool = False) -> jax.Array:
    """A JAX array of its own with the bits of `host`, which JAX is free to move."""
    result: jax.Array = jax.device_put(_own(host, impl=impl, weak=weak))
    return result


def _own(host: np.ndarray, *, impl: str | None, weak: bool) -> Any:
    """What can be put on a device as an array of its own with the bits of `host`."""
    # On a CPU device_put may alias what it is given, in spite of may_alias=False: let that be a copy nobody else has. What lies
    # in another order of memory it must copy itself, and does so faster than NumPy.
    if host.base is not None and host.flags.c_contiguous:
        host = host.copy()
    if impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(host), impl=impl)
    if weak and _weak_dtype(host.dtype) == host.dtype:
        # The one public operation that gives all bits of an array to a weakly typed one of any shape.
        return jnp.full(host.shape, _ZEROS[host.dtype.kind]).at[...].set(host)
    return host


NOTHING_BESIDE: Mapping[str, Any] = {"values": {}, "weak": [], "keys": {}}
"""The native residue of a pytree of arrays alone."""


def stored_leaves(tensors: Mapping[str, StoredTensor], native: Any, where: str) -> dict[str, Stored]:
    """What is stored of a tree by name, from its tensors and what `trees.capture` put into `native`."""
    try:
        values, weak, impls = native["values"], frozenset(native["weak"]), native["keys"]
        plain = all(type(value) in PYTHON for value in values.values()) and all(isinstance(impls[name], str) for name in impls)
        if not plain or not values.keys().isdisjoint(tensors) or not weak | impls.keys() <= tensors.keys():
            raise ValueError("values, weak or keys name what they cannot")
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise CorruptError(f"{where}: the native residue of a pytree is not of the format: {error!r}") from error
    found = {name: Stored(tensor, impl=impls.get(name), weak=name in weak) for name, tensor in tensors.items()}
    return {**found, **{name: Stored(value=value) for name, value in values.items()}}
