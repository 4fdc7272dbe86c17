"""NumPy's .npz: an archive of .npy files, one for each array, under the names that their producer gave them."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from polyckpt.adapter import Contents
from polyckpt.dtypes import lookup, size_problem
from polyckpt.errors import CheckpointError, CorruptError, UnsupportedError
from polyckpt.formats.archives import BROKEN, check_count
from polyckpt.formats.described import Like, contents_of
from polyckpt.formats.table import Format
from polyckpt.formats.writing import Source
from polyckpt.leaves import Leaf

_SUFFIX = ".npy"


def recognises(path: Path) -> bool:
    """Whether it is a zip archive of .npy files and nothing else."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except BROKEN:
        return False
    return bool(names) and all(name.endswith(_SUFFIX) for name in names)


def read(path: Path, like: Like | None) -> Contents:
    """The arrays of an archive; each is read when it is asked for. Arrays of Python objects are refused: they are pickles."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_count(path, archive)
            infos = {info.filename.removesuffix(_SUFFIX): info for info in archive.infolist()}
            if len(infos) != len(archive.infolist()):
                raise CorruptError(f"{path}: a name occurs twice in the archive")
            leaves = {name: _leaf(path, archive, name, info) for name, info in infos.items()}
    except BROKEN as error:
        raise CorruptError(f"{path}: not a whole .npz: {error}") from error
    return contents_of(leaves, like, adapter="numpy", type="numpy.lib.npyio.NpzFile")


def _leaf(path: Path, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> Leaf:
    with archive.open(info) as file:
        try:
            shape, _, dtype = header(file)
        except ValueError as error:
            raise CorruptError(f"{path}: {name}: {error}") from error
        held = info.file_size - file.tell()
    if dtype.hasobject:
        raise UnsupportedError(f"{path}: {name}: an array of Python objects, which are pickled; save numbers and strings apart")
    if problem := size_problem(shape, dtype.itemsize):
        raise CorruptError(f"{path}: {name}: {problem}")
    expected = math.prod(shape) * dtype.itemsize
    if expected != held:
        raise CorruptError(f"{path}: {name}: {dtype}{list(shape)} is {expected} bytes, the archive has {held}")

    def read_array() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as again, again.open(info.filename) as file:
                array = npy.read_array(file, allow_pickle=False)
                file.read(1)  # at its end the archive compares its checksum
        except MemoryError as error:
            raise CheckpointError(f"{path}: {name}: {dtype}{list(shape)}: {error}") from error
        except BROKEN as error:
            raise CorruptError(f"{path}: {name}: {str(error) or 'it ends too early'}") from error
        return np.ascontiguousarray(array.astype(little, copy=False))

    little = dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype
    if little.kind == "V":
        raise UnsupportedError(f"{path}: {name}: {dtype}: NumPy has no such numbers, and kept their bytes alone (bfloat16?)")
    known = lookup(little.name, f"{path}: {name}")
    return Leaf(dtype=known.name, shape=shape, read=read_array, frozen=True)


def header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it goes column by column, and type of the array that begins here.

    Raises ValueError for what NumPy did not write: its own parser raises whatever Python's does.
    """
    try:
        version = npy.read_magic(file)
        shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    except Exception as error:
        raise ValueError(f"no array that NumPy wrote: {error}") from error
    return shape, fortran, dtype


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
