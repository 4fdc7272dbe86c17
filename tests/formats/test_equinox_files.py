"""Files of eqx.tree_serialise_leaves are read by a live model, which alone knows their names; Equinox reads what we write."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import polyckpt
from polyckpt.errors import CorruptError, MismatchError, NotACheckpointError, PolyckptError, UnsupportedError
from tests.formats.jax_runs import BATCH, same
from tests.sealing import run_python


class Net(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    table: Any
    half: jax.Array
    count: int
    rate: float
    flag: bool
    name: str = eqx.field(static=True)

    def __init__(self, seed: int, *, width: int = 7, count: Any = None) -> None:
        one, two = jax.random.split(jax.random.key(seed))
        self.first, self.last = eqx.nn.Linear(5, width, key=one), eqx.nn.Linear(width, 3, key=two)
        # As those are who come from other programs: column by column, and of the other order of bytes.
        table = np.random.default_rng(seed).standard_normal((4, 3))
        self.table = {"columns": np.asfortranarray(table), "big": table.astype(">f4")}
        self.half = jax.random.normal(one, (2, 3), jnp.bfloat16)
        self.count, self.rate, self.flag = seed if count is None else count, seed / 4, bool(seed % 2)
        self.name = "net"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    eqx.tree_serialise_leaves(tmp_path / "net.eqx", Net(3))
    return tmp_path / "net.eqx"


def test_a_live_model_is_filled_as_equinox_fills_it(file: Path) -> None:
    loaded = polyckpt.load(file, Net(0)).model
    theirs = eqx.tree_deserialise_leaves(file, Net(0))
    assert loaded.table["big"].tolist() == theirs.table["big"].tolist() == Net(3).table["big"].tolist()
    for net in (theirs, Net(3)):
        net.table.pop("big")
        assert same(eqx.tree_at(lambda each: each.table, loaded, {"columns": loaded.table["columns"]}), net)
    assert (loaded.count, loaded.rate, loaded.flag) == (3, 0.75, True)
    assert [type(value) for value in (loaded.count, loaded.rate, loaded.flag)] == [int, float, bool]
    opened = polyckpt.open(file, like=Net(0))
    assert np.array_equal(opened.weights["first/weight"], Net(3).first.weight)


def test_without_a_model_it_is_refused(file: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"net\.eqx: its arrays have no names: pass like="):
        polyckpt.open(file)
    with pytest.raises(UnsupportedError, match="pass like="):
        polyckpt.load(file, torch.nn.Linear(5, 7))


def test_a_model_of_another_structure_is_refused_by_its_leaf(file: Path) -> None:
    for other, leaf in ((Net(0, width=8), "first/weight"), (Net(0, count=0.5), "count")):
        with pytest.raises(MismatchError) as raised:
            polyckpt.load(file, other)
        assert raised.value.problems[0].name == leaf
    assert "int64[], live object has float64[]" in str(raised.value)
    with pytest.raises(MismatchError, match="holds 10 arrays, the live model has 2"):
        polyckpt.load(file, Net(0).first)


def test_a_torch_module_takes_it_over(tmp_path: Path) -> None:
    mlp = eqx.nn.MLP(5, 3, 7, 1, key=jax.random.key(0))
    eqx.tree_serialise_leaves(tmp_path / "mlp.eqx", mlp)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    like = eqx.nn.MLP(5, 3, 7, 1, key=jax.random.key(1))
    polyckpt.load(tmp_path / "mlp.eqx", model, like=like)
    assert np.allclose(model(torch.tensor(BATCH)).detach().numpy(), jax.vmap(mlp)(BATCH), atol=1e-6)


def test_equinox_reads_what_is_exported(tmp_path: Path) -> None:
    mlp = eqx.nn.MLP(5, 3, 7, 1, dtype=jnp.bfloat16, key=jax.random.key(0))
    path = polyckpt.save(tmp_path / "run", mlp)
    with pytest.raises(UnsupportedError, match="from a live model alone"):
        polyckpt.export(path, tmp_path / "mlp.eqx")
    assert not (tmp_path / "mlp.eqx").exists()
    polyckpt.export(path, tmp_path / "mlp.eqx", eqx.nn.MLP(5, 3, 7, 1, dtype=jnp.bfloat16, key=jax.random.key(1)))
    arrays = [np.asarray(leaf).view(np.uint16) for leaf in jax.tree.leaves(eqx.filter(mlp, eqx.is_array))]
    np.savez(tmp_path / "arrays.npz", *arrays)
    code = """
import sys
sys.modules["polyckpt"] = None
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
like = eqx.nn.MLP(5, 3, 7, 1, dtype=jnp.bfloat16, key=jax.random.key(2))
found = eqx.tree_deserialise_leaves(sys.argv[1], like)
leaves = jax.tree.leaves(eqx.filter(found, eqx.is_array))
expected = list(np.load(sys.argv[2]).values())
assert len(leaves) == len(expected) == 4
assert all(np.array_equal(np.asarray(a).view(np.uint16), b) for a, b in zip(leaves, expected))
"""
    done = run_python(code, tmp_path / "mlp.eqx", tmp_path / "arrays.npz")
    assert done.returncode == 0, done.stderr


def header(described: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(described).to_bytes(2, "little") + described.encode()


@pytest.mark.parametrize(
    "described",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 1)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,",
        "{'descr': '<U3', 'fortran_order': False, 'shape': (1,)}",
        "(" * 500,
        "",
    ],
    ids=range(7),
)
def test_what_equinox_does_not_write_is_refused(tmp_path: Path, described: str) -> None:
    (tmp_path / "bad.eqx").write_bytes(header(described) + bytes(12))
    with pytest.raises((CorruptError, UnsupportedError), match=r"bad\.eqx"):
        polyckpt.load(tmp_path / "bad.eqx", {"w": jnp.ones(1)})


def test_an_object_in_it_is_never_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> Any:
            return canary.touch, ()

    np.save(tmp_path / "bad.npy", np.array([Runs()], object), allow_pickle=True)
    (tmp_path / "bad.npy").rename(tmp_path / "bad.eqx")
    with pytest.raises(UnsupportedError, match="pickled"):
        polyckpt.load(tmp_path / "bad.eqx", {"w": jnp.ones(1)})
    assert not canary.exists()


def test_a_part_of_a_file_is_refused_and_changed_bytes_raise_errors_of_ours(file: Path) -> None:
    data, chosen, like = file.read_bytes(), random.Random(0), Net(0)
    for length in [*range(0, 128, 8), *chosen.sample(range(128, len(data)), 25)]:
        file.write_bytes(data[:length])
        with pytest.raises((CorruptError, NotACheckpointError, MismatchError)):
            polyckpt.open(file, like=like)
    for _ in range(150):
        changed = bytearray(data)
        changed[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        file.write_bytes(changed)
        try:
            polyckpt.open(file, like=like).verify()
        except PolyckptError as error:
            assert str(file) in str(error)
