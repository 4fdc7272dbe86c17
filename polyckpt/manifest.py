"""A manifest's bytes: encoding, decoding, and every check that needs no other file."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from msgspec import structs

from polyckpt import residue
from polyckpt.checksums import PREFIX, checksum
from polyckpt.dtypes import DTYPES, MAX_AXES, size_bytes, size_problem
from polyckpt.errors import CorruptError, UnsupportedError
from polyckpt.heads import MAX_BYTES, check_seal, check_version, sealed
from polyckpt.schema import Chunk, Manifest, Tensor

MAX_NATIVE_DEPTH = 4 * residue.MAX_DEPTH
"""Levels of JSON in native residue: one of its own levels takes up to three."""

_END = b"\n}"
"""What follows the last member; the seal is put before it."""
_FILE_NAME = re.compile(r"(?!\.\.?$)[A-Za-z0-9._-]{1,255}")
_ITEMSIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
"""Bytes of an element; of a type that a later version added, it is one at least."""
_ORIGINS = {axes: (0,) * axes for axes in range(MAX_AXES + 1)}
_ARRAYS_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}\Z")
_TENSOR_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.safetensors\Z")


@dataclass(frozen=True, slots=True)
class Decoded:
    """A manifest and the members in it that this library does not know, in the shape of the JSON they stood in."""

    manifest: Manifest
    unknown: dict[str, Any]


def encode(manifest: Manifest, unknown: dict[str, Any] | None = None) -> bytes:
    """The sealed bytes of `manifest`, with the `unknown` members of an earlier decode put back.

    Raises UnsupportedError for a string or a number that has no form in JSON, and for more than a reader takes.
    """
    # All numbers of the tensors are whole.
    _check_finite(msgspec.to_builtins(structs.replace(manifest, tensors={}, files={})))
    try:
        text = msgspec.json.encode(_merge(msgspec.to_builtins(manifest), unknown) if unknown else manifest)
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"the manifest would hold {error.object!r}, which is not valid Unicode") from error
    body = msgspec.json.format(text, indent=2).removesuffix(_END)
    sealed_body = body + b',\n  "checksum": "' + checksum(body).encode() + b'"\n}\n'
    if len(sealed_body) > MAX_BYTES:
        raise UnsupportedError(
            f"the manifest would have {len(sealed_body)} bytes; readers take at most {MAX_BYTES}. Numbers by the million "
            "belong in arrays: pass what is in extra= as NumPy arrays"
        )
    return sealed_body


def decode(data: bytes, source: str) -> Decoded:
    """The manifest in `data`; `source` names it in errors.

    Raises VersionError for a major version from the future and CorruptError for anything else that is wrong.
    """
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        sealed(data, source)  # which may know better what is wrong
        raise CorruptError(f"{source}: {error}") from error
    check_version(manifest.version, source)
    body = check_seal(data, source)
    written, unknown = msgspec.json.encode(manifest), {}
    if not _is_sealed(written, body):  # it holds more than this version writes, or holds it in other words
        text = msgspec.json.format(body + b"}", indent=-1)
        try:
            raw, known = msgspec.json.decode(text), msgspec.json.decode(written)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise CorruptError(f"{source}: {error}") from error
        _check_names(text, raw, source)
        known["native"] = raw["native"]  # all of it is known, to any depth
        unknown = _leftover(raw, known)
    if _deeper(manifest.native, MAX_NATIVE_DEPTH):
        raise CorruptError(f"{source}: native: nested deeper than {MAX_NATIVE_DEPTH} levels")
    if problems := list(_problems(manifest)):
        raise CorruptError("\n  ".join([f"{source}: contradicts itself:", *problems]))
    return Decoded(manifest, unknown)


def _is_sealed(text: bytes, body: bytes) -> bool:
    """Whether `encode` would seal just these bytes. Neither is copied: they may be many."""
    indented = msgspec.json.format(text, indent=2)
    return len(indented) == len(body) + len(_END) and indented.startswith(body)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a manifest, generated from polyckpt.schema."""
    schema = msgspec.json.schema(Manifest)
    checksum_schema = {"type": "string", "pattern": f"^{PREFIX}[0-9a-f]{{32}}$"}
    definition = schema["$defs"]["Manifest"]
    definition["properties"]["checksum"] = checksum_schema
    definition["required"].append("checksum")
    for each in schema["$defs"].values():
        if "description" in each:  # a docstring, which versions of msgspec indent in two ways
            each["description"] = inspect.cleandoc(each["description"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "polyckpt manifest", **schema}


def _check_names(text: bytes, raw: Any, source: str) -> None:
    """Refuse a name that stands twice in an object: two readers might choose different ones of the two values."""
    # Whoever spells JSON as msgspec does has no name twice where the same bytes come out again; that costs next to nothing.
    if text == msgspec.json.encode(raw):
        return

    def unique(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CorruptError(f"{source}: the name {twice!r} occurs twice in one object")

    try:
        json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{source}: not JSON that every reader understands: {error}") from error


def _problems(manifest: Manifest) -> Iterator[str]:
    """Every contradiction within a manifest, one line each."""
    for name, arrays in manifest.arrays.items():
        if not _ARRAYS_NAME.match(name):
            yield f"arrays: {name!r} is not a plain name of a directory inside the checkpoint"
        for path in arrays.files:
            if not all(map(_FILE_NAME.fullmatch, path.split("/"))):
                yield f"arrays: {name}: {path!r} is not a path inside that directory"
    for name in manifest.files:
        if not _TENSOR_FILE_NAME.match(name):
            yield f"files: {name!r} is not a plain name of a .safetensors file inside the checkpoint"
    used: dict[str, set[str]] = defaultdict(set)
    places = manifest.files.keys() | manifest.arrays.keys()
    for section, tensors in manifest.tensors.items():
        for name, tensor in tensors.items():
            if not _is_whole(tensor, places):
                for problem in _chunk_problems(tensor, places):
                    yield f"tensors: {section}: {name}: {problem}"
            for chunk in tensor.chunks:
                if chunk.key in (keys := used[chunk.file]):
                    yield f"tensors: {section}: {name}: {chunk.key} of {chunk.file} is the chunk of another one too"
                keys.add(chunk.key)
    weights = {**manifest.tensors.get("weights", {}), **manifest.model.aliases}
    for alias, target in manifest.model.aliases.items():
        if target not in manifest.tensors.get("weights", {}):
            yield f"model: aliases: {alias} stands for {target}, which is not stored"
        if alias in manifest.tensors.get("weights", {}):
            yield f"model: aliases: {alias} is stored itself"
    for layer in manifest.model.layers:
        for role, entry in layer.roles.items():
            if entry.tensor not in weights:
                yield f"model: layers: {layer.path}: {role} is {entry.tensor}, which is not a weight"
    for slot_name, slot in (manifest.optimizer.slots if manifest.optimizer else {}).items():
        for parameter, key in slot.tensors.items():
            if key not in manifest.tensors.get("optimizer", {}):
                yield f"optimizer: slots: {slot_name}: {parameter} is {key}, which is not stored"
    for name in residue.tensor_names(manifest.native):
        if name not in manifest.tensors.get("state", {}):
            yield f"native: refers to the tensor {name}, which is not stored"


def _is_whole(tensor: Tensor, places: AbstractSet[str]) -> bool:
    """Whether it is one chunk without a problem, as nearly all are."""
    if len(tensor.chunks) != 1:
        return False
    shape, (chunk,) = tensor.shape, tensor.chunks
    if chunk.shape != shape or chunk.offset != _ORIGINS.get(len(shape)) or chunk.file not in places:
        return False
    try:
        size_bytes(shape, _ITEMSIZES.get(tensor.dtype, 1))
    except ValueError:
        return False
    return True


def _chunk_problems(tensor: Tensor, places: AbstractSet[str]) -> Iterator[str]:
    if problem := size_problem(tensor.shape, _ITEMSIZES.get(tensor.dtype, 1)):
        yield problem
        return
    for chunk in tensor.chunks:
        if chunk.file not in places:
            yield f"lies in {chunk.file!r}, which is not among the files"
        if not len(chunk.offset) == len(chunk.shape) == len(tensor.shape) or any(
            offset < 0 or size < 0 or offset + size > whole
            for offset, size, whole in zip(chunk.offset, chunk.shape, tensor.shape, strict=False)
        ):
            yield f"chunk at {list(chunk.offset)} of shape {list(chunk.shape)} is not inside {list(tensor.shape)}"
            return
    covered = sum(math.prod(chunk.shape) for chunk in tensor.chunks)
    if covered != math.prod(tensor.shape) or not tensor.chunks:
        yield f"chunks hold {covered} elements of {math.prod(tensor.shape)}"
    elif len(tensor.chunks) > 1 and _any_overlap(tensor.chunks):
        yield "chunks overlap"


def _any_overlap(chunks: tuple[Chunk, ...]) -> bool:
    """Whether two chunks share an element. Sorted along the axis with most cuts, so that few are compared with few."""
    boxes = np.array([(chunk.offset, chunk.shape) for chunk in chunks if 0 not in chunk.shape], np.int64)
    if len(boxes) < 2:
        return False
    axis = max(range(boxes.shape[2]), key=lambda axis: len(np.unique(boxes[:, 0, axis])))
    boxes = boxes[np.argsort(boxes[:, 0, axis])]
    starts, ends = boxes[:, 0], boxes[:, 0] + boxes[:, 1]
    reach = np.searchsorted(starts[:, axis], ends[:, axis])
    return any(
        ((starts[i + 1 : stop] < ends[i]) & (starts[i] < ends[i + 1 : stop])).all(axis=1).any() for i, stop in enumerate(reach)
    )


def _deeper(tree: Any, limit: int) -> bool:
    """Whether JSON is nested deeper than `limit`, found without recursion."""
    level = [tree]
    for _ in range(limit + 1):
        level = [child for node in level if isinstance(node, dict | list) for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node


def _check_finite(members: dict[str, Any]) -> None:
    """Raise for a NaN or an infinity, which the encoder would write as null."""
    stack = [(key, value) for key, value in members.items() if key not in ("tensors", "files")]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{path}: {key}", child) for key, child in value.items()]
        elif isinstance(value, list | tuple):
            stack += [(f"{path}: {index}", child) for index, child in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise UnsupportedError(
                f"manifest: {path} is {value}, which JSON lacks; an adapter must pass schema.to_number of it"
            )


def _leftover(raw: Any, known: Any) -> Any:
    """What `raw` has and `known` lacks, nested as in `raw` (list items by index); empty where nothing is left over."""
    if raw == known:  # most of a manifest, and compared much faster than walked
        return {}
    if isinstance(raw, dict) and isinstance(known, dict):
        pairs = ((key, _leftover(value, known[key]) if key in known else value) for key, value in raw.items())
        return {key: rest for key, rest in pairs if key not in known or rest}
    if isinstance(raw, list) and isinstance(known, list) and len(raw) == len(known):
        pairs = ((str(index), _leftover(*both)) for index, both in enumerate(zip(raw, known, strict=True)))
        return {index: rest for index, rest in pairs if rest}
    return {}


def _merge(known: Any, unknown: Any) -> Any:
    """The inverse of `_leftover`."""
    if isinstance(known, dict) and isinstance(unknown, dict):
        return {**known, **{key: _merge(known[key], value) if key in known else value for key, value in unknown.items()}}
    if isinstance(known, list | tuple) and isinstance(unknown, dict):
        return [_merge(child, unknown[str(i)]) if str(i) in unknown else child for i, child in enumerate(known)]
    return known


if __name__ == "__main__":
    import sys

    json.dump(json_schema(), sys.stdout, indent=2, sort_keys=True)
    sys.stdout.write("\n")
