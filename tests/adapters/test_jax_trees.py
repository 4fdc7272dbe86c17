"""Pytrees of JAX: every kind of leaf and container, names, keys, weak types, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest

import polyckpt
from polyckpt import UnsupportedError, manifest, registry
from tests.adapters.jax_values import JAX_DTYPES, Pair, bits, problems, random_array, round_trip, same
from tests.adapters.suite import check_description

# Leaves


@pytest.mark.parametrize("name", JAX_DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    tree = {"whole": random_array(name, (5, 3)), "scalar": random_array(name, ()), "empty": random_array(name, (0, 4))}
    assert len(set(bits(tree["whole"]))) > 1
    same(round_trip(tmp_path, tree, jax.eval_shape(lambda: tree)), tree)
    same(round_trip(tmp_path / "arrays", tree, jax.tree.map(jnp.zeros_like, tree)), tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    value: Any
    other: Any


@flax.struct.dataclass
class Struct:
    weight: Any
    label: str = flax.struct.field(pytree_node=False)


def _mixed(scale: int) -> dict[str, Any]:
    return {
        "pair": Pair(jnp.arange(3) * scale, None),
        "registered": Registered(jnp.ones((2, 1)) * scale, [jnp.float32(scale), optax.EmptyState()]),
        "struct": Struct(jnp.full((2,), 0.5 * scale), "label"),
        "numpy": np.arange(4.0) * scale,
        "numpy scalar": np.float64(scale),
        "python": (scale, 0.5 * scale, True, 1j * scale, f"text {scale}", None),
        "function": jnp.tanh,
    }


def test_containers_and_other_leaves_keep_their_types(tmp_path: Path) -> None:
    tree, template = _mixed(2), _mixed(5)
    same(round_trip(tmp_path, tree, template), tree)


@pytest.mark.parametrize(
    "tree",
    [
        Pair(jnp.ones(2), jnp.zeros(3)),
        Registered(jnp.ones(2), 3),
        Struct(jnp.ones(2), "x"),
        [jnp.ones(1), {"a": jnp.ones(2)}],
        jnp.ones((2, 3)),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_any_pytree_can_be_the_model(tmp_path: Path, tree: Any) -> None:
    same(round_trip(tmp_path, tree, jax.eval_shape(lambda: tree)), tree)
    check_description(polyckpt.inspect(tmp_path / "c"))


def test_trees_alike_in_their_keys_alone_are_each_described_by_what_they_hold(tmp_path: Path) -> None:
    for step, (label, shape, kind) in enumerate(
        [("a", (3, 5), "linear"), ("a", (2, 3, 5), "conv"), ("b", (2, 3, 5), "conv"), ("b", (3, 5), "linear")]
    ):
        tree = {"layer": Registered({"kernel": jnp.ones(shape), "bias": jnp.ones(5)}, label)}
        checkpoint = polyckpt.inspect(polyckpt.save(tmp_path / str(step), tree))
        assert [layer.kind for layer in checkpoint.manifest.model.layers] == [kind]
    layers = [{"kernel": jnp.ones((3, 5))}, {"kernel": jnp.ones((5, 2))}]
    for name, tree, order in (("dict", dict(zip("01", layers, strict=True)), "name"), ("list", layers, "definition")):
        assert polyckpt.inspect(polyckpt.save(tmp_path / name, tree)).manifest.model.order == order


def test_only_pytrees_are_recognised() -> None:
    adapter = registry.named("jax")
    assert adapter.recognises(Struct(jnp.ones(2), "x")) and adapter.recognises(Registered(1, 2))
    assert not adapter.recognises(object()) and not adapter.recognises(np.random.default_rng(0)) and not adapter.recognises(len)


def test_weak_types_survive_so_that_nothing_is_traced_again(tmp_path: Path) -> None:
    traced = []

    @jax.jit
    def step(tree: Any) -> Any:
        traced.append(1)
        return jax.tree.map(lambda leaf: leaf + 1, tree)

    state = {"step": 0, "rate": 0.5, "wide": jnp.full((2, 3), 1.5), "phase": 1j, "half": jnp.ones(2, jnp.bfloat16)}
    state = step(step(state))
    assert state["step"].weak_type and state["wide"].weak_type and not state["half"].weak_type
    restored = round_trip(tmp_path, state, jax.tree.map(jnp.zeros_like, state))
    same(restored, state)
    assert (restored["wide"].astype(jnp.float32) * jnp.ones(1, jnp.bfloat16)).dtype == jnp.float32
    assert (restored["rate"] * restored["half"]).dtype == jnp.bfloat16
    before = len(traced)
    step(restored)
    assert len(traced) == before


def test_a_python_number_and_what_jit_makes_of_it_are_one_counter(tmp_path: Path) -> None:
    w = jnp.ones(1)
    polyckpt.save(tmp_path / "array", {"step": jax.jit(lambda n: n + 7)(0), "w": w})
    polyckpt.save(tmp_path / "number", {"step": 7, "w": w})
    restored = polyckpt.load(tmp_path / "array", {"step": 0, "w": w}).model["step"]
    assert isinstance(restored, jax.Array) and restored.weak_type and int(restored) == 7
    assert polyckpt.load(tmp_path / "number", {"step": jnp.int32(0), "w": w}).model["step"] == 7
    assert problems(tmp_path / "array", {"step": 0.0, "w": w}) == {"step": "dtype"}
    assert problems(tmp_path / "number", {"step": jnp.zeros(2, int), "w": w}) == {"step": "dtype"}
    assert problems(tmp_path / "number", {"step": "7", "w": w}) == {"step": "dtype"}


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_and_raw_keys(tmp_path: Path, impl: str) -> None:
    tree = {"key": jax.random.key(3, impl=impl), "many": jax.random.split(jax.random.key(4, impl=impl), (2, 3))}
    tree["raw"] = jax.random.PRNGKey(5)
    restored = round_trip(tmp_path, tree, jax.eval_shape(lambda: tree))
    same(restored, tree)
    assert str(jax.random.key_impl(restored["key"])) == impl
    same(jax.random.normal(restored["many"][1, 2], (3,)), jax.random.normal(tree["many"][1, 2], (3,)))


def test_keys_of_another_generator_or_none_are_refused(tmp_path: Path) -> None:
    polyckpt.save(
        tmp_path / "c", {"key": jax.random.key(0), "raw": jax.random.PRNGKey(0), "many": jax.random.split(jax.random.key(0))}
    )
    template = {"key": jax.random.key(0, impl="rbg"), "raw": jax.random.key(0), "many": jax.random.split(jax.random.key(0), 3)}
    assert problems(tmp_path / "c", template) == {"key": "dtype", "raw": "dtype", "many": "shape"}
    template = {"key": jax.random.PRNGKey(0), "raw": jax.random.PRNGKey(0), "many": jax.random.split(jax.random.key(0))}
    with pytest.raises(polyckpt.MismatchError, match=r"key<threefry2x32> of uint32\[2\], live object has uint32\[2\]"):
        polyckpt.load(tmp_path / "c", template)


def test_one_array_under_two_names_is_stored_once_and_comes_back_as_one(tmp_path: Path) -> None:
    table = jnp.arange(6.0)
    path = polyckpt.save(tmp_path / "c", {"embed": table, "head": table, "other": table + 0})
    checkpoint = polyckpt.inspect(path)
    assert checkpoint.manifest.model.aliases == {"head": "embed"}
    restored = polyckpt.load(path, jax.eval_shape(lambda: {"embed": table, "head": table, "other": table})).model
    assert restored["embed"] is restored["head"] and restored["other"] is not restored["embed"]
    same(restored, {"embed": table, "head": table, "other": table})
    apart = polyckpt.load(path, {"embed": np.zeros(6, np.float32), "head": jnp.zeros(6), "other": jnp.zeros(6)}).model
    same(apart, {"embed": np.asarray(table), "head": table, "other": table})


def test_restored_arrays_share_no_memory_with_the_file(tmp_path: Path) -> None:
    trees = {f"a{index}": np.arange(64 + index, dtype=np.float32) for index in range(48)}
    path = polyckpt.save(tmp_path / "c", {name: jnp.asarray(array) for name, array in trees.items()})
    restored = polyckpt.load(path, jax.eval_shape(lambda: {name: jnp.asarray(array) for name, array in trees.items()})).model
    for file in path.glob("*.safetensors"):
        with file.open("r+b") as handle:  # in place, as no save ever writes: a map of the file would show it
            handle.write(bytes(file.stat().st_size))
    for name, array in trees.items():
        assert np.array_equal(restored[name], array), name


def test_small_arrays_are_placed_together_and_a_large_model_is_not_held_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(3, 5)] * 20 + [(257, 129)] * 20 + [(1031, 513), (5, 3)] * 2
    generator = np.random.default_rng(0)
    tree = {f"{index:02}": jnp.asarray(generator.standard_normal(shape, np.float32)) for index, shape in enumerate(shapes)}
    path = polyckpt.save(tmp_path / "c", tree)
    place, placed = jax.device_put, []

    def watched(hosts: list[np.ndarray], *places: Any) -> Any:
        placed.append([host.nbytes for host in hosts])
        return place(hosts, *places)

    monkeypatch.setattr(jax, "device_put", watched)
    same(polyckpt.load(path, jax.tree.map(jnp.zeros_like, tree)).model, tree)
    assert sum(map(len, placed)) == len(tree) > 4 * len(placed)
    assert max(sum(sizes[:-1]) for sizes in placed) < 1 << 20, "more than a megabyte beside the largest array"


# Names


def test_keys_with_separators_do_not_clash(tmp_path: Path) -> None:
    tree = {
        "a": {"b": jnp.zeros(2), "c/d": jnp.ones(3)},
        "a.b": jnp.ones(2),
        "a/b": jnp.full(2, 3.0),
        "a/c": {"d": jnp.zeros(1)},
    }
    same(round_trip(tmp_path, tree, jax.eval_shape(lambda: tree)), tree)
    assert set(polyckpt.inspect(tmp_path / "c").weights) == {"a/b", "a/c~1d", "a.b", "a~1b", "a~1c/d"}


def test_keys_that_differ_in_type_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="keys of one dict"):
        polyckpt.save(tmp_path / "c", {0: jnp.ones(1), "0": jnp.ones(1)})
    assert not (tmp_path / "c").exists()


# What cannot be saved


def test_templates_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"model: w: .*cannot be saved"):
        polyckpt.save(tmp_path / "c", {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_donated_arrays_are_named(tmp_path: Path) -> None:
    tree = {"layer": {"w": jnp.ones(3)}}
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)(tree)
    assert tree["layer"]["w"].is_deleted()
    with pytest.raises(UnsupportedError, match="model: layer/w: the array was deleted: it was donated"):
        polyckpt.save(tmp_path / "c", tree)


def test_a_donated_template_is_good_enough(tmp_path: Path) -> None:
    tree = {"w": jnp.arange(3.0)}
    polyckpt.save(tmp_path / "c", tree)
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)(tree)
    same(polyckpt.load(tmp_path / "c", tree).model, {"w": jnp.arange(3.0)})


def test_saving_and_loading_inside_jit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"model: w: a tracer .* under jit"):
        jax.jit(lambda tree: polyckpt.save(tmp_path / "c", tree))({"w": jnp.ones(2)})
    polyckpt.save(tmp_path / "c", {"w": jnp.ones(2)})
    with pytest.raises(UnsupportedError, match="w: a tracer"):
        jax.jit(lambda tree: polyckpt.load(tmp_path / "c", tree).model)({"w": jnp.ones(2)})


def test_objects_among_the_leaves_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"model: layer/thing: a builtins\.object cannot be stored"):
        polyckpt.save(tmp_path / "c", {"layer": {"thing": object(), "w": jnp.ones(1)}})
    with pytest.raises(UnsupportedError, match=r"model: dates: .*datetime64"):
        polyckpt.save(tmp_path / "c", {"dates": np.zeros(2, "datetime64[s]"), "w": jnp.ones(1)})


# What does not fit


def test_all_that_differs_is_in_one_error_and_strict_false_takes_the_rest(tmp_path: Path) -> None:
    saved = {"same": jnp.ones(2), "shape": jnp.ones((4, 4)), "dtype": jnp.ones(2), "gone": jnp.ones(1), "text": "a"}
    polyckpt.save(tmp_path / "c", saved)
    live = {
        "same": jnp.zeros(2),
        "shape": jnp.zeros((2, 8)),
        "dtype": jnp.zeros(2, jnp.bfloat16),
        "new": jax.ShapeDtypeStruct((3,), jnp.float32),
        "text": 5,
    }
    expected = {"shape": "shape", "dtype": "dtype", "gone": "unexpected", "new": "missing", "text": "dtype"}
    assert problems(tmp_path / "c", live) == expected
    restored = polyckpt.load(tmp_path / "c", live, strict=False)
    assert {problem.name: problem.kind for problem in restored.skipped} == expected
    assert float(restored.model["same"][0]) == 1 and restored.model["shape"] is live["shape"]
    assert restored.model["new"] is live["new"] and restored.model["text"] == 5


def test_a_checkpoint_of_another_framework_is_converted_but_not_rounded(tmp_path: Path) -> None:
    polyckpt.save(tmp_path / "c", {"w": np.array([1 / 3, 2.0])})
    with pytest.raises(polyckpt.MismatchError, match=r"float64.*cast=True"):
        polyckpt.load(tmp_path / "c", {"w": jnp.ones(2)})
    loaded = polyckpt.load(tmp_path / "c", {"w": jnp.ones(2)}, cast=True)
    assert loaded.model["w"].tolist() == [np.float32(1 / 3), 2.0]


def _rewrite(path: Path, native: dict[str, Any]) -> None:
    """The manifest with other native residue, its checksum included."""
    changed = msgspec.structs.replace(polyckpt.inspect(path).manifest, native=native)
    (path / "manifest.json").write_bytes(manifest.encode(changed))


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("model", {"values": 3}),
        ("model", {"weak": ["nothing"]}),
        ("model", {"keys": {"w": 5}}),
        ("model", {"values": {"w": 1}}),
        ("model", {"values": {"v": [1]}}),
        ("optimizer", {"prefix": 3}),
        ("optimizer", {"carried": 3}),
        ("optimizer", {"weak": None}),
        ("extra", {"tensors": {"left": 3}}),
    ],
)
def test_residue_that_is_not_of_the_format_is_named(tmp_path: Path, member: str, change: dict[str, Any]) -> None:
    pair = Pair(jnp.ones(2), None)
    path = polyckpt.save(tmp_path / "c", {"w": jnp.ones(2)}, {"m": jnp.ones(2)}, extra={"pair": pair})
    native = polyckpt.inspect(path).manifest.native
    part = native[member]
    {"model": part, "optimizer": part.get("state"), "extra": part.get("pair", {}).get("state")}[member].update(change)
    _rewrite(path, native)
    with pytest.raises(polyckpt.CorruptError, match="native residue"):
        polyckpt.load(path, {"w": jnp.ones(2)}, {"m": jnp.ones(2)}, extra={"pair": pair})


def test_a_key_of_an_unknown_generator_in_an_extra_is_named(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", {"w": jnp.ones(2)}, extra={"key": jax.random.key(0)})
    native = polyckpt.inspect(path).manifest.native
    native["extra"]["key"]["state"]["kind"] = "jax.key:unheard_of"
    _rewrite(path, native)
    with pytest.raises(UnsupportedError, match="unheard_of"):
        polyckpt.load(path, {"w": jnp.ones(2)})


@pytest.mark.parametrize("wrap", [lambda tree: {"k": tree}, lambda tree: [tree], lambda tree: Pair(tree, None)])
def test_a_hundred_levels_are_stored_and_one_more_is_refused(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    tree: Any = jnp.arange(3.0)
    for _ in range(100):
        tree = wrap(tree)
    same(round_trip(tmp_path, tree, jax.eval_shape(lambda: tree)), tree)
    with pytest.raises(UnsupportedError, match="nested deeper than 100 levels"):
        polyckpt.save(tmp_path / "deeper", wrap(tree))


def test_a_tree_that_contains_itself_is_refused(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"w": jnp.ones(2), "list": []}
    tree["list"].append(tree)
    with pytest.raises(UnsupportedError, match="contains itself"):
        polyckpt.save(tmp_path / "c", tree)
    with pytest.raises(UnsupportedError, match="contains itself"):
        polyckpt.save(tmp_path / "c", {"w": jnp.ones(2)}, extra={"tree": tree})


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", {"w": jnp.ones(64)})
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "weights.safetensors").write_bytes(data)
    with pytest.raises(polyckpt.CorruptError):
        polyckpt.load(path, {"w": jnp.zeros(64)})
