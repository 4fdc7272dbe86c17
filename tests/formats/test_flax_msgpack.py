"""MessagePack that flax.serialization wrote is read, filled into live objects and converted, and Flax reads what we write."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import torch
from flax import nnx, serialization
from flax.training import checkpoints

import polyckpt
from polyckpt.errors import CorruptError, NotACheckpointError, PolyckptError, UnsupportedError
from tests.cli.test_commands import run
from tests.formats import jax_runs
from tests.formats.jax_runs import module, same, state, trained
from tests.sealing import run_python

RUN = trained(state(0), 20)


def write(path: Path, tree: Any) -> Path:
    path.write_bytes(serialization.to_bytes(tree))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A train state."""
    return write(tmp_path / "state.msgpack", RUN)


def test_every_leaf_is_read_without_a_framework(file: Path, tmp_path: Path) -> None:
    jax_runs.write_expected(tmp_path / "expected.json", {str(file): jax_runs.expected(RUN, "params", "opt_state")})
    code = """
import json, sys
for name in ("jax", "flax", "optax", "orbax", "torch", "keras", "tensorflow", "msgpack"):
    sys.modules[name] = None
import polyckpt
(path, leaves), = json.load(open(sys.argv[1])).items()
opened = polyckpt.open(path)
stored = {**opened.weights.stored, **opened.optimizer.stored}
assert stored.keys() == leaves.keys(), stored.keys() ^ leaves.keys()
for name, (dtype, shape, data) in leaves.items():
    assert (stored[name].dtype, list(stored[name].shape), stored[name].raw().tobytes().hex()) == (dtype, shape, data), name
assert opened.manifest.progress.step == 20
"""
    done = run_python(code, tmp_path / "expected.json")
    assert done.returncode == 0, done.stderr


def test_training_goes_on_from_it(file: Path, tmp_path: Path) -> None:
    loaded = polyckpt.load(file, state(1))
    assert loaded.step == loaded.model.step == 20
    after = loaded.model.replace(step=RUN.step)
    assert same(after, RUN) and same(trained(after, 2), trained(RUN, 2))
    assert same(polyckpt.load(file, state(1).params).model, RUN.params)
    params = write(tmp_path / "params.msgpack", RUN.params)
    assert same(polyckpt.load(params, state(1).params).model, RUN.params)


def test_objects_of_nnx_are_filled(tmp_path: Path) -> None:
    model, optimizer = module(0)
    jax_runs.train(model, optimizer, 3)
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    write(tmp_path / "params.msgpack", parameters)
    other = nnx.Sequential(nnx.Linear(5, 7, rngs=nnx.Rngs(1)), jax.nn.relu, nnx.Linear(7, 3, rngs=nnx.Rngs(1)))
    polyckpt.load(tmp_path / "params.msgpack", other)
    assert same(nnx.to_pure_dict(nnx.state(other)), parameters)


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    tree = {
        "bfloat16": jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2),
        "complex": jnp.asarray([1 + 2j, 3 - 1j]),
        "flag": True,
        "integer": -3,
        "large": 1 << 63,
        "number": 2.5,
        "imaginary": 1 + 2j,
        "text": "of the run",
        "none": None,
        "scalar": np.float16(1.5),
        "empty": jnp.zeros((0, 4)),
        "parts": [jnp.ones(2), {"a/b": jnp.zeros((1, 3))}],
    }
    path = write(tmp_path / "values.msgpack", tree)
    blank = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else type(leaf)(), tree)
    loaded = polyckpt.load(path, blank).model
    assert {name: type(value) for name, value in loaded.items()} == {name: type(value) for name, value in tree.items()}
    assert loaded.pop("text") == tree.pop("text") and loaded["large"] == 1 << 63
    assert same(loaded, tree)


def test_arrays_that_flax_cuts_into_chunks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((50, 30)), jnp.float32), "b": jnp.ones(3, jnp.bfloat16)}
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 512)
    path = write(tmp_path / "large.msgpack", tree)
    assert path.read_bytes().count(b"__msgpack_chunked_array__") == 1
    loaded = polyckpt.load(path, jax.tree.map(jnp.zeros_like, tree)).model
    assert same(loaded, tree)


def test_a_checkpoint_of_flax_training_is_one(tmp_path: Path) -> None:
    flax.config.update("flax_use_orbax_checkpointing", False)
    try:
        for step in (10, 20):
            checkpoints.save_checkpoint(str(tmp_path / "run"), RUN.replace(step=step), step, keep=3)
    finally:
        flax.config.update("flax_use_orbax_checkpointing", True)
    loaded = polyckpt.load(tmp_path / "run" / "checkpoint_10", state(1))
    assert loaded.step == 10 and same(loaded.model.opt_state, RUN.opt_state)
    assert [line.split()[0] for line in run("verify", tmp_path / "run").stdout.splitlines()] == ["ok", "ok"]


def test_a_torch_module_takes_it_over(file: Path) -> None:
    model, optimizer = jax_runs.torch_net()
    polyckpt.load(file, model, optimizer, like=state(1))
    assert np.allclose(model(torch.tensor(jax_runs.BATCH)).detach().numpy(), jax_runs.outputs(RUN), atol=1e-6)
    moment = optimizer.state[model[2].weight]["exp_avg"].numpy()
    assert np.array_equal(moment.T, np.asarray(RUN.opt_state[0].mu["Dense_1"]["kernel"]))
    assert optimizer.state[model[2].weight]["step"] == 20


def test_flax_reads_what_is_exported(tmp_path: Path) -> None:
    values = {"a": {"bf": jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2)}, "b": jnp.float32(2.5)}
    polyckpt.export(polyckpt.save(tmp_path / "values", values), tmp_path / "values.msgpack")
    path = polyckpt.save(tmp_path / "run", RUN)
    polyckpt.export(path, tmp_path / "state.msgpack", state(1))
    bare = polyckpt.save(tmp_path / "bare", RUN.params, RUN.opt_state)
    polyckpt.export(bare, tmp_path / "pair.msgpack", state(1).params, state(1).opt_state)
    np.savez(tmp_path / "leaves.npz", *map(np.asarray, jax.tree.leaves((RUN.params, RUN.opt_state, RUN.step))))
    code = """
import sys
sys.modules["polyckpt"] = None
import jax, jax.numpy as jnp, numpy as np, optax
from flax import linen, serialization
from flax.training.train_state import TrainState
here = sys.argv[1]
def read(name):
    return open(f"{here}/{name}.msgpack", "rb").read()
values = serialization.msgpack_restore(read("values"))
assert values["a"]["bf"].dtype == jnp.bfloat16 and values["a"]["bf"].astype("float32").tolist() == [[0, 1], [2, 3], [4, 5]]
assert values["b"] == np.float32(2.5) and values["b"].dtype == np.float32
class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.Dense(7)(x))
params = Net().init(jax.random.key(1), jnp.ones((1, 5)))["params"]
blank = TrainState.create(apply_fn=None, params=params, tx=optax.adamw(1e-2))
whole = serialization.from_bytes(blank, read("state"))
pair = serialization.from_bytes({"model": blank.params, "optimizer": blank.opt_state}, read("pair"))
leaves = list(np.load(f"{here}/leaves.npz").values())
for tree in ((whole.params, whole.opt_state, whole.step), (pair["model"], pair["optimizer"], leaves[-1])):
    found = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    assert len(found) == len(leaves)
    assert all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(found, leaves)), found
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def extension(*members: Any, code: int = 1) -> Any:
    return msgpack.ExtType(code, msgpack.packb(members))


def chunked(**members: Any) -> dict[str, Any]:
    return {"__msgpack_chunked_array__": True, **members}


FLOATS, INTEGERS = extension((2,), "float32", b"12345678"), extension((2,), "int32", b"12345678")
BOMBS: dict[str, Any] = {
    "deep maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "deep arrays": b"\x81\xa1a" + b"\x91" * 1_000_000 + b"\xc0",
    "long array": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "long map": b"\x81\xa1a\xdf\xff\xff\xff\xff",
    "long bytes": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "long text": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "long extension": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01aa",
    "long shape": {"a": msgpack.ExtType(1, b"\x93\xdd\xff\xff\xff\xff")},
    "not a text": b"\x81\xa1a\xa3\xed\xa0\x80",
    "something after": msgpack.packb({"a": 1}) + b"more",
    "too few bytes": {"a": extension((3, 2), "float32", b"1234")},
    "negative": {"a": extension((-3, -2), "float32", b"1" * 24)},
    "huge and empty": {"a": extension((1 << 62, 0), "float32", b"")},
    "many axes": {"a": extension((1,) * 100, "float32", b"1234")},
    "objects": {"a": extension((1,), "object", b"12345678")},
    "another extension": {"a": msgpack.ExtType(9, b"")},
    "nothing in it": {"a": msgpack.ExtType(1, b"")},
    "chunks of nothing": {"a": chunked()},
    "too few chunks": {"a": chunked(shape={"0": 1 << 40}, chunks={"0": FLOATS})},
    "chunks of two types": {"a": chunked(shape={"0": 4}, chunks={"0": FLOATS, "1": INTEGERS})},
    "chunks that are none": {"a": chunked(shape={"0": 2}, chunks={"0": 3})},
    "keys alike": b"\x81\xa1a\x82\x01\x02\xa11\x03",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_flax_does_not_write_is_refused(tmp_path: Path, name: str) -> None:
    bomb = BOMBS[name]
    (tmp_path / "bomb.msgpack").write_bytes(bomb if isinstance(bomb, bytes) else msgpack.packb(bomb))
    with pytest.raises((CorruptError, UnsupportedError), match=r"bomb\.msgpack"):
        polyckpt.open(tmp_path / "bomb.msgpack")


def test_a_part_of_a_file_is_refused_and_changed_bytes_raise_errors_of_ours(file: Path) -> None:
    data, chosen = file.read_bytes(), random.Random(0)
    for length in [*range(40), *chosen.sample(range(40, len(data)), 60)]:
        file.write_bytes(data[:length])
        with pytest.raises((CorruptError, NotACheckpointError)):
            polyckpt.open(file)
    for _ in range(400):
        changed = bytearray(data)
        changed[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        file.write_bytes(changed)
        try:
            polyckpt.open(file).verify()
        except PolyckptError as error:
            assert str(file) in str(error)
