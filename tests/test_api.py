from __future__ import annotations

import collections
import math
import os
import random
import tempfile
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import polyckpt
from polyckpt import manifest
from polyckpt.errors import CorruptError, MismatchError, UnsupportedError
from polyckpt.storage import local
from tests.sealing import save_small

MODEL = {"w": np.ones((3, 2), np.float32), "b": np.ones(2)}


class Flaky:
    """State in a dict; refuses to load when told to."""

    def __init__(self, value: int = 0, refuses: bool = False) -> None:
        self.value, self.refuses = value, refuses

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.refuses:
            self.value = -1  # half done
            self.refuses = False
            raise RuntimeError("no thanks")
        self.value = state["value"]


class Stubborn(Flaky):
    """Refuses to load, and to go back."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise RuntimeError("never")


# Metrics, counts, learning rates


class Tensorish:
    """A scalar of a framework that has numpy() only."""

    def numpy(self) -> np.ndarray:
        return np.array(0.25, np.float32)


SCALARS = [
    (0.5, 0.5),
    (3, 3),
    (-(2**70), -(2**70)),
    (True, 1.0),
    (math.inf, math.inf),
    (-math.inf, -math.inf),
    (np.float64(0.1), 0.1),
    (np.float32(0.1), float(np.float32(0.1))),
    (np.float16(0.5), 0.5),
    (np.int8(-3), -3),
    (np.bool_(True), 1.0),
    (np.array(2.5), 2.5),
    (np.array([2.5]), 2.5),
    (Fraction(1, 4), 0.25),
    (Decimal("0.5"), 0.5),
    (Tensorish(), 0.25),
    (-0.0, -0.0),
    (5e-324, 5e-324),
]


@pytest.mark.parametrize(("given_value", "expected"), SCALARS, ids=lambda value: repr(value)[:20])
def test_metrics_of_every_kind(given_value: Any, expected: float, tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", MODEL, metrics={"m": given_value, "é/ ": 1}, lr=given_value)
    restored = polyckpt.load(path, MODEL)
    assert restored.metrics == {"m": expected, "é/ ": 1}
    assert repr(restored.metrics["m"]) == repr(expected)
    assert repr(restored.lr) == repr(expected)


def test_nan_is_a_metric(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", MODEL, metrics={"m": np.float32("nan")}, lr=[math.nan, 0.5])
    restored = polyckpt.load(path, MODEL)
    assert math.isnan(restored.metrics["m"])
    assert math.isnan(restored.lr[0])
    assert restored.lr[1] == 0.5


@pytest.mark.parametrize(
    "bad", ["0.5", b"1", [1], np.ones(2), None, 1j, {}, object(), 10**400, Fraction(10**400), np.array("1")]
)
def test_what_is_no_number_is_refused_by_name(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"metrics\['m'\].*is not one number"):
        polyckpt.save(tmp_path / "c", MODEL, metrics={"m": bad})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [1, None, b"x", ("a",), "\ud800"])
def test_names_are_text(name: Any, tmp_path: Path) -> None:
    for more in ({"metrics": {name: 1}}, {"extra": {name: 1}}):
        with pytest.raises(UnsupportedError, match="the name"):
            polyckpt.save(tmp_path / "c", MODEL, **more)


@pytest.mark.parametrize("what", ["epoch", "step", "batch"])
@pytest.mark.parametrize(
    "bad", [-1, 1.5, 2.0, "3", math.nan, [1], np.ones(2, int), 2**63, 10**5000], ids=lambda bad: type(bad).__name__
)
def test_bad_counts_are_refused_by_name(what: str, bad: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"^{what}: "):
        polyckpt.save(tmp_path / "c", MODEL, **{what: bad})
    assert os.listdir(tmp_path) == []


def test_counts_of_numpy(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", MODEL, epoch=np.int32(3), step=np.array(4), batch=0)
    restored = polyckpt.load(path, MODEL)
    assert (restored.epoch, restored.step, restored.batch) == (3, 4, 0)


# Round trips of trees


LEAVES = st.one_of(
    hnp.arrays(
        st.sampled_from(["float32", "float64", "int8", "bool", "complex64", "uint16", ">f4"]),
        hnp.array_shapes(min_dims=0, min_side=0),
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.none(),
)
KEYS = st.text(alphabet="ab./~é$ ", max_size=4)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3), st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


def blank(tree: Any) -> Any:
    """The same structure with other values."""
    if isinstance(tree, dict):
        return {key: blank(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(blank(child) for child in tree)
    return np.ones_like(tree) if isinstance(tree, np.ndarray) else 0


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.astype(a.dtype.newbyteorder("=")).tobytes() == b.tobytes()
    return type(a) is type(b) and repr(a) == repr(b)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=4), TREES)
def test_trees_come_back(model: dict[str, Any], optimizer: Any) -> None:
    model = {**model, "always": np.zeros(1)}
    with tempfile.TemporaryDirectory() as directory:
        path = polyckpt.save(Path(directory) / "c", model, optimizer, extra={"tree": optimizer})
        restored = polyckpt.load(path, blank(model), None if optimizer is None else blank(optimizer))
        assert same(model, restored.model)
        assert same(optimizer, restored.optimizer)
        assert same(optimizer, restored.extra["tree"])


Point = collections.namedtuple("Point", "x y")


def test_containers_keep_their_types(tmp_path: Path) -> None:
    model = {
        "n": Point(np.ones(1), [np.ones(2)]),
        "d": collections.defaultdict(list, {"k": np.ones(3)}),
        "o": collections.OrderedDict(b=np.ones(1), a=np.ones(1)),
    }
    path = polyckpt.save(tmp_path / "c", model)
    restored = polyckpt.load(path, model).model
    assert type(restored["n"]) is Point
    assert restored["d"].default_factory is list
    assert list(restored["o"]) == ["b", "a"]
    assert restored["o"] is not model["o"]


# Mismatches


def test_every_entry_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    path = save_small(tmp_path / "c")
    live = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32), "more": np.zeros(1)}
    before = np.random.get_state()[1].tobytes(), random.getstate(), generator.bit_generator.state
    with pytest.raises(MismatchError, match="6 entries; nothing was loaded") as caught:
        polyckpt.load(path, live, {"v": np.zeros(1)}, extra={"g": generator})
    found = {(problem.kind, problem.section, problem.name) for problem in caught.value.problems}
    assert found >= {("shape", "weights", "w"), ("dtype", "weights", "b"), ("missing", "weights", "more")}
    assert found >= {("missing", "optimizer", "v"), ("unexpected", "optimizer", "m"), ("missing", "extra", "g")}
    assert all(problem.name in str(caught.value) for problem in caught.value.problems)
    assert "float32[3, 2]" in str(caught.value)
    assert (np.random.get_state()[1].tobytes(), random.getstate(), generator.bit_generator.state) == before
    assert not live["w"].any()


def test_without_strict_what_fits_is_loaded_and_the_rest_reported(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    restored = polyckpt.load(path, {"w": np.zeros((3, 2), np.float32), "more": np.zeros(1)}, strict=False)
    assert (restored.model["w"] == 1).all()
    assert not restored.model["more"].any()
    assert {(problem.kind, problem.name) for problem in restored.skipped} == {("missing", "more"), ("unexpected", "b")}


def test_a_checkpoint_without_an_optimizer_says_so(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", MODEL)
    with pytest.raises(MismatchError, match="optimizer=False"):
        polyckpt.load(path, MODEL, {"m": np.zeros(3)})


# Extras


def test_extras_of_every_kind(tmp_path: Path) -> None:
    generators = {
        "python": random.Random(1),
        "legacy": np.random.RandomState(2),
        **{
            name: np.random.Generator(getattr(np.random, name)(3))
            for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
        },
    }
    draw = lambda g: g.random() if hasattr(g, "random") else g.random_sample()  # noqa: E731
    for generator in generators.values():
        draw(generator)
    value = {"list": [1, (2.5, None)], "array": np.arange(3), 4: {5}, "scalar": np.float32(0.5)}
    path = polyckpt.save(tmp_path / "c", MODEL, extra={**generators, "value": value, "state": Flaky(7)})
    expected = {name: [draw(generator) for _ in range(3)] for name, generator in generators.items()}
    state = Flaky()
    restored = polyckpt.load(path, MODEL, extra={**generators, "state": state})
    assert {name: [draw(generator) for _ in range(3)] for name, generator in generators.items()} == expected
    assert restored.extra["state"] is state
    assert state.value == 7
    assert restored.extra["value"]["list"] == value["list"]
    assert restored.extra["value"][4] == {5}
    assert type(restored.extra["value"]["scalar"]) is np.float32
    with pytest.raises(MismatchError, match="PCG64"):
        polyckpt.load(path, MODEL, extra={"PCG64": np.random.Generator(np.random.Philox(1))})


@pytest.mark.parametrize("last", [Flaky(refuses=True), Stubborn()], ids=["refuses", "cannot go back"])
def test_a_refused_extra_rolls_the_earlier_ones_back(last: Flaky, tmp_path: Path) -> None:
    saved = {"first": Flaky(1), "generator": random.Random(1), "last": type(last)(2)}
    path = polyckpt.save(tmp_path / "c", MODEL, {"m": np.ones(3)}, extra=saved)
    live: dict[str, Any] = {"first": Flaky(10), "generator": random.Random(2), "last": last}
    last.value = 20
    states = live["generator"].getstate(), random.getstate(), np.random.get_state()[1].tobytes()
    with pytest.raises(MismatchError, match=r"extra last: .*load_state_dict\(\) refused"):
        polyckpt.load(path, MODEL, {"m": np.zeros(3)}, extra=live)
    assert (live["first"].value, live["last"].value) == (10, 20)
    assert (live["generator"].getstate(), random.getstate(), np.random.get_state()[1].tobytes()) == states


def test_extras_of_another_class_are_refused(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", MODEL, extra={"a": Flaky(1), "g": random.Random(1)})
    with pytest.raises(MismatchError, match="Flaky"):
        polyckpt.load(path, MODEL, extra={"a": Stubborn()})
    with pytest.raises(MismatchError, match=r"python\.Random"):
        polyckpt.load(path, MODEL, extra={"g": np.random.default_rng(1)})


@pytest.mark.parametrize(
    "value", [lambda: 0, Flaky, len, object(), random.SystemRandom(), open, [object()], {1: np.array(["x"])}]
)
def test_extras_without_state_are_refused_by_name(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        polyckpt.save(tmp_path / "c", MODEL, extra={"bad": value})
    assert os.listdir(tmp_path) == []


def test_what_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: list[Any] = [np.ones(1)]
    loop += [loop, loop]
    for model, extra in ((MODEL, {"e": loop}), ({"w": loop}, {})):
        with pytest.raises(UnsupportedError, match="contains itself"):
            polyckpt.save(tmp_path / "c", model, extra=extra)


# Random states


def test_random_states_are_restored_last(tmp_path: Path) -> None:
    class Draws(Flaky):
        def load_state_dict(self, state: dict[str, int]) -> None:
            random.random(), np.random.rand()

    path = polyckpt.save(tmp_path / "c", MODEL, {"m": np.ones(1)}, extra={"d": Draws()})
    expected = random.random(), np.random.rand()
    polyckpt.load(path, MODEL, {"m": np.ones(1)}, extra={"d": Draws()})
    assert (random.random(), np.random.rand()) == expected


def test_weights_alone_leave_random_states_alone(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    states = random.getstate(), np.random.get_state()[1].tobytes()
    random.random(), np.random.rand()
    moved = random.getstate(), np.random.get_state()[1].tobytes()
    restored = polyckpt.load(path, MODEL)
    assert restored.optimizer is None
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == moved
    polyckpt.load(path, MODEL, rng=True)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states


def test_another_global_bit_generator_is_named(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", MODEL)
    original = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(MismatchError, match="rng: numpy: checkpoint has MT19937, live object has PCG64"):
            polyckpt.load(path, MODEL, rng=True)
        np.random.rand()
        other = polyckpt.save(tmp_path / "d", MODEL)
        expected = np.random.rand()
        polyckpt.load(other, MODEL, rng=True)
        assert np.random.rand() == expected
    finally:
        np.random.set_bit_generator(original)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    states = random.getstate(), np.random.get_state()[1].tobytes()
    save_small(tmp_path / "c")
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states


def test_a_model_that_no_adapter_knows(tmp_path: Path) -> None:
    for model in (object(), "model", 3, None, {}, []):
        with pytest.raises(polyckpt.AdapterError, match="no adapter handles"):
            polyckpt.save(tmp_path / "c", model)
    assert os.listdir(tmp_path) == []


def test_verify_false_reads_what_changed(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(data)
    with pytest.raises(CorruptError):
        polyckpt.load(path, MODEL)
    assert polyckpt.load(path, MODEL, verify=False).model["w"].shape == (3, 2)


def test_all_bytes_are_verified_before_anything_is_written(tmp_path: Path) -> None:
    class Counts(Flaky):
        calls = 0

        def load_state_dict(self, state: dict[str, int]) -> None:
            Counts.calls += 1

    path = polyckpt.save(tmp_path / "c", MODEL, {"m": np.ones(3)}, extra={"a": Counts()})
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=r"weights\.safetensors"):
        polyckpt.load(path, MODEL, {"m": np.zeros(3)}, extra={"a": Counts()})
    assert Counts.calls == 0


def test_a_manifest_that_no_reader_takes_is_refused_when_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = polyckpt.save(tmp_path / "c", MODEL, extra={"numbers": [1] * 9})
    limit = (path / "manifest.json").stat().st_size
    for module in (manifest, local):
        monkeypatch.setattr(module, "MAX_BYTES", limit)
    polyckpt.save(path, MODEL, extra={"numbers": [1] * 9}, overwrite=True)
    with pytest.raises(UnsupportedError, match=f"readers take at most {limit}"):
        polyckpt.save(path, MODEL, extra={"numbers": [1] * 10}, overwrite=True)
    assert polyckpt.load(path, MODEL).extra["numbers"] == [1] * 9
    assert [each.name for each in tmp_path.iterdir()] == ["c"]
