from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import tempfile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

import polyckpt
from polyckpt.dtypes import DTYPES
from polyckpt.errors import CorruptError, StorageError, UnsupportedError
from polyckpt.leaves import Leaf, array_leaf
from polyckpt.storage import tensor_file
from polyckpt.storage.tensor_file import TensorFileReader
from tests.sealing import edit, restate, save_small, write_arrays

READABLE_BY_SAFETENSORS = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"} | {
    "float16",
    "float32",
    "float64",
}


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any bits of any element type in any memory layout, with few elements."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))].numpy
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    if dtype.kind == "b" or dtype.name.startswith(("int2", "int4", "uint2", "uint4")):
        raw = raw & 1  # other bytes are no values of these
    array = raw.copy().view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["c", "fortran", "transposed", "reversed", "strided", "broadcast", "big-endian"]))
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "transposed":
        return array.T
    if layout == "reversed" and shape:
        return array[tuple(slice(None, None, -1) for _ in shape)]
    if layout == "strided":
        return np.repeat(array, 2, axis=0)[::2] if shape else array
    if layout == "broadcast":
        return np.broadcast_to(array, (3, *shape))
    if layout == "big-endian" and dtype.kind in "iufc" and dtype.isbuiltin == 1:
        return array.astype(dtype.newbyteorder(">"))
    return array


def native(array: np.ndarray) -> np.ndarray:
    """The same values, C-ordered and little-endian."""
    return np.array(array, dtype=array.dtype.newbyteorder("=") if array.dtype.byteorder == ">" else None, order="C")


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), arrays(), max_size=5))
def test_round_trip_of_every_type_and_layout(given_arrays: dict[str, np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = polyckpt.save(Path(directory) / "c", {"w": np.zeros(1), **{f"m{k}": v for k, v in given_arrays.items()}})
        read = polyckpt.inspect(path)
        with safe_open(path / "weights.safetensors", "np") as other:
            from polyckpt.names import join

            for key, array in given_arrays.items():
                name, expected = join([f"m{key}"]), native(array)
                found = read.weights[name]
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert found.tobytes() == expected.tobytes()
                stored_under = read.manifest.model.aliases.get(name, name)
                assert stored_under in other.keys()  # noqa: SIM118 (not a mapping)
                if expected.dtype.name in READABLE_BY_SAFETENSORS:
                    assert other.get_tensor(stored_under).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_is_aligned_and_opens_with_the_safetensors_package(name: str, tmp_path: Path) -> None:
    array = np.ones((3, 5), DTYPES[name].numpy)
    write_arrays(tmp_path / "x.safetensors", {"pad": np.ones(3, np.int8), "x": array, "wide": np.ones(1, np.complex128)})
    reader = TensorFileReader(tmp_path, "x.safetensors")
    assert reader.raw("x").tobytes() == array.tobytes()
    for key, entry in reader.entries.items():
        data = reader.raw(key)
        assert data.ctypes.data % (data.size // int(np.prod(entry.shape))) == 0
    assert min(reader.raw(key).ctypes.data for key in reader.entries) % tensor_file.ALIGNMENT_BYTES == 0
    with safe_open(tmp_path / "x.safetensors", "np") as other:
        assert set(other.keys()) == {"pad", "x", "wide"}
        assert tuple(other.get_slice("x").get_shape()) == DTYPES[name].stored_shape((3, 5))


def test_writing_to_a_read_array_changes_no_file(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    checkpoint = polyckpt.inspect(path)
    checkpoint.weights["w"][:] = 5
    assert (polyckpt.inspect(path).weights["w"] == 1).all()


def test_more_than_two_gib(tmp_path: Path) -> None:
    size = (1 << 31) + (1 << 20) + 3
    path = tmp_path / "big"
    array = np.zeros(size, np.uint8)
    marks = np.random.default_rng(0).integers(1, 255, 100, np.uint8)
    array[:100] = array[-100:] = marks
    array[(1 << 31) - 50 : (1 << 31) + 50] = marks
    polyckpt.save(path, {"w": array})
    del array
    read = polyckpt.inspect(path).weights["w"]
    assert read.size == size
    for part in (read[:100], read[-100:], read[(1 << 31) - 50 : (1 << 31) + 50]):
        assert (part == marks).all()
    assert np.count_nonzero(read) == 300
    (path / "weights.safetensors").unlink()


# Hostile files


def hostile(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(code: Any = "I8", shape: Any = (4,), start: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": code, "shape": shape, "data_offsets": [start, end]}


HEADERS: list[Any] = [
    b"",
    b" ",
    b"[]",
    b"null",
    b"{",
    b'{"a": 1}',
    b"\xff\xfe",
    b'{"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}} x',
    b'{"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}, "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "I8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    {},  # four bytes that no tensor has
    {"__metadata__": {}},
    {"a": {}},
    {"a": entry(code="X9")},
    {"a": entry(code=["I8"])},
    {"a": entry(code=None)},
    {"a": entry(shape=None)},
    {"a": entry(shape=["4"])},
    {"a": entry(shape=[4.0])},
    {"a": entry(shape=[True, 4])},
    {"a": entry(shape=[-4])},
    {"a": entry(shape=[-2, -2])},
    {"a": entry(shape=[2**63])},
    {"a": entry(shape=[2**32, 2**32])},
    {"a": entry(shape=[2**62, 2**2, 0], end=0)},
    {"a": entry(code="F64", shape=[2**61], end=2**64)},
    {"a": entry(shape=[2**62] * 300_000)},
    {"a": entry(shape=[1] * 65 + [4])},
    {"a": entry(end=5), "b": entry(start=5, end=9)},
    {"a": entry(end=3)},
    {"a": entry(start=4, end=0)},
    {"a": entry(start=-4, end=0)},
    {"a": entry(start="0")},
    {"a": {**entry(), "data_offsets": [0, 4, 8]}},
    {"a": {**entry(), "data_offsets": 4}},
    {"a": entry(), "b": entry()},
    {"a": entry(), "b": entry(shape=[2], start=2, end=4)},
    {"a": entry(shape=[1], end=1), "b": entry(shape=[2], start=2, end=4)},
    {"a": entry(shape=[3], start=1)},
    {"a": entry(shape=[3], end=3)},
    {"a": entry(), "b": entry(start=2**63, end=2**63 + 4)},
    {"a": entry(start=2**64, end=2**64 + 4)},
    {"a": entry(start=10**4299 - 25, end=10**4299 - 21)},  # with the header's length one digit more than Python prints
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: str(header)[:60])
def test_hostile_headers_are_corrupt(header: Any, tmp_path: Path) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    hostile(tmp_path / "x.safetensors", text, b"\1\2\3\4")
    with pytest.raises(CorruptError, match=r"x\.safetensors"):
        TensorFileReader(tmp_path, "x.safetensors")


@pytest.mark.parametrize("length", [0, 61, 65, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 9, (1 << 64) - 1, 100_000_001])
def test_hostile_header_lengths_are_corrupt(length: int, tmp_path: Path) -> None:
    text = json.dumps({"a": entry()}).encode()
    hostile(tmp_path / "x.safetensors", text, b"\1\2\3\4", length=length)
    with pytest.raises(CorruptError):
        TensorFileReader(tmp_path, "x.safetensors")
    hostile(tmp_path / "x.safetensors", text, b"\1\2\3\4")
    assert TensorFileReader(tmp_path, "x.safetensors").raw("a").tobytes() == b"\1\2\3\4"


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    data = (path / "weights.safetensors").read_bytes()
    for changed in [*(data[:length] for length in range(len(data))), data + b"\0"]:
        (path / "weights.safetensors").write_bytes(changed)
        with pytest.raises(CorruptError, match=rf"{len(changed)} bytes, but the manifest says {len(data)}"):
            polyckpt.inspect(path)
        with pytest.raises(CorruptError):
            TensorFileReader(path, "weights.safetensors")


def test_every_flipped_byte_is_refused_on_load_before_anything_is_written(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    for file in ("weights", "optimizer", "state"):
        data = (path / f"{file}.safetensors").read_bytes()
        # The random states of the run are long: every byte of the header and one of each kind of the rest is enough.
        positions = range(len(data)) if len(data) < 2000 else [*range(600), *range(600, len(data), 97), len(data) - 1]
        for position in positions:
            changed = bytearray(data)
            changed[position] ^= 1 << (position % 8)
            (path / f"{file}.safetensors").write_bytes(changed)
            generator = np.random.default_rng(1)
            before = (np.random.get_state()[1].tobytes(), generator.bit_generator.state)
            with pytest.raises(CorruptError, match=rf"{file}\.safetensors"):
                polyckpt.load(path, {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2)}, {"m": np.zeros(3)})
            assert (np.random.get_state()[1].tobytes(), generator.bit_generator.state) == before
        (path / f"{file}.safetensors").write_bytes(data)
    polyckpt.inspect(path).verify()


@pytest.mark.parametrize("what", ["fifo", "directory", "missing", "loop", "device"])
def test_what_is_no_regular_file_is_refused_at_once(what: str, tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    file = path / "weights.safetensors"
    file.unlink()
    if what == "fifo":
        os.mkfifo(file)
    elif what == "directory":
        file.mkdir()
    elif what == "loop":
        file.symlink_to(file)
    elif what == "device":
        file.symlink_to("/dev/zero")
    with pytest.raises(StorageError if what == "loop" else CorruptError, match=r"weights\.safetensors"):
        polyckpt.inspect(path)


def test_a_link_to_the_same_bytes_is_followed(tmp_path: Path) -> None:
    # Caches of model hubs are directories of links; size and checksums bind what they point to.
    path = save_small(tmp_path / "c")
    (path / "weights.safetensors").rename(tmp_path / "blob")
    (path / "weights.safetensors").symlink_to(tmp_path / "blob")
    polyckpt.inspect(path).verify()


def test_header_that_contradicts_the_manifest_is_refused(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(CorruptError, match="header has checksum"):
        polyckpt.inspect(path)
    restate(path, "weights.safetensors")
    with pytest.raises(CorruptError, match=r"w: the manifest says F32\[3, 2\], the file has I32\[3, 2\]"):
        polyckpt.inspect(path, verify=False).weights["w"]
    edit(path, lambda raw: raw["tensors"]["weights"]["w"]["chunks"][0].update(key="absent"))
    with pytest.raises(CorruptError, match=r"absent: the manifest says F32\[3, 2\], the file has nothing"):
        polyckpt.inspect(path).weights["w"]


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_not_loaded_need_not_be_right(verify: bool, tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    edit(path, lambda raw: raw["tensors"]["optimizer"]["tree/m"]["chunks"][0].update(key="absent"))
    model = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2)}
    assert polyckpt.load(path, model, False, verify=verify).model["w"].any()
    with pytest.raises(CorruptError, match="absent: the manifest says"):
        polyckpt.load(path, model, {"m": np.zeros(3)}, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_nothing_is_loaded_where_a_header_contradicts_the_manifest(verify: bool, tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))

    path = polyckpt.save(tmp_path / "c", model())
    edit(path, lambda raw: raw["tensors"]["weights"]["1.weight"]["chunks"][0].update(key="1.bias"))
    edit(path, lambda raw: raw["tensors"]["weights"]["1.bias"]["chunks"][0].update(key="1.weight"))
    fresh = model()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CorruptError, match=r"the manifest says F32\[4, 2\], the file has F32\[4\]"):
        polyckpt.load(path, fresh, verify=verify)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


# Refusals of the writer


def test_nothing_is_written_for_what_has_no_place(tmp_path: Path) -> None:
    good = array_leaf(np.ones(2))
    bad = Leaf("float128", (1,), lambda: np.ones(1, np.longdouble))
    for leaves, said in (
        ({"good": good, "bad": bad}, "bad: element type 'float128'"),
        ({"__metadata__": good}, "reserves"),
        ({"\ud800": good}, "not valid Unicode"),
        ({"good": good, "bad": Leaf("float32", (0, 1 << 62), lambda: np.ones(0))}, "bad: .* too large to address"),
        ({"good": good, "bad": array_leaf(np.ones((1,) * 64, np.complex128))}, "bad: its shape has 65 axes"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            tensor_file.write(tmp_path / "x.safetensors", leaves, {})
        assert not list(tmp_path.iterdir())


def test_a_shape_of_other_numbers_changes_no_file_of_others(tmp_path: Path) -> None:
    for size in (np.int64(7), 7.0):
        with contextlib.suppress(TypeError, polyckpt.PolyckptError):
            leaf = Leaf("float32", (size, 3), lambda: np.ones((7, 3), np.float32))
            tensor_file.write(tmp_path / f"{type(size)}", {"w": leaf}, {})
        tensor_file.write(tmp_path / f"{size!r}", {"w": array_leaf(np.ones((7, 3), np.float32))}, MappingProxyType({"a": "b"}))
        assert TensorFileReader(tmp_path, f"{size!r}").raw("w").size == 84


@pytest.mark.parametrize("read", [lambda: np.ones(3), lambda: np.ones((2, 2)).T[:1]])
def test_a_leaf_that_reads_otherwise_than_it_said_is_refused(read: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="reading it gave"):
        tensor_file.write(tmp_path / "x.safetensors", {"w": Leaf("float64", (2,), read)}, {})


def test_reserved_names_are_kept_apart(tmp_path: Path) -> None:
    from polyckpt.sections import _key

    taken = dict.fromkeys(["__metadata__", "__metadata__~", "__metadata__~~", "x"])
    keys = [_key(name, taken) for name in taken]
    assert len(set(keys)) == 4
    assert "__metadata__" not in keys
    path = polyckpt.save(tmp_path / "c", {"__metadata__": np.ones(2), "": np.zeros(3)})
    assert (polyckpt.load(path, {"__metadata__": np.zeros(2), "": np.ones(3)}).model["__metadata__"] == 1).all()


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(StorageError) as caught:
        write_arrays(tmp_path / "x.safetensors", {"w": np.ones(1)})
    assert caught.value.errno == errno.EEXIST
    assert (tmp_path / "x.safetensors").read_text() == "mine"


def test_bfloat16_bits(tmp_path: Path) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)  # all NaN payloads among them
    path = polyckpt.save(tmp_path / "c", {"w": every})
    assert polyckpt.load(path, {"w": np.zeros_like(every)}).model["w"].view(np.uint16).tolist() == list(range(1 << 16))
