"""Directories of torch.distributed.checkpoint, read by one process: the chunks of each tensor put together again.

Its index is a pickle, which could name any function: here it is read with those classes alone of which an index consists.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata

from polyckpt.adapter import Contents
from polyckpt.adapters.torch import files, pickles
from polyckpt.errors import CorruptError, UnsupportedError
from polyckpt.formats.described import Like
from polyckpt.formats.torch_files import METADATA

_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "MetadataIndex",
            "StorageMeta",
        )
    },
    **{(filesystem.__name__, name): getattr(filesystem, name) for name in ("_StorageInfo", "_StoragePrefix")},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    # Where it was written, which opens nothing.
    **{(module, name): PurePosixPath for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
"""Everything that an index may name."""


class _Unpickler(pickle._Unpickler):
    """Builds what `_ALLOWED` names. The one in Python, whose steps can be told apart."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsupportedError(f"it names {module}.{name}, which no index of torch.distributed.checkpoint does") from None

    def _build(self) -> None:
        # The state of a class is what all of this process use.
        if isinstance(self.stack[-2], type):  # type: ignore[attr-defined]
            raise UnsupportedError(f"it would change the class {self.stack[-2].__name__}")  # type: ignore[attr-defined]
        self.load_build()  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}


def read(path: Path, like: Like | None) -> Contents:
    """The contents of a directory, as of a file of torch.save that holds the same."""
    index = _index(path)
    found = {name: _value(path, name, stored, index) for name, stored in index.state_dict_metadata.items()}
    return files.contents_of(path, files.parts_of(_nested(path, found, index.planner_data)), like)


def _index(path: Path) -> metadata.Metadata:
    try:
        with open(path / METADATA, "rb") as file:
            index = _Unpickler(file).load()
    except UnsupportedError as error:
        raise UnsupportedError(f"{path / METADATA}: {error}, so it is not read") from error
    except Exception as error:  # a pickle fails in as many ways as there are
        raise CorruptError(f"{path / METADATA}: not the index of torch.distributed.checkpoint: {error}") from error
    if not isinstance(index, metadata.Metadata) or not isinstance(index.storage_data, dict):
        raise CorruptError(f"{path / METADATA}: not the index of torch.distributed.checkpoint")
    return index


def _value(path: Path, name: str, stored: Any, index: metadata.Metadata) -> Any:
    where = {key: info for key, info in index.storage_data.items() if key.fqn == name}
    if isinstance(stored, metadata.BytesStorageMetadata):
        return _part(path, name, next(iter(where.values()), None))
    whole = torch.empty(stored.size, dtype=stored.properties.dtype)
    covered = 0
    for chunk in stored.chunks:
        info = next((info for key, info in where.items() if key.offset is None or key.offset == chunk.offsets), None)
        part = _part(path, name, info)
        if not isinstance(part, torch.Tensor) or tuple(part.shape) != tuple(chunk.sizes) or part.dtype != whole.dtype:
            raise CorruptError(f"{path}: {name}: a chunk is not the tensor of shape {list(chunk.sizes)} that the index says")
        box = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = part
        covered += part.numel()
    if covered != whole.numel():
        raise CorruptError(f"{path}: {name}: its chunks hold {covered} of {whole.numel()} elements")
    return whole


def _part(path: Path, name: str, info: Any) -> Any:
    """What one item of a file of data holds."""
    if info is None:
        raise CorruptError(f"{path}: {name}: the index does not say where it lies")
    if Path(info.relative_path).name != info.relative_path or info.relative_path in (".", ".."):
        raise CorruptError(f"{path}: {name}: lies in {info.relative_path!r}, which is not the name of a file in the directory")
    source = path / info.relative_path
    try:
        with open(source, "rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
    except OSError as error:
        raise CorruptError(f"{source}: {error.strerror}, but the index says that {name} is in it") from error
    if len(data) != info.length:
        raise CorruptError(f"{source}: {name}: {len(data)} of {info.length} bytes are there")
    return pickles.load_stream(io.BytesIO(data), f"{source}: {name}")


def _nested(path: Path, found: Mapping[str, Any], paths: Any) -> dict[str, Any]:
    """The tree that was flattened into names; where its paths are not known, a flat one."""
    tree: dict[Any, Any] = {}
    for name, value in found.items():
        segments = paths.get(name, (name,)) if isinstance(paths, dict) else (name,)
        node = tree
        for segment in segments[:-1]:
            node = node.setdefault(segment, {})
            if not isinstance(node, dict):
                raise CorruptError(f"{path}: {name} lies inside of another value")
        node[segments[-1]] = value
    return {str(name): _listed(value) for name, value in tree.items()}


def _listed(node: Any) -> Any:
    """The state of an optimizer as it was before its groups, a list, and the numbers of its parameters became texts."""
    if not isinstance(node, dict):
        return node
    children = {key: _listed(value) for key, value in node.items()}
    if "param_groups" in children and isinstance(children["param_groups"], dict):
        groups = children["param_groups"]
        children["param_groups"] = [groups[key] for key in sorted(groups, key=int)]
        if isinstance(children.get("state"), dict):
            children["state"] = {int(key) if str(key).isdecimal() else key: each for key, each in children["state"].items()}
    return children
