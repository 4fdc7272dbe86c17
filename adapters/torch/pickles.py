"""Reading what torch.save wrote with weights_only, which builds tensors, containers and plain values, and runs nothing."""

from __future__ import annotations

import errno
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from polyckpt.adapters.torch import plain_values
from polyckpt.errors import CorruptError, UnsupportedError
from polyckpt.formats import archives
from polyckpt.formats.archives import Records
from polyckpt.formats.torch_files import LEGACY_MAGIC, begins_archive

_WITH_DATA = re.compile(r"[^/]+/data/[^/]+")
"""Names of the records of an archive that are tensors."""


def load_file(path: Path, records: Records | None = None) -> Any:
    """What torch.save wrote, its tensors mapped where they can be. records: gets the checksums of those.

    Raises UnsupportedError, naming what would have to run, and CorruptError.
    """
    if not begins_archive(path):
        with open(path, "rb") as file:
            if file.read(len(LEGACY_MAGIC)) != LEGACY_MAGIC:
                raise UnsupportedError(
                    f"{path}: a pickle that torch.save did not write, which may run anything when it is read: if you trust it, "
                    "read it where it was written and save it with torch.save, or polyckpt.save"
                )
            file.seek(0)
            return _load(file, str(path), mmap=False)
    _examine(path, records)
    if path.suffix == ".safetensors":  # which torch takes for one, whatever is in it
        with open(path, "rb") as file:
            return _load(file, str(path), mmap=False)
    return _load(str(path), str(path), mmap=True)


def load_stream(stream: IO[bytes], where: str) -> Any:
    """As `load_file`, of what lies in memory."""
    if zipfile.is_zipfile(stream):
        archives.check_all(stream, where)
    stream.seek(0)
    return _load(stream, where, mmap=False)


def _examine(path: Path, records: Records | None) -> None:
    """Compare all of an archive but tensors with its checksums, and refuse what is no checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
            if any(record.filename.endswith("/constants.pkl") for record in found):
                raise UnsupportedError(
                    f"{path}: a TorchScript archive, which holds code: load it with torch.jit.load and save its state_dict()"
                )
            if packed := [record.filename for record in found if record.compress_type != zipfile.ZIP_STORED]:
                raise UnsupportedError(
                    f"{path}: {packed[0]} is compressed, which torch.save never does: unpack it and pack it with zip -0"
                )
            if any(record.CRC for record in found):
                for record in found:
                    if not _WITH_DATA.fullmatch(record.filename):
                        archive.read(record)
    except (*archives.BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a place before the beginning
            raise
        raise CorruptError(f"{path}: a damaged archive of torch.save, or a part of one: {error}") from error
    if records is not None:
        records.add(path, [record for record in found if _WITH_DATA.fullmatch(record.filename)])


def _load(source: Any, where: str, *, mmap: bool) -> Any:
    try:
        with plain_values.readable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, and of storages of old
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        return plain_values.plain(loaded)
    except OSError:
        raise
    except Exception as error:  # torch raises whatever the parts of the file lead to
        told = str(error)
        if type(error).__name__ == "UnpicklingError" and (wanted := re.search(r"GLOBAL ([\w.]+)", told)):
            raise UnsupportedError(
                f"{where}: it is a pickle that needs {wanted[1]} to be run, which a file from a stranger may abuse, so it is "
                "not read. Save state dicts alone (torch.save(model.state_dict(), ...)); or, if you trust the file, name the "
                "class with torch.serialization.add_safe_globals([...]) before you load it"
            ) from error
        raise CorruptError(f"{where}: torch cannot read it: {_reason(told)}") from error


def _reason(told: str) -> str:
    """What torch says, without what it says of every pickle."""
    told = told.rpartition("WeightsUnpickler error:")[2].strip() or "no reason given"
    reason = told.splitlines()[0][:300]
    if reason.startswith("Unsupported operand"):
        reason += " (it is damaged, or was saved with another pickle_protocol than torch's own: then save it again without)"
    return reason
