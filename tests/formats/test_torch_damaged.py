"""Torch files that are damaged, hostile or something else: refused by name, and nothing of them is run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import polyckpt
from polyckpt import CheckpointExistsError, CorruptError, NotACheckpointError, PolyckptError, UnsupportedError
from tests.formats.torch_nets import adamw, equal, net, saved
from tests.sealing import run_python


class Canary:
    """A pickle that would run code: it names a function and what to call it with."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".npz"])
def test_a_file_cannot_run_code(suffix: str, legacy: bool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    hostile = {
        "posix.system": Canary(os.system, f"touch {ran}"),
        "eval": Canary(eval, f"open({str(ran)!r}, 'w').close()"),
        "pathlib.Path.touch": Canary(Path.touch, ran),
        "io.open": Canary(open, str(ran), "w"),
    }
    for name, canary in hostile.items():
        path = tmp_path / f"weights{suffix}"
        states = {"model": net().state_dict(), "x": canary}
        with open(path, "wb") as file:
            torch.save(states, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UnsupportedError) as error:
            polyckpt.load(path, net())
        assert f"{path}: it is a pickle that needs" in str(error.value) and "add_safe_globals" in str(error.value)
        assert name.partition(".")[0] in str(error.value) or name == "pathlib.Path.touch"
        assert not ran.exists()


def test_a_pickle_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    for protocol in range(2, 6):
        for value in (Canary(os.system, f"touch {tmp_path / 'ran'}"), {"w": np.ones(3)}):
            (tmp_path / "a.pt").write_bytes(pickle.dumps(value, protocol))
            with pytest.raises(UnsupportedError, match=r"a pickle that torch\.save did not write"):
                polyckpt.open(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_what_stands_in_for_numpy_takes_numbers_alone(tmp_path: Path) -> None:
    for value in (np.array([Canary(os.system, f"touch {tmp_path / 'ran'}")]), np.array(["text"]), np.datetime64("2026-01-01")):
        torch.save({"model": net().state_dict(), "x": value}, tmp_path / "a.pt")
        with pytest.raises(PolyckptError):
            polyckpt.open(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_module_is_refused_and_what_to_do_is_said(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "a.pt")
    with pytest.raises(UnsupportedError, match=r"needs \S*torch_nets.Net to be run.*save\(model.state_dict\(\)"):
        polyckpt.load(tmp_path / "a.pt", net())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(5, 3), torch.ones(2, 5)).save(str(tmp_path / "a.pt"))
    with pytest.raises(UnsupportedError, match=r"a TorchScript archive.*torch\.jit\.load and save its state_dict\(\)"):
        polyckpt.open(tmp_path / "a.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """torch maps the places of records, where compressed ones are other bytes."""
    saved(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UnsupportedError, match=r"is compressed, which torch\.save never does"):
        polyckpt.open(tmp_path / "b.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_parts_of_files_are_refused(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    saved(path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for size in [0, 1, 3, 20, 40, *range(60, len(whole), len(whole) // 20), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises((CorruptError, NotACheckpointError, UnsupportedError)) as error:
            polyckpt.open(path).verify()
        assert legacy or size < 60 or isinstance(error.value, CorruptError)


def contents(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    opened = polyckpt.open(path)
    parts = {"weights": opened.weights, "optimizer": opened.optimizer, "state": opened.state}
    values = {f"{part}/{name}": value.tobytes() for part, held in parts.items() for name, value in held.items()}
    return values, {"native": opened.manifest.native, "progress": opened.manifest.progress, "metrics": opened.manifest.metrics}


def test_a_changed_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    saved(path)
    whole, expected = path.read_bytes(), contents(path)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    refused = 0
    for place in [*range(7, directory, 97), *range(directory, len(whole), 23)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = contents(path)
        except PolyckptError:
            refused += 1
        else:
            assert found == expected, place
    assert refused > 40


@pytest.fixture
def flipped(tmp_path: Path) -> Path:
    """A file with one bit of one weight changed, which torch.load does not notice."""
    path = tmp_path / "a.pt"
    model, _, _ = saved(path)
    whole, value = path.read_bytes(), model.state_dict()["fc.weight"].numpy().tobytes()
    place = whole.index(value) + 6
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert not torch.equal(torch.load(path)["model_state_dict"]["fc.weight"], model.state_dict()["fc.weight"])
    return path


def test_a_changed_weight_is_named_and_nothing_is_loaded(flipped: Path) -> None:
    there = net()
    before = {name: value.clone() for name, value in there.state_dict().items()}
    with pytest.raises(CorruptError, match=r"a.pt: a/data/\d+"):
        polyckpt.load(flipped, there, adamw(there))
    assert all(torch.equal(before[name], value) for name, value in there.state_dict().items())
    opened = polyckpt.open(flipped)
    assert opened.weights["conv.weight"].shape == (4, 3, 2)
    with pytest.raises(CorruptError):
        opened.weights["fc.weight"]
    with pytest.raises(CorruptError):
        polyckpt.open(flipped, verify=False).verify()
    polyckpt.load(flipped, there, verify=False)


def test_an_archive_without_checksums_is_read_as_it_is(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net(0).state_dict(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    there = net()
    polyckpt.load(tmp_path / "a.pt", there)
    assert equal(net(0), there)


def test_safetensors_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(net(0).state_dict(), path, metadata={"format": "pt"})
    whole = path.read_bytes()
    for size in (0, 4, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises((CorruptError, NotACheckpointError)):
            polyckpt.open(path).verify()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    header["fc.bias"]["data_offsets"] = header["fc.weight"]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + int.from_bytes(whole[:8], "little") :])
    with pytest.raises(CorruptError):
        polyckpt.open(path)


def test_a_directory_of_several_kinds_is_not_guessed(tmp_path: Path) -> None:
    save_file(net(0).state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / ".metadata").write_bytes(b"")
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(NotACheckpointError, match=r"several kinds.*distributed.*Hugging Face.*format="):
        polyckpt.open(tmp_path)
    there = net()
    polyckpt.load(tmp_path, there, format="huggingface")
    assert equal(net(0), there)


@pytest.mark.parametrize(("name", "to"), [("a.pt", None), ("a.safetensors", None), ("folder", "huggingface")])
def test_what_is_there_is_not_written_over(name: str, to: str | None, tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "run", net(0))
    target = tmp_path / name
    polyckpt.export(path, target, to=to)
    files = sorted(target.rglob("*")) if target.is_dir() else [target]
    before = [each.read_bytes() for each in files]
    other = polyckpt.save(tmp_path / "other", net(7))
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        polyckpt.export(other, target, to=to)
    assert [each.read_bytes() for each in files] == before
    polyckpt.export(other, target, to=to, overwrite=True)
    there = net()
    polyckpt.load(target, there)
    assert equal(net(7), there)
    precious = tmp_path / "precious" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(CheckpointExistsError, match="not replaced"):
        polyckpt.export(path, precious.parent, to=to or {"a.pt": "torch", "a.safetensors": "safetensors"}[name], overwrite=True)
    assert precious.read_text() == "mine"


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "run", {"w": np.ones((3, 2))})
    with pytest.raises(UnsupportedError, match=r"holds what torch writes.*pass a model of torch"):
        polyckpt.export(path, tmp_path / "a.pt")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run"]


def test_a_missing_library_is_named_with_what_installs_it(tmp_path: Path) -> None:
    saved(tmp_path / "a.pt")
    (tmp_path / "folder").mkdir()
    torch.save(net(0).state_dict(), tmp_path / "folder/pytorch_model.bin")
    save_file(net(0).state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    code = """
import sys
sys.modules["torch"] = None
import polyckpt
for name in ("a.pt", "folder"):
    try:
        polyckpt.open(f"{sys.argv[1]}/{name}")
    except polyckpt.AdapterError as error:
        assert "pip install 'polyckpt[torch]'" in str(error), error
    else:
        raise AssertionError(name)
assert polyckpt.open(f"{sys.argv[1]}/a.safetensors").weights["fc.weight"].shape == (2, 16)
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
