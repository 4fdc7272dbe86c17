"""Files of Keras 3: `.keras` archives, `.weights.h5`, and sharded `.weights.json`; read safely, with h5py alone.

In all of them a variable is a dataset whose path says where in the model it is: "layers/dense/vars/0".
"""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import structs

from polyckpt.dtypes import lookup
from polyckpt.errors import AdapterError, CorruptError, UnsupportedError
from polyckpt.formats.archives import BROKEN, EntryCheck
from polyckpt.formats.table import Format
from polyckpt.leaves import Leaf

CONFIG, WEIGHTS_IN_ARCHIVE = "config.json", "model.weights.h5"
MAX_JSON_BYTES = 1 << 28
MAX_PATH_LENGTH = 1024
_HDF5 = b"\x89HDF\r\n\x1a\n"
_OPTIMIZER = re.compile(r"optimizer/vars/(\d+)$")


def is_archive(path: Path) -> bool:
    """Whether it is a zip archive of a configuration and weights."""
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {CONFIG, WEIGHTS_IN_ARCHIVE} <= set(archive.namelist())
    except BROKEN:
        return False


def is_weights(path: Path) -> bool:
    """Whether it is an HDF5 file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_HDF5)) == _HDF5


def is_shards(path: Path) -> bool:
    """Whether it is the index of shards: JSON that maps paths of variables to files."""
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        return False
    with open(path, "rb") as file:
        if file.read(64).lstrip()[:1] != b"{":
            return False
    try:
        told = msgspec.json.decode(path.read_bytes(), type=dict[str, Any]).get("weight_map")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(told, dict) and any(name.startswith("/") for name in told)


def is_folder(path: Path) -> bool:
    """Whether it is a directory of the same, as `save(..., zipped=False)` makes one."""
    return path.is_dir() and (path / CONFIG).is_file() and is_weights(path / WEIGHTS_IN_ARCHIVE)


class Datasets:
    """The variables of a file: `weights` by the path of their dataset, `optimizer` in order. config: of the model, or None."""

    def __init__(self, path: Path) -> None:
        """Open an archive or a folder, a file of weights or an index. Raises CorruptError, UnsupportedError or AdapterError."""
        self.path = path
        self.config: dict[str, Any] | None = None
        if is_archive(path):
            self.config = _config_in_archive(path)
            check = EntryCheck(path, WEIGHTS_IN_ARCHIVE)
            found = {name: structs.replace(leaf, check=check) for name, leaf in _datasets(path, *_stored(path)).items()}
        elif is_folder(path):
            self.config = _config(path / CONFIG)
            found = _datasets(path / WEIGHTS_IN_ARCHIVE)
        elif is_shards(path):
            found = _shards(path)
        else:
            found = _datasets(path)
        slots = {int(match[1]): name for name in found if (match := _OPTIMIZER.match(name))}
        if sorted(slots) != list(range(len(slots))):
            raise CorruptError(
                f"{path}: of the optimizer's variables only {sorted(slots)} are there. Of a sharded file open the .weights.json"
            )
        self.optimizer = [found[slots[index]] for index in range(len(slots))]
        # One that wraps another lists its variables too, and Keras writes them once more below that.
        self.weights = {name: leaf for name, leaf in found.items() if not name.startswith("optimizer/")}


def _config_in_archive(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for name in (CONFIG, WEIGHTS_IN_ARCHIVE):
            if names.count(name) != 1:
                raise CorruptError(f"{path}: {name} occurs {names.count(name)} times")
        size_bytes = archive.getinfo(CONFIG).file_size
        if size_bytes > MAX_JSON_BYTES:
            raise CorruptError(f"{path}: {CONFIG} claims {size_bytes} bytes; at most {MAX_JSON_BYTES} are read")
        try:
            with archive.open(CONFIG) as file:
                text = file.read(MAX_JSON_BYTES + 1)
        except BROKEN as error:
            raise CorruptError(f"{path}: {CONFIG}: not the bytes that the archive was written with: {error}") from error
    return _decoded(text, f"{path}: {CONFIG}")


def _config(path: Path) -> dict[str, Any]:
    size_bytes = path.stat().st_size
    if size_bytes > MAX_JSON_BYTES:
        raise CorruptError(f"{path}: {size_bytes} bytes; at most {MAX_JSON_BYTES} are read")
    return _decoded(path.read_bytes(), str(path))


def _decoded(text: bytes, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(f"{where}: not an object of JSON: {error}") from error


def _stored(path: Path) -> tuple[int, int]:
    """Where in an archive the weights begin, and their size. Keras does not compress them; what is may be of any size."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(WEIGHTS_IN_ARCHIVE)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise UnsupportedError(
            f"{path}: {WEIGHTS_IN_ARCHIVE} is compressed or encrypted, which Keras does not do, and may be of any size: unpack "
            "the archive, and load the .weights.h5 in it"
        )
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CorruptError(f"{path}: {WEIGHTS_IN_ARCHIVE} is not where the archive says")
        name, extra = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > path.stat().st_size:
        raise CorruptError(f"{path}: {WEIGHTS_IN_ARCHIVE} claims {info.file_size} bytes, more than the file has")
    return start, info.file_size


class _Part(io.RawIOBase):
    """A part of a file as a file. HDF5 reads through it, and so neither locks the file nor keeps others from writing it."""

    def __init__(self, path: Path, start: int, size_bytes: int | None) -> None:
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115, which `close` does
        self._state = self._now()
        self.size_bytes = self._state[0] if size_bytes is None else size_bytes
        self._start, self._at = start, 0

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raises CorruptError where the file was written to since it was opened."""
        if self._now() != self._state:
            raise CorruptError(f"{self._path}: was written to after it had been opened: open it again")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size_bytes}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        wanted = memoryview(buffer)[: max(0, self.size_bytes - self._at)]
        count = self._file.readinto(wanted) or 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _shards(path: Path) -> dict[str, Leaf]:
    told: Mapping[str, Any] = msgspec.json.decode(path.read_bytes())["weight_map"]
    found: dict[str, Leaf] = {}
    inside: dict[str, dict[str, Leaf]] = {}
    for group, where in told.items():
        for name in where if isinstance(where, list) else [where]:
            if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
                raise CorruptError(f"{path}: {name!r} is not the name of a file beside it")
            shard = path.with_name(name)
            if not shard.is_file():
                raise CorruptError(f"{shard}: missing, but {path.name} says that {group} is in it")
            if name not in inside:
                inside[name] = _datasets(shard)
            found |= {each: leaf for each, leaf in inside[name].items() if each.startswith(f"{group.strip('/')}/")}
    return found


_UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
"""What h5py raises for a file that is damaged."""

_OF_KERAS_2 = {"model_config": "a whole model", "layer_names": "weights"}
"""Attribute of the root of a file -> what of Keras 2 it is."""


def _datasets(path: Path, start: int = 0, size_bytes: int | None = None) -> dict[str, Leaf]:
    """Every dataset of an HDF5 file by its path. What does not lie in the file itself is refused, and never followed."""
    try:
        import h5py
    except ImportError as error:
        raise AdapterError(f"files of Keras need h5py: {error}. Install it with: pip install 'polyckpt[keras]'") from error
    part = _Part(path, start, size_bytes)
    try:
        file = h5py.File(part, "r")
        for attribute, what in _OF_KERAS_2.items():
            if attribute in file.attrs:
                raise UnsupportedError(
                    f"{path}: {what} in the HDF5 format of Keras 2: load it in Keras, and save it as .keras or .weights.h5"
                )
        nodes = dict(_walk(path, file, h5py))
        leaves = {name: _leaf(path, name, node, part) for name, node in nodes.items()}
        claimed = sum(node.nbytes for node in nodes.values())
        if claimed > part.size_bytes:
            raise CorruptError(f"{path}: its datasets claim {claimed} bytes, and all of it has {part.size_bytes}")
        return leaves
    except _UNREADABLE as error:
        raise CorruptError(f"{path}: HDF5 cannot read it: {error}") from error


def _walk(path: Path, root: Any, h5py: Any) -> Iterator[tuple[str, Any]]:
    """The datasets below a group, each with its path. Raises UnsupportedError for what is not plain data in this very file."""
    seen = {_address(root, h5py): "the root"}
    groups = [("", root)]
    while groups:
        prefix, group = groups.pop(0)
        for name in group:
            at = f"{prefix}{name}"
            if len(at) > MAX_PATH_LENGTH:
                raise CorruptError(f"{path}: {at[:80]}...: a path of more than {MAX_PATH_LENGTH} characters")
            link = group.get(name, getlink=True)
            if link is None:
                raise CorruptError(f"{path}: {at!r} is listed in its group, and is not there")
            if not isinstance(link, h5py.HardLink):
                raise UnsupportedError(
                    f"{path}: {at} is a link to {getattr(link, 'filename', '')} {link.path}, which is not followed"
                )
            node = group[name]
            if (first := seen.setdefault(_address(node, h5py), at)) != at:
                raise UnsupportedError(f"{path}: {at} is {first} once more, which Keras does not write")
            if isinstance(node, h5py.Group):
                groups.append((f"{at}/", node))
            elif not isinstance(node, h5py.Dataset):
                raise UnsupportedError(f"{path}: {at} is neither a group nor a dataset")
            elif node.external or node.is_virtual:
                raise UnsupportedError(f"{path}: {at} keeps its data in other files, which are not read")
            else:
                yield at, node


def _address(node: Any, h5py: Any) -> int:
    return int(h5py.h5o.get_info(node.id).addr)


def _leaf(path: Path, name: str, dataset: Any, part: _Part) -> Leaf:
    # Keras writes bfloat16, which HDF5 lacks, as two bytes without a type.
    stated = dataset.attrs.get("dtype")
    dtype = lookup(stated if isinstance(stated, str) else dataset.dtype.name, f"{path}: {name}")
    if dataset.shape is None or dtype.itemsize != dataset.dtype.itemsize:
        raise CorruptError(f"{path}: {name}: says it is {dtype.name}, but is {dataset.dtype}{dataset.shape}")
    if dataset.compression is not None:
        raise UnsupportedError(
            f"{path}: {name} is compressed, which Keras does not do, and may be of any size: h5repack -f NONE undoes it"
        )
    if dataset.id.get_storage_size() < dataset.nbytes:
        raise CorruptError(f"{path}: {name}: {dataset.nbytes} bytes, of which {dataset.id.get_storage_size()} are there")

    def read() -> np.ndarray:
        part.check_unchanged()
        try:
            array = np.ascontiguousarray(dataset[()])
        except _UNREADABLE as error:
            raise CorruptError(f"{path}: {name}: {error}") from error
        little = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
        return array.astype(little, copy=False).reshape(-1).view(np.uint8)

    return Leaf(dtype=dtype.name, shape=tuple(dataset.shape), read=read, frozen=True)


_READER, _WRITER = "polyckpt.adapters.keras.files:read", "polyckpt.adapters.keras.files:write"

ARCHIVE = Format(
    name="keras",
    title="a .keras file",
    adapter="keras",
    recognises=lambda path: is_archive(path) or is_folder(path),
    reader=_READER,
    writer=f"{_WRITER}_archive",
    suffixes=(".keras",),
    needs="polyckpt[keras]",
)
WEIGHTS = Format(
    name="keras-weights",
    title="a .weights.h5 of Keras",
    adapter="keras",
    recognises=is_weights,
    reader=_READER,
    writer=f"{_WRITER}_weights",
    suffixes=(".weights.h5",),
    needs="polyckpt[keras]",
)
SHARDS = Format(
    name="keras-shards",
    title="the index of a sharded .weights.json of Keras",
    adapter="keras",
    recognises=is_shards,
    reader=_READER,
    needs="polyckpt[keras]",
)
