from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyckpt
from polyckpt.checkpoint import _Files
from polyckpt.errors import (
    CheckpointError,
    CorruptError,
    MismatchError,
    NotACheckpointError,
    PolyckptError,
    StorageError,
    UnsupportedError,
)
from polyckpt.storage import local
from tests.sealing import edit, members, restate, save_small, seal, write_arrays

TEMPLATE = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2)}
SLOTS = {"m": np.zeros(3)}


def test_sections_and_progress(tmp_path: Path) -> None:
    checkpoint = polyckpt.inspect(save_small(tmp_path / "c", epoch=2))
    assert {name: str(tensor) for name, tensor in checkpoint.weights.stored.items()} == {
        "w": "float32[3, 2]",
        "b": "float64[2]",
    }
    assert list(checkpoint.optimizer) == ["tree/m"]
    assert (checkpoint.manifest.progress.epoch, checkpoint.manifest.progress.step) == (2, 7)
    assert "by numpy, epoch 2, step 7, 2 weights" in repr(checkpoint)
    assert "w float32[3, 2]" in repr(checkpoint.weights)


def test_tied_arrays_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    shared = np.arange(6.0)
    path = polyckpt.save(tmp_path / "c", {"a": shared, "b": shared, "c": shared.copy(), "d": shared[:3]})
    checkpoint = polyckpt.inspect(path)
    assert checkpoint.manifest.model.aliases == {"b": "a"}
    assert list(checkpoint.manifest.tensors["weights"]) == ["a", "c", "d"]
    assert (checkpoint.weights["b"] == shared).all()
    restored = polyckpt.load(path, {name: np.zeros(3 if name == "d" else 6) for name in "abcd"}).model
    assert restored["a"] is restored["b"]
    assert restored["a"] is not restored["c"]


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    file = path / "weights.safetensors"
    size = 1 << 40  # a sparse file: a terabyte of zeros that nobody could read in time
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    entry = {"size_bytes": 8 + len(header) + size, "header_checksum": ""}
    try:
        os.truncate(file, entry["size_bytes"])
    except OSError:  # the file system is smaller than that
        size = 1 << 33
        header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        entry["size_bytes"] = 8 + len(header) + size
        os.truncate(file, entry["size_bytes"])
    from polyckpt.checksums import checksum

    entry["header_checksum"] = checksum(len(header).to_bytes(8, "little") + header)

    def change(raw: dict[str, Any]) -> None:
        raw["files"]["weights.safetensors"] = entry
        tensor = raw["tensors"]["weights"]["w"]
        tensor.update(dtype="uint8", shape=[size])
        tensor["chunks"][0].update(offset=[0], shape=[size])
        raw["tensors"]["weights"] = {"w": tensor}

    edit(path, change)
    checkpoint = polyckpt.inspect(path, verify=False)
    assert checkpoint.weights["w"].shape == (size,)
    assert checkpoint.weights["w"][-5:].tolist() == [0] * 5
    file.unlink()


@pytest.mark.parametrize("section", ["weights", "optimizer", "state"])
def test_every_tensor_is_verified_unless_told_not_to(section: str, tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    file = path / f"{section}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    checkpoint = polyckpt.inspect(path)
    found = getattr(checkpoint, section)
    failed = []
    for name in found:
        try:
            found[name]
        except CorruptError as error:
            failed.append((name, str(error)))
    assert len(failed) == 1
    name, message = failed[0]
    assert f"{file}: {name}: the manifest says xxh3-128:" in message
    with pytest.raises(CorruptError, match=re.escape(name)):
        checkpoint.verify()
    unverified = getattr(polyckpt.inspect(path, verify=False), section)
    assert {name: unverified[name].shape for name in unverified}.keys() == set(found)


# Several chunks in several files


def chunked(path: Path, whole: np.ndarray, boxes: list[tuple[tuple[int, int], ...]]) -> Path:
    """A checkpoint whose weight `w` lies in one file per box; a box is (start, stop) of each axis."""
    save_small(path)
    (path / "weights.safetensors").unlink()
    raw = members(path)
    raw["files"].pop("weights.safetensors")
    chunks = []
    for index, box in enumerate(boxes):
        part = whole[tuple(slice(*ends) for ends in box)]
        file = f"rank-{index}.safetensors"
        entry, sums = write_arrays(path / file, {"part": part})
        raw["files"][file] = {"size_bytes": entry.size_bytes, "header_checksum": entry.header_checksum}
        offset = [start for start, _ in box]
        chunks.append({"file": file, "key": "part", "offset": offset, "shape": list(part.shape), "checksum": sums["part"]})
    raw["tensors"]["weights"] = {"w": {"dtype": whole.dtype.name, "shape": list(whole.shape), "chunks": chunks}}
    (path / "manifest.json").write_bytes(seal(raw))
    return path


GRID = [((0, 2), (0, 3)), ((2, 5), (0, 3)), ((0, 5), (3, 3)), ((0, 5), (3, 4))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128", "int4"])
def test_chunks_are_put_together(dtype: str, tmp_path: Path) -> None:
    from polyckpt.dtypes import DTYPES

    whole = (np.arange(20) % 8).reshape(5, 4).astype(DTYPES[dtype].numpy)
    path = chunked(tmp_path / "c", whole, GRID)
    for verify in (True, False):
        read = polyckpt.inspect(path, verify=verify).weights["w"]
        assert read.dtype == whole.dtype
        assert read.tobytes() == whole.tobytes()
    loaded = polyckpt.load(path, {"w": np.zeros_like(whole)})
    assert loaded.model["w"].tobytes() == whole.tobytes()
    data = bytearray((path / "rank-1.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "rank-1.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=r"rank-1\.safetensors: w: the manifest says"):
        polyckpt.load(path, {"w": np.zeros_like(whole)})


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        (GRID[:2], "chunks hold 15 elements of 20"),
        ([*GRID, GRID[0]], "chunks hold 26 elements of 20"),
        ([((0, 5), (0, 2)), ((0, 5), (1, 3))], "chunks overlap"),
    ],
)
def test_chunks_that_do_not_cover_are_refused(boxes: Any, said: str, tmp_path: Path) -> None:
    path = chunked(tmp_path / "c", np.zeros((5, 4)), boxes)
    with pytest.raises(CorruptError, match=said):
        polyckpt.inspect(path)


def test_memory_is_not_taken_on_the_word_of_a_manifest(tmp_path: Path) -> None:
    path = chunked(tmp_path / "c", np.zeros((5, 4)), GRID[:1] + GRID[1:2])

    def inflate(raw: dict[str, Any]) -> None:
        tensor = raw["tensors"]["weights"]["w"]
        tensor["shape"] = [1 << 45, 4]
        for index, chunk in enumerate(tensor["chunks"]):
            chunk.update(offset=[index << 44, 0], shape=[1 << 44, 4])

    edit(path, inflate)
    for verify in (True, False):
        with pytest.raises(CorruptError, match="the file has F64"):
            polyckpt.inspect(path, verify=verify).weights["w"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", "w\0.safetensors"])
def test_no_file_outside_is_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_arrays(tmp_path / "x.safetensors", {"w": np.ones((3, 2), np.float32)})
    path = save_small(tmp_path / "c")

    def point(raw: dict[str, Any]) -> None:
        raw["files"][name] = raw["files"].pop("weights.safetensors")
        for tensor in raw["tensors"]["weights"].values():
            tensor["chunks"][0]["file"] = name

    edit(path, point)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda p, *a, **k: opened.append(str(p)) or real(p, *a, **k))
    with pytest.raises(CorruptError, match="not a plain name"):
        polyckpt.inspect(path)
    assert set(opened) == {str(path), str(path / "manifest.json")}, "the directory, for its lock, the manifest, nothing else"


# Fuzz: manifests that were changed and sealed again


ODD: list[Any] = [None, True, -1, 0, 1.5, 2**63, 2**200, "", "x", "../x", "__metadata__", "\0", [], {}, [[]], [None], {"a": 1}]
ODD += [{"$tuple": [1]}, {"$dict": [[1, 2]]}, {"$tensor": "x", "kind": 1}, {"$constant": [], "kind": "numpy.dtype"}, {"$": 0}]
ODD += [{"$constant": "O", "kind": "numpy.dtype"}, {"$constant": 1, "kind": "absent.kind"}, {"$float": "inf"}, ["a", 1]]


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree of JSON."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def mutate(raw: Any, place: tuple[Any, ...], how: str, value: Any, generator: random.Random) -> Any:
    if not place:
        return value
    parent = raw
    for key in place[:-1]:
        parent = parent[key]
    if how == "replace":
        parent[place[-1]] = value
    elif how == "delete":
        del parent[place[-1]]
    elif how == "swap":
        other = generator.choice(places(raw)[1:])
        source = raw
        for key in other:
            source = source[key]
        parent[place[-1]] = json.loads(json.dumps(source))
    elif isinstance(parent, dict):
        parent[f"{place[-1]}~"] = parent[place[-1]]
    else:
        parent.append(parent[place[-1]])
    return raw


class Stateful:
    def __init__(self) -> None:
        self.state = {"a": 1}

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state


def test_changed_manifests_never_raise_anything_else(tmp_path: Path) -> None:
    shared = np.ones(3)
    generator = np.random.default_rng(0)
    model = {"w": np.ones((3, 2), np.float32), "t": [shared, shared], "n": 3}
    extra = {"g": generator, "s": Stateful(), "v": {1: (np.ones(2), b"x", np.dtype("float16"), np.float32(1))}}
    path = polyckpt.save(tmp_path / "c", model, SLOTS, epoch=1, metrics={"l": float("nan")}, lr=0.1, extra=extra)
    original = (path / "manifest.json").read_bytes()
    raw = json.loads(original)
    rng = random.Random(0)
    every = [place for place in places(raw) if place[:1] != ("checksum",)]
    jobs = [(place, "replace", value) for place in every for value in rng.sample(ODD, 4)]
    jobs += [(place, how, None) for place in every for how in ("delete", "swap", "copy")]
    rng.shuffle(jobs)
    refused = 0
    np.random.seed(3)
    for place, how, value in jobs[:2500]:
        (path / "manifest.json").write_bytes(seal_any(mutate(json.loads(original), place, how, value, rng)))
        for strict in (True, False):
            states = np.random.get_state()[1].tobytes(), random.getstate()
            try:
                polyckpt.inspect(path).verify()
                polyckpt.load(path, model, SLOTS, extra={"g": generator, "s": Stateful()}, strict=strict, rng=True)
            except PolyckptError as error:
                refused += 1
                assert isinstance(error, CheckpointError | MismatchError | UnsupportedError | polyckpt.AdapterError), (
                    place,
                    how,
                    value,
                )
                assert (np.random.get_state()[1].tobytes(), random.getstate()) == states, (place, how, value)
            except Exception as error:
                raise AssertionError(f"{how} {place} {value!r} raised {type(error).__name__}: {error}") from error
    assert refused > 1000


def seal_any(raw: Any) -> bytes:
    return seal(raw) if isinstance(raw, dict) else json.dumps(raw).encode()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_tensor_files_never_raise_anything_else(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = save_small(Path(directory) / "c")
        file = path / "weights.safetensors"
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            piece = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"9", b"-", b"[", b'"', b"}", b"e9", b"0"])))
            content[at : at + data.draw(st.integers(0, 3))] = piece
        file.write_bytes(content)
        if len(content) >= 8:
            restate(path, "weights.safetensors")
        for verify in (True, False):
            try:
                checkpoint = polyckpt.inspect(path, verify=verify)
                for name in checkpoint.weights:
                    checkpoint.weights[name]
            except CheckpointError:
                pass


@pytest.mark.parametrize("depth", [300, 399, 401, 900, 5000, 200_000])
@pytest.mark.parametrize("opening", ["[", '{"a":', '{"$tuple":[', '{"$dict":[[0,'])
def test_deep_nesting_is_survived(depth: int, opening: str, tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    closing = "".join({"[": "]", "{": "}"}[bracket] for bracket in reversed(opening) if bracket in "[{")
    text = (path / "manifest.json").read_text()
    body = text[: text.rindex(',\n  "checksum"')].replace(
        '"k": {', '"deep": ' + opening * depth + "0" + closing * depth + ', "k": {', 1
    )
    from polyckpt.checksums import checksum

    (path / "manifest.json").write_bytes(body.encode() + f',\n  "checksum": "{checksum(body.encode())}"\n}}\n'.encode())
    with pytest.raises(CorruptError):
        polyckpt.load(path, TEMPLATE)


def test_a_manifest_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    os.truncate(path / "manifest.json", (1 << 30) + 1)
    with pytest.raises(CorruptError, match="a manifest has at most"):
        polyckpt.inspect(path)


def test_many_tensors(tmp_path: Path) -> None:
    model = {f"layer.{index}": np.full(2, index, np.float32) for index in range(20_000)}
    path = polyckpt.save(tmp_path / "c", model)
    restored = polyckpt.load(path, {name: np.zeros(2, np.float32) for name in model}).model
    assert all((restored[name] == model[name]).all() for name in model)


def test_unreadable_is_not_corrupt(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    (path / "optimizer.safetensors").unlink()
    (path / "optimizer.safetensors").symlink_to("optimizer.safetensors")
    with pytest.raises(StorageError, match=r"optimizer\.safetensors"):
        polyckpt.inspect(path)


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_replaced_while_it_is_opened_is_the_new_one_as_a_whole(
    verify: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = polyckpt.save(tmp_path / "c", {"w": np.zeros((2, 3))}, step=1)
    opening, later = _Files.open, [{"w": np.ones((4, 5)), "v": np.ones(2)}]

    def opened(files: _Files, *stated: Any) -> None:
        opening(files, *stated)
        if later:
            polyckpt.save(path, later.pop(), step=2, overwrite=True)

    monkeypatch.setattr(_Files, "open", opened)
    found = polyckpt.inspect(path, verify=verify)
    assert found.manifest.progress.step == 2
    assert {name: array.sum() for name, array in found.weights.items()} == {"w": 20, "v": 2}


@pytest.mark.parametrize("follows", [True, False])
def test_a_checkpoint_that_goes_while_it_is_opened_is_looked_for_again(
    follows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, link, locate = save_small(tmp_path / "first"), tmp_path / "last", local.locate
    link.symlink_to("first")

    def located(path: Path) -> Path:
        found = locate(path)
        if first.exists():
            shutil.rmtree(first)
            link.unlink()
            if follows:
                save_small(tmp_path / "second", 2.0)
                link.symlink_to("second")
        return found

    monkeypatch.setattr(local, "locate", located)
    if follows:
        assert polyckpt.inspect(link).weights["w"].sum() == 12
    else:
        with pytest.raises(NotACheckpointError):
            polyckpt.inspect(link)
