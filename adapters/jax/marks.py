"""Seeing arrays go by inside a model: a primitive that is the identity and tells a recorder.

Under vmap it tells the batched array. It is bound outside of jit alone (`watching` turns that off): nothing of it is ever
compiled, so no cache of the program keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from polyckpt.adapter import Recorder

_RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)
_SMALL = (jnp.bfloat16, jnp.float16)

_mark: Any = Primitive("polyckpt_mark")


def ran(output: jax.Array, path: str) -> jax.Array:
    """`output`, told to the recorder as what the layer `path` made."""
    marked: jax.Array = _mark.bind(output, path=path, reads=False)
    return marked


def reads(value: jax.Array, path: str) -> jax.Array:
    """`value`, noted as what the layer `path` reads, for `flattened`."""
    marked: jax.Array = _mark.bind(value, path=path, reads=True)
    return marked


@contextmanager
def watching(recorder: Recorder | None) -> Iterator[None]:
    """Tell `recorder` of what is marked here; None tells nobody. Compiled functions run as they are written."""
    token = _RECORDER.set(recorder)
    try:
        with jax.disable_jit():
            yield
    finally:
        _RECORDER.reset(token)


def host(array: Any) -> np.ndarray:
    """An array of the device as NumPy's, small floating types as float32."""
    return np.asarray(array.astype(jnp.float32) if array.dtype in _SMALL else array)


def _tell(value: Any, *, path: str, reads: bool) -> Any:
    recorder = _RECORDER.get()
    if recorder is not None and not reads:
        recorder.ran(path, host(value))
    return value


def _batched(values: Any, axes: Any, **parameters: Any) -> tuple[Any, int]:
    return _mark.bind(jnp.moveaxis(values[0], axes[0], 0), **parameters), 0


_mark.def_impl(_tell)
_mark.def_abstract_eval(lambda value, **parameters: value)
batching.primitive_batchers[_mark] = _batched
ad.primitive_jvps[_mark] = lambda values, tangents, **parameters: (_mark.bind(*values, **parameters), tangents[0])
mlir.register_lowering(_mark, lambda context, value, **parameters: [value])

# What was flattened, read off the operations of a model.

_ELEMENTWISE_NAMES = """
abs add and atan2 ceil clamp convert_element_type copy copy_p cos div eq erf erf_inv erfc exp exp2 expm1 floor integer_pow
is_finite log log1p logistic max min mul ne neg not optimization_barrier or pow real reduce_precision rem round rsqrt select_n
sign sin sqrt square sub tan tanh xor custom_jvp_call custom_vjp_call polyckpt_mark
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
"""Operations that keep every number at its place; activations are calls with a derivative of their own."""


def flattened(run: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    """What each layer that is marked with `reads` reads, where that is a merger of all axes but the batch's: their sizes."""
    with watching(None):
        closed = jax.make_jaxpr(run)(*arguments)
    return dict(_flattened(closed.jaxpr))


def _flattened(jaxpr: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    merged: dict[int, frozenset[tuple[int, ...]]] = {}
    for equation in jaxpr.eqns:
        for inner in _inner(equation.params.values()):
            yield from _flattened(inner)
        if not equation.invars or len(equation.outvars) != 1:
            continue
        sources, (result,) = equation.invars, equation.outvars
        if equation.primitive is _mark and equation.params["reads"] and len(shapes := merged.get(id(sources[0]), ())) == 1:
            yield equation.params["path"], next(iter(shapes))
        if equation.primitive.name == "reshape":
            before, after = sources[0].aval.shape, result.aval.shape
            if len(before) > 2 and len(after) == 2 and before[0] == after[0]:
                merged[id(result)] = frozenset({before[1:]})
        elif equation.primitive.name in _ELEMENTWISE:
            alike = [merged.get(id(each), frozenset()) for each in sources if each.aval.shape == result.aval.shape]
            merged[id(result)] = frozenset[tuple[int, ...]]().union(*alike)


def _inner(values: Iterable[Any]) -> Iterator[Any]:
    """The programs among the parameters of an operation."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner(value)
        elif hasattr(value := getattr(value, "jaxpr", value), "eqns"):
            yield value
