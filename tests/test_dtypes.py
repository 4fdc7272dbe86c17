from __future__ import annotations

import numpy as np
import pytest

from polyckpt.dtypes import DTYPES, MAX_AXES, lookup, size_problem
from polyckpt.errors import UnsupportedError
from polyckpt.storage.tensor_file import _STORED_ITEMSIZE


@pytest.mark.parametrize("name", DTYPES)
def test_names_sizes_and_codes_agree_with_numpy(name: str) -> None:
    row = DTYPES[name]
    assert row.numpy.name == name
    assert row.numpy.itemsize == row.itemsize
    assert _STORED_ITEMSIZE[row.stored_code] * int(np.prod(row.stored_suffix)) == row.itemsize


def test_unknown_name_is_refused_by_place() -> None:
    with pytest.raises(UnsupportedError, match=r"layer\.w: element type 'float128'"):
        lookup("float128", "layer.w")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((-1,), "negative"),
        ((1 << 63,), "too large"),
        ((0, 1 << 100), "too large"),
        ((1 << 32, 1 << 32), "too large"),
        ((1,) * (MAX_AXES + 1), "65 axes"),
        ((1 << 62,) * 1_000_000, "1000000 axes"),
        ((10**5000,), "too large"),
    ],
)
def test_absurd_shapes_are_named_cheaply(shape: tuple[int, ...], said: str) -> None:
    assert said in size_problem(shape, 4)


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (0, 1 << 40), (1,) * MAX_AXES, (1 << 60,)])
def test_real_shapes_have_no_problem(shape: tuple[int, ...]) -> None:
    assert size_problem(shape, 4) is None
    np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0,) * len(shape))  # NumPy can address it
