"""Directories of Orbax that are damaged, unfinished or made to deceive: refused by name, and never a wrong value unsaid."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import polyckpt
from polyckpt.errors import CheckpointError, CorruptError, NotACheckpointError, PolyckptError, UnsupportedError
from tests.sealing import run_python

TREE = {
    "w": jnp.asarray(np.random.default_rng(0).standard_normal((40, 30)), jnp.float32),
    "b": jnp.arange(3, dtype=jnp.bfloat16) + 1,
    "text": "of the run",
}
FORMS = {
    "ocdbt zarr": {"use_ocdbt": True, "use_zarr3": False},
    "ocdbt zarr3": {"use_ocdbt": True, "use_zarr3": True},
    "files zarr": {"use_ocdbt": False, "use_zarr3": False},
    "files zarr3": {"use_ocdbt": False, "use_zarr3": True},
}


def save(path: Path, tree: Any, form: str = "files zarr") -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**FORMS[form])) as checkpointer:
        checkpointer.save(path, tree)
    return path


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("items")
    return {form: save(root / form.replace(" ", "_"), TREE, form) for form in FORMS}


@pytest.fixture
def item(items: dict[str, Path], tmp_path: Path) -> Path:
    """One of plain files, to be damaged."""
    return shutil.copytree(items["files zarr"], tmp_path / "item")


@pytest.fixture
def managed(tmp_path: Path) -> Path:
    """Three steps of a manager."""
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2, 3):
            manager.save(step, args=ocp.args.StandardSave({"w": jnp.full((6, 4), step, jnp.float32)}))
    return tmp_path / "run"


def read(path: Path) -> dict[str, np.ndarray]:
    opened = polyckpt.open(path)
    opened.verify()
    return dict(opened.weights)


def is_whole(found: dict[str, np.ndarray]) -> bool:
    return found.keys() == {"w", "b"} and all(found[name].tobytes() == np.asarray(TREE[name]).tobytes() for name in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["remove", "truncate", "empty"])
def test_what_is_missing_never_reads_as_zeros(items: dict[str, Path], tmp_path: Path, form: str, change: str) -> None:
    item = shutil.copytree(items[form], tmp_path / "item")
    files = [each for each in item.rglob("*") if each.is_file() and each.stat().st_size]
    refused = set()
    for file in files:
        data = file.read_bytes()
        if change == "remove":
            file.unlink()
        else:
            file.write_bytes(data[: len(data) // 2] if change == "truncate" else b"")
        try:
            assert is_whole(read(item)), file  # one that no array depends on
        except (CorruptError, NotACheckpointError):
            refused.add(file)
        file.write_bytes(data)
    assert is_whole(read(item))
    needed = [each for each in files if each.name in ("_METADATA", "_strings.json")]
    arrays = [each for each in files if {"w", "b"} & set(each.relative_to(item).parts)]
    assert refused >= {*needed, *arrays} and len(needed) == 2
    assert len(arrays) >= 4 if form.startswith("files") else any("d" in each.relative_to(item).parts for each in refused)


def test_a_flipped_bit_raises_nothing_but_errors_of_ours(items: dict[str, Path], tmp_path: Path) -> None:
    """Formats of others have no checksums of ours: a changed value cannot be told, and `polyckpt verify` says so."""
    random = np.random.default_rng(0)
    for form in ("ocdbt zarr", "files zarr3"):
        item = shutil.copytree(items[form], tmp_path / form.replace(" ", "_"))
        for file in [each for each in item.rglob("*") if each.is_file() and each.stat().st_size]:
            data = file.read_bytes()
            for place in random.integers(0, len(data), 6):
                file.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(random.integers(8))]) + data[place + 1 :])
                with contextlib.suppress(PolyckptError):
                    read(item)
            file.write_bytes(data)
        assert is_whole(read(item))


def edit(item: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    metadata = json.loads((item / "_METADATA").read_bytes())
    change(metadata)
    (item / "_METADATA").write_text(json.dumps(metadata))


def leaf(*path: str, value_type: str = "jax.Array") -> dict[str, Any]:
    keys = [{"key": key, "key_type": 2} for key in path]
    return {"key_metadata": keys, "value_metadata": {"value_type": value_type, "skip_deserialize": False}}


@pytest.mark.parametrize(
    "path", [("../other", "w"), ("../other/w",), ("x/../../other/w",), ("/other/w",), ("", "", "/other/w")]
)
def test_a_name_that_leads_out_of_the_directory_is_refused(item: Path, path: tuple[str, ...]) -> None:
    save(item.parent / "other", {"w": jnp.ones((2, 3))})
    edit(item, lambda metadata: metadata["tree_metadata"].update(x=leaf(*path)))
    with pytest.raises(UnsupportedError, match="leads out of the directory"):
        read(item)


def test_a_link_that_leads_out_of_the_directory_is_refused(item: Path) -> None:
    other = save(item.parent / "other", {"w": jnp.ones((40, 30))})
    shutil.rmtree(item / "w")
    (item / "w").symlink_to(other / "w")
    with pytest.raises(UnsupportedError, match=r"a link out of the directory.*cp -rL"):
        read(item)
    (item / "w").unlink()
    shutil.copytree(other / "w", item / "w")
    (item / "w" / "0.0").rename(item / "kept")
    (item / "w" / "0.0").symlink_to(item / "kept")  # one that stays within it
    assert read(item)["w"].tolist() == [[1.0] * 30] * 40


def test_the_cache_of_the_hub_consists_of_links(item: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(item, snapshot / "item")
    blobs.mkdir()
    for number, file in enumerate([each for each in snapshot.rglob("*") if each.is_file()]):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    assert is_whole(read(snapshot / "item"))


def test_two_leaves_in_one_place_are_refused(tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "item", {"a": {"b": jnp.ones(2)}, "a.b": jnp.zeros(2)})
    with pytest.raises(CorruptError, match=r"both written to 'a\.b'"):
        polyckpt.open(tmp_path / "item")


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no leaves": lambda metadata: metadata.pop("tree_metadata"),
    "deep path": lambda metadata: metadata["tree_metadata"].update(x=leaf(*["a"] * 5000)),
    "no such array": lambda metadata: metadata["tree_metadata"].update(x=leaf("x")),
    "no such text": lambda metadata: metadata["tree_metadata"].update(x=leaf("x", value_type="string")),
    "twice": lambda metadata: metadata["tree_metadata"].update(x=leaf("w")),
    "another driver": lambda metadata: metadata.update(use_zarr3=True),
    "no database": lambda metadata: metadata.update(use_ocdbt=True),
    "null in a name": lambda metadata: metadata["tree_metadata"].update(x=leaf("w\0")),
    "key of no type": lambda metadata: metadata["tree_metadata"]["('w',)"]["key_metadata"][0].update(key=None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_that_contradict_themselves_are_refused(item: Path, name: str) -> None:
    edit(item, HOSTILE[name])
    with pytest.raises((CorruptError, UnsupportedError)):
        read(item)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b'{"tree_metadata": 7}'], ids=range(6)
)
def test_metadata_that_are_none_are_refused(item: Path, managed: Path, data: bytes) -> None:
    (item / "_METADATA").write_bytes(data)
    with pytest.raises(CorruptError, match="_METADATA"):
        read(item)
    (managed / "3" / "_CHECKPOINT_METADATA").write_bytes(data.replace(b"tree_metadata", b"item_handlers"))
    with pytest.raises(CorruptError, match=r"_CHECKPOINT_METADATA.*The step before it is .*/2$"):
        polyckpt.open(managed / "3")


@pytest.mark.parametrize("chunks", ["small", "large"])
@pytest.mark.parametrize("rows", [1 << 20, 1 << 40])
def test_a_shape_that_lies_takes_no_memory(item: Path, rows: int, chunks: str) -> None:
    """Shapes far beyond the data, up to what no machine can hold, for which tensorstore would end the process."""
    described = json.loads((item / "w" / ".zarray").read_text())
    described["shape"] = [rows, 1024]
    described["chunks"] = [rows, 1024] if chunks == "large" else [40, 30]
    (item / "w" / ".zarray").write_text(json.dumps(described))
    code = """
import re, sys
import polyckpt
from polyckpt.errors import CheckpointError
opened = polyckpt.open(sys.argv[1])
try:
    opened.weights["w"]
except CheckpointError as error:
    print(error)
else:
    raise AssertionError("read")
assert int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) < 400 << 10
"""
    done = run_python(code, item)
    assert done.returncode == 0 and "w" in done.stdout, done.stdout + done.stderr
    with pytest.raises(CheckpointError):
        read(item)


def test_an_unfinished_directory_is_not_opened(item: Path, managed: Path) -> None:
    item.rename(item.with_name("item.orbax-checkpoint-tmp-12"))
    with pytest.raises(NotACheckpointError):
        polyckpt.open(item.with_name("item.orbax-checkpoint-tmp-12"))
    shutil.copytree(managed / "3" / "default", managed / "4.orbax-checkpoint-tmp" / "default.orbax-checkpoint-tmp")
    assert polyckpt.open(managed).path == managed / "3"
    (managed / "3" / "default").rename(managed / "3" / "default.orbax-checkpoint-tmp")
    with pytest.raises(CorruptError, match=r"default: no _METADATA in it.*The step before it is .*/2$"):
        polyckpt.open(managed)


@pytest.mark.parametrize("lost", ["_CHECKPOINT_METADATA", "default/_METADATA", "default/manifest.ocdbt", "default/d"])
def test_a_damaged_newest_step_is_an_error_that_names_the_one_before(managed: Path, lost: str) -> None:
    for victim in (managed / "3" / lost, managed / "3" / "default" / "ocdbt.process_0"):
        if victim.is_dir():
            shutil.rmtree(victim)
        else:
            victim.unlink(missing_ok=True)
    with pytest.raises(CorruptError, match=r"The step before it is .*/run/2$"):
        read(managed)
    assert read(managed / "2")["w"].tolist() == [[2.0] * 4] * 6
    shutil.rmtree(managed / "1")
    shutil.rmtree(managed / "2")
    with pytest.raises((CorruptError, NotACheckpointError)) as raised:
        read(managed)
    assert "before" not in str(raised.value)


@pytest.mark.parametrize("form", FORMS)
def test_names_that_mean_something_in_a_url_are_paths(items: dict[str, Path], tmp_path: Path, form: str) -> None:
    (tmp_path / "a b").mkdir()  # what a%20b would mean
    for name in ("a%20b", "run#1", "what?", "a|b"):
        assert is_whole(read(shutil.copytree(items[form], tmp_path / name)))


def test_without_tensorstore_the_command_is_named(item: Path) -> None:
    code = """
import sys
sys.modules["tensorstore"] = None
import polyckpt
try:
    polyckpt.open(sys.argv[1])
except polyckpt.errors.AdapterError as error:
    assert "pip install tensorstore" in str(error), error
else:
    raise AssertionError("opened")
"""
    done = run_python(code, item)
    assert done.returncode == 0, done.stderr
