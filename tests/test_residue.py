from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyckpt import residue
from polyckpt.errors import CorruptError, UnsupportedError
from polyckpt.leaves import Leaf, array_leaf

FLOATS = st.floats(allow_nan=True)
TEXT = st.one_of(st.text(max_size=6), st.sampled_from(["$tuple", "$", "é", "$float", "\U0001f600"]))
KEYS = st.one_of(st.none(), st.booleans(), st.integers(), TEXT, st.binary(max_size=3), st.tuples(st.integers(), TEXT))
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(2**300), st.just(-(10**4000)), FLOATS, TEXT, st.binary(max_size=9),
    st.complex_numbers(),
)  # fmt: skip
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(TEXT, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter),
        st.tuples(st.lists(inner, max_size=3), st.sampled_from([None, 3, 9])).map(lambda pair: deque(*pair)),
        st.sets(KEYS, max_size=3),
        st.frozensets(KEYS, max_size=3),
    ),
    max_leaves=12,
)


def there_and_back(value: Any) -> Any:
    """Through JSON text; arrays by reference."""
    leaves: dict[str, Leaf] = {}

    def add(path: tuple[Any, ...], leaf: Leaf) -> str:
        return leaves.setdefault(f"t{len(leaves)}", leaf) and f"t{len(leaves) - 1}"

    encoded = residue.encode(value, leaf=lambda v: array_leaf(v) if isinstance(v, np.ndarray) else None, add_tensor=add)
    data = json.loads(json.dumps(encoded, allow_nan=False))
    assert list(residue.tensor_names(data)) == sorted(leaves, key=lambda name: int(name[1:]))
    tensor = lambda name, kind: residue.TensorRef(name, leaves[name].read)  # noqa: E731
    return residue.live(residue.decode(data, residue.Decoders(tensor=tensor, constant=lambda value, kind: (kind, value))))


def same(a: Any, b: Any) -> bool:
    """Equal in type, bits and order, NaN included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, set | frozenset):
        # 0, False and equal floats hash alike but are one member, so types agree member by member too.
        return a == b and sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


@given(VALUES)
def test_round_trip(value: Any) -> None:
    assert same(there_and_back(value), value)


@pytest.mark.parametrize(
    "wrap", [list, tuple, deque, lambda x: {"k": x[0]}, lambda x: {1: x[0]}, lambda x: Counter({"a": x[0]})]
)
def test_tensors_come_back_from_every_container(wrap: Any) -> None:
    value = wrap([np.arange(3)])
    assert same(there_and_back(value), value)


def test_equal_sets_give_equal_bytes() -> None:
    encode = lambda value: residue.encode(value, leaf=lambda _: None, add_tensor=lambda *_: "")  # noqa: E731
    names = [f"n{i}" for i in range(50)]
    assert encode(set(names)) == encode({*names[::-1]})


class Odd:
    pass


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [1, Odd()]}, r"value\['a'\]\[1\]: a .*Odd cannot be stored"),
        ({"a": {3: lambda: 0}}, r"value\['a'\]\[3\]: a builtins\.function"),
        ([Text("x")], r"value\[0\]: a .*Text"),
        ({"a": "\ud800"}, r"value\['a'\]: '\\ud800' is not valid Unicode"),
        ({"a": {"\ud800": 1}}, r"value\['a'\]: '\\ud800' is not valid Unicode"),
        ([10**5000], r"value\[0\]: an integer of 16610 bits"),
        ([np.array(["x"])], r"value\[0\]: a NumPy array of dtype <U1"),
        ([np.array([None])], r"value\[0\]: a NumPy array of dtype object"),
        ([np.ma.masked_array([1], [True])], r"value\[0\]: a masked array"),
    ],
)
def test_refusals_name_the_path(value: Any, said: str) -> None:
    path = ("value",)
    with pytest.raises(UnsupportedError, match=said):
        residue.encode(
            value, leaf=lambda v: array_leaf(v) if isinstance(v, np.ndarray) else None, add_tensor=lambda *_: "", path=path
        )


def test_what_contains_itself_is_refused() -> None:
    wide: list[Any] = []
    wide += [wide, wide]
    with pytest.raises(UnsupportedError, match="contains itself"):
        there_and_back(wide)


@pytest.mark.parametrize(
    "data",
    [
        {"$unknown": 1},
        {"$float": "1.0"},
        {"$float": 1},
        {"$complex": [1]},
        {"$complex": [10**400, 0]},
        {"$complex": ["1", "2"]},
        {"$tuple": "ab"},
        {"$dict": ["ab"]},
        {"$set": {"a": 1}},
        {"$tuple": [], "$set": []},
        {"$bytes": "?"},
        {"$bytes": "é"},
        {"$bytes": 5},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$dict": 7},
        {"$tuple": None},
        {"$set": [[]]},
        {"$deque": [1]},
        {"$deque": [], "maxlen": -1},
        {"$deque": [], "maxlen": 2**70},
        {"$deque": [], "maxlen": "x"},
        {"$tensor": "absent", "kind": "numpy"},
        {"$tensor": ["list"], "kind": "numpy"},
        {"$tensor": "there"},
        {"$constant": 1},
    ],
)
def test_what_is_no_residue_is_corrupt(data: Any) -> None:
    known = {"there": 1}
    decoders = residue.Decoders(tensor=lambda name, kind: known[name], constant=lambda value, kind: value)
    with pytest.raises(CorruptError, match="native residue holds"):
        residue.decode([data], decoders)


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"k": value}, lambda value: (value,)])
def test_a_hundred_levels_are_walked_and_one_more_is_refused(wrap: Any) -> None:
    tree: Any = 1
    for _ in range(residue.MAX_DEPTH):
        tree = wrap(tree)
    ((path, leaf),) = residue.walk(tree)
    assert (len(path), leaf) == (residue.MAX_DEPTH, 1)
    with pytest.raises(UnsupportedError, match="nested deeper than 100 levels"):
        list(residue.walk(wrap(tree)))
