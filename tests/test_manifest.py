from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

import polyckpt
from polyckpt import heads, manifest, schema
from polyckpt.errors import CorruptError, UnsupportedError, VersionError
from tests.sealing import REPOSITORY, edit, members, save_small, seal

SUM = "xxh3-128:" + "0" * 32


def minimal(**changes: Any) -> dict[str, Any]:
    """The JSON of a manifest of one weight in two chunks."""
    chunk = {"file": "weights.safetensors", "key": "a", "offset": [0, 0], "shape": [2, 3], "checksum": SUM}
    raw = {
        "format": "polyckpt",
        "version": heads.VERSION,
        "saved_at_utc": "2026-01-02T03:04:05+00:00",
        "producer": {"library_version": "0", "adapter": "numpy", "versions": {}},
        "progress": {"epoch": 1, "step": 2, "batch": None},
        "metrics": {"loss": {"$float": "nan"}},
        "learning_rate": [0.5, 1],
        "model": {"type": "dict", "order": "name", "layers": [], "aliases": {}},
        "optimizer": None,
        "files": {"weights.safetensors": {"size_bytes": 1, "header_checksum": SUM}},
        "tensors": {
            "weights": {"w": {"dtype": "int8", "shape": [4, 3], "chunks": [chunk, {**chunk, "key": "b", "offset": [2, 0]}]}}
        },
        "native": {},
        "assumptions": [],
        "run": None,
        "arrays": {},
    }
    return {**raw, **changes}


def decode(raw: dict[str, Any]) -> manifest.Decoded:
    return manifest.decode(seal(raw), "m")


def test_encode_undoes_decode() -> None:
    decoded = decode(minimal())
    assert manifest.decode(manifest.encode(decoded.manifest), "m") == decoded
    assert manifest.encode(decoded.manifest) == seal(minimal())
    assert decoded.unknown == {}


def test_the_head_says_what_the_whole_manifest_says() -> None:
    raw = minimal(run={"id": "a", "sequence": 7}, later=1)
    whole, head = decode(raw).manifest, heads.decode_head(seal(raw), "m")
    for name in ("saved_at_utc", "progress", "metrics", "run"):
        assert getattr(head, name) == getattr(whole, name)
    assert head.run == schema.Run(id="a", sequence=7)


@pytest.mark.parametrize("run", [{"id": "a"}, {"id": "a", "sequence": 0}, {"id": 1, "sequence": 1}, []])
def test_a_wrong_run_is_refused_by_both(run: Any) -> None:
    for reader in (manifest.decode, heads.decode_head):
        with pytest.raises(CorruptError, match="run"):
            reader(seal(minimal(run=run)), "m")


def test_the_head_of_a_damaged_manifest_is_refused() -> None:
    data = seal(minimal())
    for position in range(0, len(data), 7):
        damaged = data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
        with pytest.raises((CorruptError, VersionError)):
            heads.decode_head(damaged, "m")
    with pytest.raises(VersionError, match=r"2\.0"):
        heads.decode_head(json.dumps({"format": "polyckpt", "version": "2.0"}).encode(), "m")


def test_unknown_members_of_a_minor_version_are_ignored_and_kept() -> None:
    raw = minimal(version="1.999", later={"deep": [1]}, native={"extra": {}, "anything": [[{}]]})
    raw["producer"]["host"] = "x"
    raw["metrics"]["loss"]["note"] = 1
    raw["tensors"]["weights"]["w"]["chunks"][1]["codec"] = {"name": "none"}
    decoded = decode(raw)
    assert decoded.manifest.progress.step == 2
    again = manifest.encode(decoded.manifest, decoded.unknown)
    assert json.loads(again) == json.loads(seal(raw))
    assert manifest.decode(again, "m") == decoded


@pytest.mark.parametrize("version", ["2.0", "0.9", "999999999.1"])
def test_unknown_major_version_names_both(version: str) -> None:
    # What lies beyond the version, the seal included, may be anything.
    data = json.dumps({"format": "polyckpt", "version": version}).encode()
    with pytest.raises(VersionError, match=rf"{re.escape(version)}; this library reads 1\.x .it writes 1\.2"):
        manifest.decode(data, "m")


@pytest.mark.parametrize("version", [None, 1, "1", "1.x", "-1.0", "1.0.0", "1." + "9" * 5000, "\u0661.\u0660", ["1.0"]])
def test_what_is_no_version_is_corrupt(version: Any) -> None:
    with pytest.raises(CorruptError, match="version"):
        decode(minimal(version=version))


def test_every_flipped_bit_is_refused() -> None:
    data = seal(minimal())
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises((CorruptError, VersionError)):
                manifest.decode(bytes(flipped), "m")


def test_every_truncation_and_addition_is_refused() -> None:
    data = seal(minimal())
    for changed in [*(data[:length] for length in range(len(data))), data + b"\n", data + b"\0", b" " + data, data * 2]:
        with pytest.raises(CorruptError):
            manifest.decode(changed, "m")


def chunks(*boxes: tuple[list[int], list[int]], shape: list[int], **more: Any) -> dict[str, Any]:
    listed = [
        {"file": "weights.safetensors", "key": f"k{i}", "offset": offset, "shape": size, "checksum": SUM}
        for i, (offset, size) in enumerate(boxes)
    ]
    return {"tensors": {"weights": {"w": {"dtype": "int8", "shape": shape, "chunks": listed, **more}}}}


LAYER = {"path": "l", "kind": "linear", "type": "L", "roles": {"kernel": {"tensor": "absent", "axes": "in"}}}
OPTIMIZER = {"type": "O", "family": "custom", "slots": {"m": {"meaning": "custom", "tensors": {"w": "m/w"}}}}
CONTRADICTIONS = [
    (chunks(shape=[1]), "w: chunks hold 0 elements of 1"),
    (chunks(shape=[0]), "w: chunks hold 0 elements of 0"),
    (chunks(([0], [2]), ([3], [1]), shape=[4]), "chunks hold 3 elements of 4"),
    (chunks(([0], [3]), ([2], [1]), shape=[4]), "chunks overlap"),
    (chunks(([0, 0], [2, 2]), ([1, 1], [1, 1]), ([0, 2], [1, 1]), shape=[2, 3]), "chunks overlap"),
    (chunks(([0], [5]), shape=[4]), r"chunk at \[0\] of shape \[5\] is not inside \[4\]"),
    (chunks(([-1], [4]), shape=[4]), "is not inside"),
    (chunks(([1], [-1]), shape=[4]), "is not inside"),
    (chunks(([0, 0], [4]), shape=[4]), "is not inside"),
    (chunks(([], []), ([], []), shape=[]), "chunks hold 2 elements of 1"),
    (chunks(([0], [-1]), shape=[-1]), "negative size"),
    (chunks(([0], [2**63]), shape=[2**63]), "too large"),
    (chunks(([0], [2**200]), shape=[2**200]), "too large"),
    (chunks(([0, 0], [2**62, 2**62]), shape=[2**62, 2**62]), "too large"),
    (chunks(([0, 0], [0, 2**63]), shape=[0, 2**63]), "too large"),
    (chunks(([0] * 65, [1] * 65), shape=[1] * 65), "65 axes"),
    (chunks(([0] * 200_000, [2**62] * 200_000), shape=[2**62] * 200_000), "200000 axes"),
    (chunks(([0], [4]), shape=[4]) | {"files": {}}, "lies in 'weights.safetensors', which is not among the files"),
    (
        {"tensors": {"weights": {n: minimal()["tensors"]["weights"]["w"] for n in "vw"}}},
        "w: a of weights.safetensors is the chunk of another one too",
    ),
    *(
        ({"files": {name: {"size_bytes": 1, "header_checksum": SUM}}, "tensors": {}}, "not a plain name")
        for name in (
            "../x.safetensors",
            "/x.safetensors",
            "a/b.safetensors",
            ".hidden.safetensors",
            "x.safetensors\n",
            "x\0.safetensors",
            "x.pt",
            "..",
            "",
            "é.safetensors",
        )
    ),
    ({"model": {"type": "d", "order": "name", "aliases": {"v": "u"}}}, "v stands for u, which is not stored"),
    ({"model": {"type": "d", "order": "name", "aliases": {"w": "w"}}}, "w is stored itself"),
    ({"model": {"type": "d", "order": "name", "layers": [LAYER]}}, "kernel is absent, which is not a weight"),
    ({"optimizer": OPTIMIZER}, "m: w is m/w, which is not stored"),
    ({"native": {"a": [{"b": {"$tensor": "t", "kind": "numpy"}}]}}, "refers to the tensor t, which is not stored"),
    ({"native": json.loads('{"a":' * 450 + "1" + "}" * 450)}, "nested deeper than 400 levels"),
    ({"metrics": {"loss": None}}, r"metrics"),
    ({"metrics": {"loss": {"$float": "NaN"}}}, "NaN"),
    ({"metrics": {"loss": "0.5"}}, "metrics"),
    ({"progress": {"step": 1.5}}, r"progress\.step"),
    ({"progress": {"step": True}}, r"progress\.step"),
    ({"progress": {"step": -1}}, r"progress\.step"),
    ({"tensors": []}, r"\$\.tensors"),
    ({"native": 3}, r"\$\.native"),
    ({"files": {"weights.safetensors": {"size_bytes": -1, "header_checksum": SUM}}}, "size_bytes"),
]


@pytest.mark.parametrize(("changes", "said"), CONTRADICTIONS)
def test_contradictions_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CorruptError, match=said):
        decode(minimal(**changes))


def test_every_contradiction_is_named_at_once() -> None:
    raw = minimal(**chunks(([0], [3]), shape=[4]), optimizer=OPTIMIZER)
    with pytest.raises(CorruptError, match=r"(?s)chunks hold 3.*which is not stored"):
        decode(raw)


@pytest.mark.parametrize("member", [name for name in minimal() if name not in ("assumptions", "run", "arrays")])
def test_missing_members_are_named(member: str) -> None:
    raw = minimal()
    del raw[member]
    with pytest.raises(CorruptError, match=member):
        decode(raw)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"1", b"{}", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000])
def test_what_is_no_manifest_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptError):
        manifest.decode(data, "m")


def test_depth_of_what_is_unknown_does_not_matter() -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    assert decode(minimal(later=deep)).unknown["later"] == deep


def test_many_hostile_chunks_are_compared_in_bearable_time() -> None:
    # 20,000 strips of one row and one strip that overlaps them all: pair by pair this would be 2e8 comparisons in Python.
    strips = [([0, i], [1, 1]) for i in range(20_000)]
    started = time.process_time()
    decode(minimal(**chunks(*strips, shape=[1, 20_000])))
    with pytest.raises(CorruptError, match="overlap"):
        decode(minimal(**chunks(*strips[:-1], ([0, 0], [1, 1]), shape=[1, 20_000])))
    assert time.process_time() - started < 60  # minutes if it were quadratic


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "loss is nan"), ("\ud800", "not valid Unicode")])
def test_what_json_cannot_hold_is_never_written(value: Any, said: str) -> None:
    changed = msgspec.structs.replace(decode(minimal()).manifest, metrics={"loss": value})
    with pytest.raises(UnsupportedError, match=said):
        manifest.encode(changed)


SCHEMA = REPOSITORY / "polyckpt" / "manifest.schema.json"


def test_the_schema_file_is_generated() -> None:
    assert json.loads(SCHEMA.read_text()) == json.loads(json.dumps(manifest.json_schema())), (
        "regenerate it: python -m polyckpt.manifest > polyckpt/manifest.schema.json"
    )


def test_real_manifests_satisfy_the_schema(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    validator.check_schema(validator.schema)
    validator.validate(members(save_small(tmp_path / "c", value=float("inf"))))
    validator.validate(json.loads(seal(minimal(later=1))))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"metrics": {"loss": "x"}},
        {"producer": {}},
        {"tensors": {"weights": {"w": {"dtype": "int8"}}}},
        {"checksum": "md5:0"},
        {"progress": {"step": "1"}},
    ],
)
def test_broken_manifests_do_not_satisfy_the_schema(changes: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert not validator.is_valid({**json.loads(seal(minimal())), **changes})


def test_unknown_members_survive_on_disk(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    edit(path, lambda raw: raw.update(version="1.7", later=[1]))
    assert polyckpt.inspect(path).unknown == {"later": [1]}
    assert polyckpt.inspect(path).manifest.version == "1.7"
    assert schema.FORMAT_MINOR < 7
