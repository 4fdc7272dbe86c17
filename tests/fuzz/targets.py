"""What is done with bytes from nowhere. A target returns whether they were accepted; another error than ours is a defect."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec

from polyckpt import manifest as manifest_file
from polyckpt.checksums import checksum
from polyckpt.errors import PolyckptError, UnsupportedError
from polyckpt.heads import decode_head
from polyckpt.history import FILE_NAME, History
from polyckpt.storage.tensor_file import TensorFileReader

PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
atexit.register(shutil.rmtree, PLACE, ignore_errors=True)


def sealed(body: bytes) -> bytes:
    """The bytes of a manifest up to its last member, sealed as by somebody who can compute a checksum."""
    return body + b',\n  "checksum": "' + checksum(body).encode() + b'"\n}\n'


def sealed_line(body: bytes) -> bytes:
    """A line of a history, as by the same."""
    return body + b',"checksum":"' + checksum(body).encode() + b'"}\n'


def manifest(data: bytes) -> bool:
    """As they are, and sealed. What is accepted must come back from its own encoding, but for numbers that JSON lacks."""
    accepted = False
    for whole in (data, sealed(data)):
        with contextlib.suppress(PolyckptError):
            decode_head(whole, "m")
        try:
            decoded = manifest_file.decode(whole, "m")
        except PolyckptError:
            continue
        accepted = True
        with contextlib.suppress(UnsupportedError):
            again = manifest_file.decode(manifest_file.encode(decoded.manifest, decoded.unknown), "m")
            assert msgspec.json.encode(again.manifest) == msgspec.json.encode(decoded.manifest)
    return accepted


def tensor_file(data: bytes) -> bool:
    """As a file, and as a header that states its own length before some bytes."""
    accepted = False
    for whole in (data, struct.pack("<Q", len(data)) + data, struct.pack("<Q", len(data)) + data + bytes(64)):
        (PLACE / "x.safetensors").write_bytes(whole)
        try:
            reader = TensorFileReader(PLACE, "x.safetensors")
        except PolyckptError:
            continue
        accepted = True
        assert sum(len(reader.raw(key)) for key in reader.entries) == len(whole) - 8 - struct.unpack("<Q", whole[:8])[0]
    return accepted


def history(data: bytes) -> bool:
    """As they are, and each line sealed. What can be read is told in order."""
    told = []
    for whole in (data, b"".join(sealed_line(line) for line in data.split(b"\n"))):
        (PLACE / FILE_NAME).write_bytes(whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = History(PLACE).read()
        sequences = [record.sequence for record in read.records]
        assert sequences == sorted(set(sequences))
        told += read.records
    return bool(told)


TARGETS: dict[str, Callable[[bytes], bool]] = {"manifest": manifest, "tensor_file": tensor_file, "history": history}
