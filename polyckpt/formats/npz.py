"""NumPy's .npz: an archive of .npy files, one for each array, under the names that their producer gave them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from polyckpt.adapter import Contents
from polyckpt.dtypes import lookup
from polyckpt.errors import CorruptError, UnsupportedError
from polyckpt.formats.described import Like, contents_of
from polyckpt.formats.table import Format
from polyckpt.formats.writing import Source
from polyckpt.leaves import Leaf

_SUFFIX = ".npy"


def recognises(path: Path) -> bool:
    """Whether it is a zip archive of .npy files and nothing else."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(_SUFFIX) for name in names)


def read(path: Path, like: Like | None) -> Contents:
    """The arrays of an archive; each is read when it is asked for. Arrays of Python objects are refused: they are pickles."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename.removesuffix(_SUFFIX): info for info in archive.infolist()}
            if len(infos) != len(archive.infolist()):
                raise CorruptError(f"{path}: a name occurs twice in the archive")
            leaves = {name: _leaf(path, archive, name, info) for name, info in infos.items()}
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise CorruptError(f"{path}: not a whole .npz: {error}") from error
    return contents_of(leaves, like, adapter="numpy", type="numpy.lib.npyio.NpzFile")


def _leaf(path: Path, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> Leaf:
    with archive.open(info) as file:
        shape, dtype = _header(path, name, file)
        held = info.file_size - file.tell()
    if dtype.hasobject:
        raise UnsupportedError(f"{path}: {name}: an array of Python objects, which are pickled; save numbers and strings apart")
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if expected != held:
        raise CorruptError(f"{path}: {name}: {dtype}{list(shape)} is {expected} bytes, the archive has {held}")

    def read_array() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as again, again.open(info.filename) as file:
                return np.ascontiguousarray(npy.read_array(file, allow_pickle=False))
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise CorruptError(f"{path}: {name}: {error}") from error

    little = dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype
    known = lookup(little.name, f"{path}: {name}")
    return Leaf(dtype=known.name, shape=shape, read=lambda: read_array().astype(little, copy=False), frozen=True)


def _header(path: Path, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = npy.read_magic(file)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = reader(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{path}: {name}: not an array that NumPy wrote: {error}") from error
    return shape, dtype


def write(source: Source, target: Path) -> None:
    """Write the weights; `numpy.load` reads them. Raises UnsupportedError for types that NumPy has no name for."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, tensor in source.checkpoint.weights.stored.items():
            array = tensor.numpy()
            if array.dtype.kind == "V" or array.dtype.name not in np.sctypeDict:
                raise UnsupportedError(f"{name}: .npz cannot hold {tensor.dtype}: NumPy itself has no such type")
            with archive.open(name + _SUFFIX, "w", force_zip64=True) as file:
                npy.write_array(file, array, allow_pickle=False)


FILE = Format(
    name="npz",
    title="NumPy .npz",
    adapter="",
    recognises=recognises,
    reader="polyckpt.formats.npz:read",
    writer="polyckpt.formats.npz:write",
    suffixes=(".npz",),
)
