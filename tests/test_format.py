"""FORMAT.md against the code: its examples run, its tables are those of the core."""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from polyckpt import heads, history, layers, manifest, names, optimizers, residue, schema
from polyckpt.checksums import checksum
from polyckpt.dtypes import DTYPES, MAX_AXES
from polyckpt.errors import CorruptError
from polyckpt.leaves import Leaf
from polyckpt.residue import Constant
from polyckpt.storage import local, tensor_file
from polyckpt.storage.tensor_file import TensorFileReader
from tests.sealing import REPOSITORY, save_small, seal, write_arrays

TEXT = (REPOSITORY / "polyckpt" / "FORMAT.md").read_text()


def fenced(kind: str) -> str:
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return block


def table(heading: str) -> list[list[str]]:
    """The rows of the table whose head begins with `heading`, cells without backticks."""
    (body,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines()]
    # A cell that is one span of code is given without its marks.
    return [[re.sub(r"^`([^`]*)`$", r"\1", cell.strip()).replace("\\|", "|") for cell in row] for row in rows]


def test_every_example_is_used() -> None:
    assert re.findall(r"^```(.+)$", TEXT, re.MULTILINE) == [
        "hex",
        "json file",
        "json manifest",
        "json tensor",
        "json arrays",
        "text",
        "json checksum",
        "text history",
    ]


def test_the_bytes_of_the_example_file(tmp_path: Path) -> None:
    data = bytes.fromhex(fenced("hex"))
    (tmp_path / "x.safetensors").write_bytes(data)
    stated = json.loads(fenced("json file"))
    tensor_checksum = stated.pop("w")
    reader = TensorFileReader(tmp_path, "x.safetensors", schema.TensorFile(**stated))
    raw = reader.raw("w")
    assert raw.view("<i2").tolist() == [1, -2]
    assert checksum(raw.data) == tensor_checksum
    write_arrays(tmp_path / "y.safetensors", {"w": np.array([1, -2], np.int16)})
    assert (tmp_path / "y.safetensors").read_bytes() == data


def test_the_example_manifest_is_sealed_and_canonical(tmp_path: Path) -> None:
    data = fenced("json manifest").encode()
    decoded = manifest.decode(data, "FORMAT.md")
    assert decoded.unknown == {}
    assert manifest.encode(decoded.manifest) == data
    seal = re.search(rb',\n  "checksum": "(xxh3-128:[0-9a-f]{32})"\n}\n\Z', data)
    assert checksum(data[: seal.start()]) == seal[1].decode()
    assert decoded.manifest.version == heads.VERSION
    assert f"version {heads.VERSION}" in TEXT.splitlines()[0]
    shapes = {name: tensor.shape for name, tensor in decoded.manifest.tensors["weights"].items()}
    assert not [problem for layer in decoded.manifest.model.layers for problem in layers.problems(layer, shapes)]
    # Together with the example file it is a checkpoint.
    import polyckpt

    (tmp_path / "manifest.json").write_bytes(data)
    (tmp_path / "weights.safetensors").write_bytes(bytes.fromhex(fenced("hex")))
    assert polyckpt.inspect(tmp_path).weights["v"].tolist() == [1, -2]


def test_every_member_is_listed_in_order() -> None:
    listed = [row[0] for row in table("member")]
    assert listed == [*(field.encode_name for field in msgspec.structs.fields(schema.Manifest)), "checksum"]
    described = " ".join(row[1] for row in table("member"))
    for part in (schema.Producer, schema.Progress, schema.Model, schema.Optimizer, schema.TensorFile, schema.Tensor):
        for field in msgspec.structs.fields(part):
            assert f"`{field.encode_name}`" in described, field.encode_name


def test_the_example_tensor_is_covered() -> None:
    tensor = msgspec.json.decode(fenced("json tensor"), type=schema.Tensor)
    assert list(manifest._chunk_problems(tensor, {chunk.file for chunk in tensor.chunks})) == []


def test_the_example_of_arrays_is_valid() -> None:
    raw = json.loads(fenced("json manifest")) | {"arrays": json.loads(fenced("json arrays"))}
    decoded = manifest.decode(seal(raw), "m").manifest
    assert decoded.arrays["arrays"].files["d/3f2a"].size_bytes == 93
    for name, path in (("../x", "a"), ("x", "../a"), ("x", "/a"), ("x", "a/./b"), ("x", "")):
        raw["arrays"] = {name: {"kind": "orbax", "files": {path: {"size_bytes": 0, "checksum": ""}}}}
        with pytest.raises(CorruptError, match="inside"):
            manifest.decode(seal(raw), "m")


def test_element_types() -> None:
    rows = [
        [row.name, str(row.itemsize), row.stored_code, str(list(row.stored_suffix)) if row.stored_suffix else ""]
        for row in DTYPES.values()
    ]
    assert table("name") == rows


def test_names_are_escaped_as_said() -> None:
    for segments, name in table("segments"):
        assert names.join(json.loads(segments)) == name
        assert names.split(name) == json.loads(segments)


@pytest.mark.parametrize(("python", "encoded"), table("Python"))
def test_residue_tags_round_trip(python: str, encoded: str) -> None:
    scope = {"OrderedDict": OrderedDict, "Counter": Counter, "deque": deque, "Constant": Constant}
    value = eval(python, scope)  # the text is ours
    data = json.loads(encoded)
    assert residue.encode(value, leaf=lambda _: None, add_tensor=lambda *_: "") == data
    decoders = residue.Decoders(tensor=lambda *_: None, constant=lambda value, kind: Constant(kind, value))
    decoded = residue.decode(data, decoders)
    assert type(decoded) is type(value)
    assert decoded == value or repr(decoded) == repr(value)


def test_every_residue_tag_is_listed() -> None:
    listed = {tag for _, encoded in table("Python") for tag in re.findall(r'"(\$[a-z]+)"', encoded)} - {"$a"}
    assert listed | {"$tensor"} == set(residue._TAGS)
    leaf = Leaf("int8", (), lambda: np.zeros(1, np.int8), kind="numpy.scalar")
    assert residue.encode(leaf, leaf=lambda _: None, add_tensor=lambda *_: "name") == {
        "$tensor": "name",
        "kind": "numpy.scalar",
    }


def test_members_of_native_are_those_written(tmp_path: Path) -> None:
    from tests.sealing import members

    native = members(save_small(tmp_path / "c"))["native"]
    said = TEXT[TEXT.index("`native` is an object with") :].split("\n\n")[0]
    for member in [*native, *native["extra"]["k"], *native["optimizer"], "scheduler"]:
        assert f"`{member}`" in said, member


def test_tables_of_layers_and_optimizers() -> None:
    listed = {kind: [role.strip("`") for role in roles.split(", ") if role != "none"] for kind, roles in table("kind")}
    assert listed == {kind: list(roles) for kind, roles in layers.KINDS.items()}
    assert table("meaning") == [list(item) for item in optimizers.MEANINGS.items()]
    assert table("convention") == [
        [name, choice, formula] for name, choices in optimizers.CONVENTIONS.items() for choice, formula in choices.items()
    ]


def test_checksums() -> None:
    for text, expected in json.loads(fenced("json checksum")).items():
        assert checksum(text.encode()) == expected


def test_limits_and_patterns_are_those_of_the_code() -> None:
    said: dict[str, Any] = {
        f"at most {tensor_file.MAX_HEADER_BYTES:,}": 1,
        f"multiple of {tensor_file.ALIGNMENT_BYTES}": 1,
        f"at most {MAX_AXES} axes": 1,
        f"deeper than {residue.MAX_DEPTH} levels": 1,
        f"deeper than {manifest.MAX_NATIVE_DEPTH}": 1,
        manifest._TENSOR_FILE_NAME.pattern.removesuffix(r"\Z"): 1,
        local.TEMPORARY_PREFIX: 1,
        f".NAME{local._REPLACED_SUFFIX}": 2,
        "at most 2^30 bytes": 1,
    }
    assert {text: TEXT.replace("\n", " ").count(text) for text in said} == said
    assert heads.MAX_BYTES == 1 << 30


def test_the_example_of_a_history_is_read(tmp_path: Path) -> None:
    (tmp_path / history.FILE_NAME).write_text(fenced("text history"))
    told = history.History(tmp_path).read()
    assert (told.run, told.records) == ("5d41402abc4b2a76", ())
