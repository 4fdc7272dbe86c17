from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyckpt.names import join, split

SEGMENTS = st.lists(st.text(alphabet=st.one_of(st.sampled_from("~/.012"), st.characters())), max_size=5)


@given(SEGMENTS)
def test_split_undoes_join(segments: list[str]) -> None:
    assert split(join(segments)) == segments


@given(SEGMENTS, SEGMENTS)
def test_different_paths_have_different_names(first: list[str], second: list[str]) -> None:
    assert (join(first) == join(second)) == (first == second)


@pytest.mark.parametrize(
    ("segments", "name"), [([], ""), ([""], "~2"), (["~2"], "~02"), (["a.b", "c"], "a.b/c"), ([0, "x"], "0/x"), (["~1"], "~01")]
)
def test_escapes(segments: list[object], name: str) -> None:
    assert join(segments) == name
