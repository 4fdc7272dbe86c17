"""Archives of numpy.savez are read and written exactly, and none of what they may hold does harm."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

import polyckpt
from polyckpt.errors import CorruptError, MismatchError, NotACheckpointError, PolyckptError, UnsupportedError
from tests.formats.jax_runs import BATCH, Net, outputs, same, state
from tests.sealing import run_python

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "layer/kernel": RANDOM.standard_normal((5, 3)).astype("float32"),
    "layer/bias": np.arange(3, dtype="int64"),
    "columns": np.asfortranarray(RANDOM.standard_normal((4, 3))),
    "big": RANDOM.standard_normal((2, 3)).astype(">f8"),
    "strided": RANDOM.standard_normal((6, 4)).astype("float16")[::2, 1:3],
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 4), "uint8"),
    "flags": np.array([True, False]),
    "complex": RANDOM.standard_normal(3).astype("complex64"),
}


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    request.param(tmp_path / "arrays.npz", **ARRAYS)
    return tmp_path / "arrays.npz"


def test_every_array_is_read(file: Path) -> None:
    found = polyckpt.open(file).weights
    assert found.keys() == ARRAYS.keys()
    for name, array in found.items():
        wanted = np.asarray(ARRAYS[name])
        native = wanted.astype(wanted.dtype.newbyteorder("="))
        assert (array.dtype, array.shape, array.tobytes()) == (native.dtype, native.shape, native.tobytes()), name
    loaded = polyckpt.load(file, {name: np.zeros_like(array) for name, array in ARRAYS.items() if name != "big"}, strict=False)
    assert np.array_equal(loaded.model["columns"], ARRAYS["columns"])


@pytest.mark.parametrize("separator", ["/", "."])
def test_names_of_a_nested_dict_are_those_of_the_tree(tmp_path: Path, separator: str) -> None:
    one = state(0)
    np.savez(tmp_path / "params.npz", **flatten_dict(one.params, sep=separator))
    assert same(polyckpt.load(tmp_path / "params.npz", state(1).params).model, one.params)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    polyckpt.load(tmp_path / "params.npz", model, like=state(1).params, accept={"names and order"})
    assert np.allclose(model(torch.tensor(BATCH)).detach().numpy(), outputs(one), atol=1e-6)
    other = Net().init(jax.random.key(0), np.ones((1, 6)))["params"]
    with pytest.raises(MismatchError, match="Dense_0"):
        polyckpt.open(tmp_path / "params.npz", like=other)


def test_numpy_reads_what_is_exported(tmp_path: Path) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in ARRAYS.items() if name != "big"}
    path = polyckpt.save(tmp_path / "run", arrays)
    polyckpt.export(path, tmp_path / "out.npz")
    np.savez(tmp_path / "expected.npz", **arrays)
    code = """
import sys
sys.modules["polyckpt"] = None
import numpy as np
found, expected = (np.load(path, allow_pickle=False) for path in sys.argv[1:])
names = {name.replace("/", "~1") for name in expected.files}
assert set(found.files) == names, set(found.files) ^ names
for name in expected.files:
    one, other = found[name.replace("/", "~1")], expected[name]
    assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), name
"""
    done = run_python(code, tmp_path / "out.npz", tmp_path / "expected.npz")
    assert done.returncode == 0, done.stderr
    assert polyckpt.open(tmp_path / "out.npz").weights["flags"].tolist() == [True, False]


def test_types_that_numpy_lacks_are_refused_by_name(tmp_path: Path) -> None:
    half = jax.numpy.ones((2, 3), jax.numpy.bfloat16)
    path = polyckpt.save(tmp_path / "run", {"half": half})
    with pytest.raises(UnsupportedError, match=r"half: \.npz cannot hold"):
        polyckpt.export(path, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()
    np.savez(tmp_path / "in.npz", half=half)
    with pytest.raises(UnsupportedError, match=r"half.*bfloat16"):
        polyckpt.open(tmp_path / "in.npz")


def test_arrays_of_objects_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    canary = tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> Any:
            return canary.touch, ()

    np.savez(tmp_path / "bad.npz", w=np.ones(3), objects=np.array([Runs()], object), allow_pickle=True)
    with pytest.raises(UnsupportedError, match="objects: an array of Python objects"):
        polyckpt.open(tmp_path / "bad.npz")
    assert not canary.exists()
    np.load(tmp_path / "bad.npz", allow_pickle=True)["objects"]
    assert canary.exists()  # it would have


def archive(path: Path, shape: tuple[int, ...], data: bytes, compression: int = zipfile.ZIP_DEFLATED) -> tuple[Path, int]:
    """An archive of one array that says it has this shape, and the size of its entry."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", compression) as written:
        written.writestr("w.npy", head.getvalue() + data)
    return path, len(head.getvalue()) + len(data)


def restate(path: Path, size: int, claimed: int) -> None:
    """Have an archive claim another size of its entry."""
    data = path.read_bytes()
    assert data.count(struct.pack("<I", size)) >= 2
    path.write_bytes(data.replace(struct.pack("<I", size), struct.pack("<I", claimed)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "compressed"])
@pytest.mark.parametrize("claims_more", [False, True], ids=["less", "more"])
def test_an_entry_that_lies_about_its_size_is_caught(tmp_path: Path, compression: int, claims_more: bool) -> None:
    held, claimed = (100, 1 << 28) if claims_more else (1000, 100)
    path, size = archive(tmp_path / "lies.npz", (claimed,), bytes(4 * held), compression)
    restate(path, size, size + 4 * (claimed - held))
    with pytest.raises(CorruptError, match=r"lies\.npz: w: ."):
        polyckpt.open(path).weights["w"]


def test_nothing_is_unpacked_before_it_is_read(tmp_path: Path) -> None:
    """Two megabytes that unpack to 256."""
    fast = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 1}
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", **fast) as written, written.open("w.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "<f4", "fortran_order": False, "shape": (1 << 26,)})
        for _ in range(16):
            entry.write(bytes(1 << 24))
    assert (tmp_path / "bomb.npz").stat().st_size < 2 << 20
    code = """
import re, sys
import polyckpt
opened = polyckpt.open(sys.argv[1])
assert opened.weights.stored["w"].shape == (1 << 26,)
assert int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) < 200 << 10
"""
    done = run_python(code, tmp_path / "bomb.npz")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(-2, -3), (1 << 40,), (1,) * 65, (7,)], ids=range(4))
def test_a_shape_that_is_none_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path, _ = archive(tmp_path / "bad.npz", shape, bytes(24))
    with pytest.raises(CorruptError, match=r"bad\.npz: w: "):
        polyckpt.open(path)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path, _ = archive(tmp_path / "twice.npz", (2,), bytes(8))
    with zipfile.ZipFile(path) as first:
        data = first.read("w.npy")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as again:
        again.writestr("w.npy", data)
    with pytest.raises(CorruptError, match="twice"):
        polyckpt.open(path)


def test_a_part_of_a_file_is_refused_and_no_wrong_value_is_read(file: Path) -> None:
    data, chosen = file.read_bytes(), random.Random(0)
    for length in [*range(0, 64, 4), *chosen.sample(range(64, len(data)), 60)]:
        file.write_bytes(data[:length])
        with pytest.raises((CorruptError, NotACheckpointError)):
            polyckpt.open(file)
    wanted = {name: np.asarray(array) for name, array in ARRAYS.items()}
    refused = 0
    for _ in range(500):
        changed = bytearray(data)
        changed[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        file.write_bytes(changed)
        try:
            found = dict(polyckpt.open(file).weights)
        except PolyckptError:
            refused += 1
        else:  # in what says when it was written, and with what
            assert found.keys() == wanted.keys()
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert refused > 300
