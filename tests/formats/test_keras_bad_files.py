"""Files of Keras that are damaged, or made to do harm: refused with a reason, nothing outside is read, nothing runs."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt.errors import CorruptError, PolyckptError, UnsupportedError
from tests.sealing import run_python

os.environ["KERAS_BACKEND"] = "torch"
import h5py
import keras
from keras import layers


def net(seed: int = 0) -> Any:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(7), layers.Dense(3)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model in every format."""
    directory = tmp_path_factory.mktemp("whole")
    model = net()
    model.save(directory / "m.keras")
    model.save_weights(directory / "m.weights.h5")
    model.save_weights(directory / "m.weights.json", max_shard_size=4e-7)
    return directory


@pytest.fixture
def archive(whole: Path, tmp_path: Path) -> dict[str, bytes]:
    """The entries of a `.keras` by name."""
    with zipfile.ZipFile(whole / "m.keras") as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    opened = polyckpt.open(path)
    opened.verify()
    return {name: opened.weights[name] for name in opened.weights}


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(value.tobytes() == other[name].tobytes() for name, value in one.items())


def test_a_flipped_bit_of_an_archive_is_found(whole: Path, tmp_path: Path) -> None:
    """By the checksum that the archive keeps of each entry."""
    data, expected = (whole / "m.keras").read_bytes(), read(whole / "m.keras")
    kernel = expected["dense/kernel"].tobytes()
    payload = range(data.index(kernel), data.index(kernel) + len(kernel))
    bad = tmp_path / "bad.keras"
    harmless = 0
    for offset in [*payload[::23], *range(0, len(data), len(data) // 60)]:
        bad.write_bytes(data[:offset] + bytes([data[offset] ^ 4]) + data[offset + 1 :])
        try:
            found = read(bad)
        except PolyckptError as error:
            assert offset not in payload or (isinstance(error, CorruptError) and "model.weights.h5" in str(error))
        else:
            harmless += 1
            assert offset not in payload and equal(found, expected)
    assert harmless < 20  # a date, or what Keras notes for people


def test_a_load_checks_before_it_writes(whole: Path, tmp_path: Path) -> None:
    data = bytearray((whole / "m.keras").read_bytes())
    data[data.index(read(whole / "m.keras")["dense_1/kernel"].tobytes()) + 5] ^= 1
    (tmp_path / "bad.keras").write_bytes(data)
    live = net(1)
    before = [keras.ops.convert_to_numpy(each).copy() for each in live.variables]
    with pytest.raises(CorruptError, match=r"bad\.keras: model\.weights\.h5: not the bytes .* Bad CRC-32"):
        polyckpt.load(tmp_path / "bad.keras", live)
    with pytest.raises(CorruptError, match="Bad CRC-32"):
        polyckpt.open(tmp_path / "bad.keras").weights["dense/bias"]
    with pytest.raises(CorruptError, match="Bad CRC-32"):
        polyckpt.export(tmp_path / "bad.keras", tmp_path / "ours", to="polyckpt")
    assert not (tmp_path / "ours").exists()
    assert all(np.array_equal(old, keras.ops.convert_to_numpy(new)) for old, new in zip(before, live.variables, strict=True))
    polyckpt.load(tmp_path / "bad.keras", live, verify=False)
    assert not np.array_equal(before[0], keras.ops.convert_to_numpy(live.variables[0]))


@pytest.mark.parametrize("file", ["m.keras", "m.weights.h5", "m_00000.weights.h5", "m.weights.json"])
def test_what_is_cut_off_is_refused(whole: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    data = (whole / file).read_bytes()
    opens = "m.weights.json" if file.startswith("m_") else file
    for length in [0, 1, 7, 100, *range(len(data) // 12, len(data), len(data) // 12), len(data) - 1]:
        (tmp_path / file).write_bytes(data[:length])
        with pytest.raises(PolyckptError):
            polyckpt.load(tmp_path / opens, net(1))


@pytest.mark.parametrize("file", ["m.weights.h5", "m.weights.json"])
def test_whatever_is_flipped_only_our_errors_come_out(whole: Path, tmp_path: Path, file: str) -> None:
    """These formats have no checksums: a number may be another one."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    data = (whole / file).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for offset in rng.integers(0, len(data), 250):
        (tmp_path / file).write_bytes(data[:offset] + bytes([data[offset] ^ (1 << int(rng.integers(8)))]) + data[offset + 1 :])
        try:
            read(tmp_path / file)
        except PolyckptError:
            refused += 1
    assert refused > 5


def test_an_archive_that_unpacks_to_gigabytes_is_refused(archive: dict[str, bytes], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("model.weights.h5", "config.json"):
        path = tmp_path / "bomb.keras"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for other in archive.keys() - {name}:
                file.writestr(zipfile.ZipInfo(other), archive[other])
            with file.open(name, "w", force_zip64=True) as entry:
                for _ in range(300):
                    entry.write(bytes(1 << 20))
        size_bytes = path.stat().st_size
        path.write_bytes(claiming(path.read_bytes(), name, 1 << 40))
        assert size_bytes < 1 << 20
        with pytest.raises((UnsupportedError, CorruptError), match=rf"{name} (is compressed|claims \d+ bytes)"):
            polyckpt.open(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def claiming(data: bytes, name: str, size_bytes: int) -> bytes:
    """An archive whose directory says that an entry has this size."""
    at = data.rindex(name.encode()) - 46
    extra = struct.pack("<HHQ", 1, 8, size_bytes)
    fields = bytearray(data[at : at + 46])
    fields[24:28], fields[30:32] = b"\xff" * 4, struct.pack("<H", len(extra))
    end = data.rindex(b"PK\x05\x06")
    tail = bytearray(data[end:])
    tail[12:16] = struct.pack("<I", struct.unpack("<I", tail[12:16])[0] + len(extra))
    after = at + 46 + len(name)
    return data[:at] + bytes(fields) + name.encode() + extra + data[after:end] + bytes(tail)


def test_entries_of_an_archive_are_never_unpacked(archive: dict[str, bytes], tmp_path: Path) -> None:
    """Names that lead elsewhere lead nowhere."""
    place = tmp_path / "deep" / "place"
    place.mkdir(parents=True)
    evil = [("../../canary", b"x"), (str(tmp_path / "canary"), b"x"), ("assets/../../canary", b"x")]
    path = zipped(place / "m.keras", [*archive.items(), *evil])
    polyckpt.load(path, net(1))
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["deep", "m.keras", "place"]


@pytest.mark.parametrize("name", ["model.weights.h5", "config.json"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_occurs_twice_is_refused(archive: dict[str, bytes], tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "m.keras", [*archive.items(), (name, archive[name])])
    with pytest.raises(CorruptError, match=f"{name} occurs 2 times"):
        polyckpt.open(path)


def test_an_entry_that_begins_elsewhere_is_refused(archive: dict[str, bytes], tmp_path: Path) -> None:
    data = zipped(tmp_path / "m.keras", list(archive.items())).read_bytes()
    at = data.rindex(b"model.weights.h5") - 4
    (tmp_path / "m.keras").write_bytes(data[:at] + struct.pack("<I", 3) + data[at + 4 :])
    with pytest.raises(CorruptError, match="is not where the archive says"):
        polyckpt.open(tmp_path / "m.keras")


def with_hdf5(path: Path, fill: Callable[[Any], Any]) -> Path:
    with h5py.File(path, "w") as file:
        fill(file)
    return path


def virtual(canary: Path) -> Any:
    layout = h5py.VirtualLayout(shape=(6,), dtype="f4")
    layout[:] = h5py.VirtualSource(str(canary), "x", shape=(6,))
    return layout


@pytest.mark.parametrize("kind", ["external link", "soft link", "external storage", "virtual dataset"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_outside_of_the_file_is_read(archive: dict[str, bytes], tmp_path: Path, kind: str, wrapped: bool) -> None:
    canary = with_hdf5(tmp_path / "canary.h5", lambda file: file.create_dataset("x", data=np.arange(6, dtype="f4")))
    fill: dict[str, Callable[[Any], Any]] = {
        "external link": lambda file: file.__setitem__("dense/vars/0", h5py.ExternalLink(str(canary), "/x")),
        "soft link": lambda file: file.__setitem__("dense/vars/0", h5py.SoftLink("/x")),
        "external storage": lambda file: file.create_dataset(
            "dense/vars/0", shape=(6,), dtype="f4", external=[(str(canary), 0, 24)]
        ),
        "virtual dataset": lambda file: file.create_virtual_dataset("dense/vars/0", virtual(canary)),
    }
    path = with_hdf5(tmp_path / "m.weights.h5", fill[kind])
    if wrapped:
        path = zipped(tmp_path / "m.keras", [*(archive | {"model.weights.h5": path.read_bytes()}).items()])
    # A file that has not been read since it was written is younger than its last access, which reading would change.
    os.utime(canary, ns=(1, 2))
    with pytest.raises(UnsupportedError, match=r"dense/vars/0 (is a link to|keeps its data in other files)"):
        polyckpt.open(path)
    assert canary.stat().st_atime_ns == 1


def unwritten(file: Any) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    group = file.create_group("a/vars")
    h5py.h5d.create(group.id, b"0", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((1 << 40,)), layout)


def cycle(file: Any) -> None:
    group = file.create_group("a")
    group["x"] = group["y"] = group


def doubling(file: Any) -> None:
    """Each of 60 groups twice in the one above: 2 to the 60th paths."""
    below = file.create_group("g")
    for index in range(60):
        above = file.create_group(f"g{index}")
        above["x"] = above["y"] = below
        below = above


HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "never written": (unwritten, r"4398046511104 bytes, of which 0 are there"),
    "chunks never written": (
        lambda file: file.create_dataset("a/vars/0", shape=(1 << 40,), dtype="f4", chunks=(1024,)),
        r"4398046511104 bytes, of which 0 are there",
    ),
    "compressed": (
        lambda file: file.create_dataset("a/vars/0", data=np.zeros(1 << 20, "f4"), compression="gzip"),
        r"a/vars/0 is compressed, .*h5repack -f NONE",
    ),
    "scaled": (
        lambda file: file.create_dataset("a/vars/0", data=np.zeros(1 << 20, "i4"), scaleoffset=0),
        r"4194304 bytes, of which \d+ are there",
    ),
    "in itself": (cycle, "a/x is a once more"),
    "doubling": (doubling, "once more, which Keras does not write"),
    "deep": (lambda file: file.create_group("/".join(["g"] * 3000)), "a path of more than 1024 characters"),
    "type": (lambda file: file.__setitem__("t", np.dtype("f4")), "t is neither a group nor a dataset"),
    "no elements at all": (lambda file: file.__setitem__("a/vars/0", h5py.Empty("f4")), "says it is float32"),
    "strings": (lambda file: file.__setitem__("a/vars/0", ["x"]), "element type 'object'"),
    "structures": (lambda file: file.__setitem__("a/vars/0", np.zeros(3, [("a", "f4")])), "element type 'void32'"),
    "references": (lambda file: file.create_dataset("a/vars/0", (1,), dtype=h5py.ref_dtype), "element type 'object'"),
    "part of an optimizer": (lambda file: file.__setitem__("optimizer/vars/1", 1.0), r"only \[1\] are there"),
    "whole model of Keras 2": (
        lambda file: file.attrs.__setitem__("model_config", "{}"),
        "a whole model in the HDF5 format of Keras 2: load it in Keras, and save it as .keras",
    ),
    "weights of Keras 2": (
        lambda file: file.attrs.__setitem__("layer_names", ["a"]),
        "weights in the HDF5 format of Keras 2: load it in Keras, and save it as .keras",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hdf5_that_claims_what_it_has_not(tmp_path: Path, kind: str) -> None:
    fill, why = HOSTILE[kind]
    path = with_hdf5(tmp_path / "m.weights.h5", fill)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PolyckptError, match=why):
        polyckpt.open(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_datasets_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """So could a small file be read as a large one."""

    def fill(file: Any) -> None:
        for name in ("first", "second"):
            file[name] = np.ones(1 << 14, "f4")
            offsets.append(file[name].id.get_offset())

    offsets: list[int] = []
    path = with_hdf5(tmp_path / "m.weights.h5", fill)
    data = bytearray(path.read_bytes()[: offsets[1]].replace(struct.pack("<Q", offsets[1]), struct.pack("<Q", offsets[0])))
    data[40:48] = struct.pack("<Q", len(data))  # where the file says that it ends
    path.write_bytes(data)
    with h5py.File(path) as file:
        assert file["second"][5] == 1
    with pytest.raises(CorruptError, match=r"its datasets claim 131072 bytes, and all of it has \d+"):
        polyckpt.open(path)


def test_a_type_that_does_not_fit_is_refused_and_another_order_of_bytes_is_read(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        file["a/vars/0"] = np.arange(5, dtype=">f4")

    path = with_hdf5(tmp_path / "m.weights.h5", fill)
    assert np.array_equal(polyckpt.open(path).weights["a/vars/0"], np.arange(5, dtype="f4"))
    with h5py.File(path, "a") as file:
        file["a/vars/0"].attrs["dtype"] = "bfloat16"
    with pytest.raises(CorruptError, match="says it is bfloat16"):
        polyckpt.open(path)


def test_what_keras_saves_as_h5_is_refused_by_name(tmp_path: Path) -> None:
    net().save(tmp_path / "m.h5")
    with pytest.raises(UnsupportedError, match="a whole model in the HDF5 format of Keras 2"):
        polyckpt.load(tmp_path / "m.h5", net(1))


@pytest.mark.parametrize("name", ["../m_00000.weights.h5", "/etc/passwd", "..", "sub/m.weights.h5", 7])
def test_shards_lie_beside_their_index(whole: Path, tmp_path: Path, name: Any) -> None:
    shutil.copytree(whole, tmp_path / "in")
    shutil.copy(whole / "m_00000.weights.h5", tmp_path)
    index = tmp_path / "in" / "m.weights.json"
    told = json.loads(index.read_text())
    told["weight_map"]["/layers/dense/vars"] = name
    index.write_text(json.dumps(told))
    with pytest.raises(CorruptError, match="is not the name of a file beside it"):
        polyckpt.open(index)


def test_a_shard_that_is_missing_or_alone_is_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert (tmp_path / "m_00001.weights.h5").exists()
    with pytest.raises(CorruptError, match=r"Of a sharded file open the \.weights\.json"):
        polyckpt.load(tmp_path / "m_00001.weights.h5", net(1))
    (tmp_path / "m_00001.weights.h5").unlink()
    with pytest.raises(CorruptError, match=r"m_00001\.weights\.h5: missing"):
        polyckpt.open(tmp_path / "m.weights.json")


def edited(archive: dict[str, bytes], path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    config = json.loads(archive["config.json"])
    change(config)
    return zipped(path, [*(archive | {"config.json": json.dumps(config).encode()}).items()])


def test_a_lambda_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"[open({str(canary)!r}, 'w'), x][1]"
    namespace: dict[str, Any] = {"open": open}
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3), layers.Lambda(eval(f"lambda x: {code}", namespace))])
    model.save(tmp_path / "m.keras")
    canary.unlink()
    with pytest.raises(UnsupportedError, match=r"does not make its model of the configuration: .*[Ll]ambda"):
        polyckpt.open(tmp_path / "m.keras")
    # In a live model it is the user's own; and the file is not asked.
    restored = polyckpt.load(tmp_path / "m.keras", model)
    assert restored.skipped == () and not canary.exists()


def test_no_module_is_imported_for_a_configuration(
    archive: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil_module.py").write_text(f"open({str(canary)!r}, 'w')\nclass Layer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def of(module: str, name: str, registered: str | None) -> Callable[[dict[str, Any]], Any]:
        told = {"module": module, "class_name": name, "registered_name": registered}
        return lambda config: config["config"]["layers"][1].update(told)

    for change in (
        of("evil_module", "Layer", None),
        of("evil_module", "Layer", "Package>Layer"),
        of("keras.src.utils.file_utils", "get_file", None),
        of("keras.layers", "TFSMLayer", None),
        of("builtins", "eval", None),
        lambda config: config.update(module="builtins", class_name="list", config=[]),
        lambda config: config.update(module="keras.initializers", class_name="Zeros", config={}, registered_name=None),
        lambda config: config.update(class_name=7),
        lambda config: config.clear(),
        lambda config: config["compile_config"].update(
            optimizer={"module": "evil_module", "class_name": "Layer", "config": {}}
        ),
    ):
        with pytest.raises(UnsupportedError, match=r"bad\.keras: (Keras does not make|its configuration makes)"):
            polyckpt.open(edited(archive, tmp_path / "bad.keras", change))
    assert "evil_module" not in sys.modules and not canary.exists()


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_a_configuration_that_is_no_json_object(archive: dict[str, bytes], tmp_path: Path, text: bytes) -> None:
    path = zipped(tmp_path / "m.keras", [*(archive | {"config.json": text}).items()])
    with pytest.raises(CorruptError, match=r"config\.json: not an object of JSON"):
        polyckpt.open(path)


def test_weights_of_another_model_than_the_configuration_says(archive: dict[str, bytes], tmp_path: Path) -> None:
    def wider(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["config"]["units"] = 9
        config["config"]["layers"][2].pop("build_config")

    opened = polyckpt.open(edited(archive, tmp_path / "m.keras", wider))
    assert opened.left_out[0] == "layers: the variables are not those of the model of the configuration"
    assert opened.weights["layers/dense/vars/0"].shape == (5, 7)


def test_the_content_tells_and_not_the_suffix(whole: Path, tmp_path: Path) -> None:
    expected = read(whole / "m.keras")
    shutil.copy(whole / "m.keras", tmp_path / "m.weights.h5")
    assert equal(read(tmp_path / "m.weights.h5"), expected)
    shutil.copy(whole / "m.weights.h5", tmp_path / "m.keras")
    live = net(1)
    polyckpt.load(tmp_path / "m.keras", live)
    assert np.array_equal(keras.ops.convert_to_numpy(live.variables[0]), expected["dense/kernel"])
    (tmp_path / "text.keras").write_text("no archive")
    with pytest.raises(polyckpt.NotACheckpointError, match="neither a checkpoint of polyckpt nor one of"):
        polyckpt.open(tmp_path / "text.keras")


def test_without_h5py_the_command_is_named(whole: Path) -> None:
    code = """
import sys
sys.modules["h5py"] = None
import polyckpt
for file in ("m.weights.h5", "m.keras", "m.weights.json"):
    try:
        polyckpt.open(sys.argv[1] + "/" + file)
    except polyckpt.AdapterError as error:
        assert "pip install 'polyckpt[keras]'" in str(error), error
    else:
        raise SystemExit("opened")
"""
    done = run_python(code, whole)
    assert done.returncode == 0, done.stderr
