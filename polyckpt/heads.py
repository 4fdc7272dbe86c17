"""The head of a manifest: its format, its version, the seal over its bytes, and what a list of checkpoints tells of it.

It needs neither NumPy nor what describes tensors, so that a run is listed at once.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

import msgspec

from polyckpt.checksums import PREFIX, checksum
from polyckpt.errors import CorruptError, VersionError
from polyckpt.schema import FORMAT_MAJOR, FORMAT_MINOR, FORMAT_NAME, Head

FILE_NAME = "manifest.json"
MAX_BYTES = 1 << 30
VERSION = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"

_SEAL = re.compile(rb',\n  "checksum": "' + PREFIX.encode() + rb'[0-9a-f]{32}"\n}\n\Z')


def decode_head(data: bytes, source: str) -> Head:
    """When a checkpoint was saved and how good it was. Raises as `manifest.decode` does, but reads no further.

    A time that is none is a CorruptError too, since what is kept and when to save go by it.
    """
    sealed(data, source)
    try:
        head = msgspec.json.decode(data, type=Head)
        datetime.datetime.fromisoformat(head.saved_at_utc)
    except msgspec.ValidationError as error:
        raise CorruptError(f"{source}: {error}") from error
    except ValueError as error:
        raise CorruptError(f"{source}: saved_at_utc is no time") from error
    return head


class _Stated(msgspec.Struct):
    format: Any = None
    version: Any = None


def sealed(data: bytes, source: str) -> bytes:
    """What the seal of a manifest covers, after its format, its version and the seal itself were found right."""
    try:
        stated = msgspec.json.decode(data, type=_Stated)
    except msgspec.ValidationError:
        stated = _Stated()  # JSON, and no object
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptError(f"{source}: not JSON, so truncated or damaged: {error}") from error
    if stated.format != FORMAT_NAME:
        raise CorruptError(f'{source}: no member "format": "{FORMAT_NAME}", so not a manifest or a damaged one')
    check_version(stated.version, source)
    return check_seal(data, source)


def check_version(version: Any, source: str) -> None:
    """Raise VersionError for a major version from the future, CorruptError for what is no version."""
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", version):
        raise CorruptError(f'{source}: "version" is {version!r}, not "major.minor"')
    if int(version.split(".")[0]) != FORMAT_MAJOR:
        raise VersionError(
            f"{source}: written in format version {version}; this library reads {FORMAT_MAJOR}.x (it writes {VERSION}). "
            "Install a polyckpt that reads it"
        )


def check_seal(data: bytes, source: str) -> bytes:
    """What the seal of a manifest covers. Raises CorruptError where that is not what was sealed."""
    seal = _SEAL.search(data, max(0, len(data) - 200))
    if seal is None:
        raise CorruptError(f'{source}: does not end in its "checksum", so it was truncated or rewritten')
    body = data[: seal.start()]
    stated, actual = seal[0][-37 - len(PREFIX) + 1 : -4].decode(), checksum(body)
    if stated != actual:
        raise CorruptError(f"{source}: its checksum is {stated} but its bytes have {actual}: it was damaged or edited")
    return body
