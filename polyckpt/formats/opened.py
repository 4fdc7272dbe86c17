"""Any checkpoint, opened: our own, or one in a format of others, as the same lazy object."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path

from polyckpt import schema, snapshot
from polyckpt.adapter import Contents
from polyckpt.checkpoint import Checkpoint, StoredTensor
from polyckpt.errors import NotACheckpointError, PolyckptError, StorageError, UnsupportedError
from polyckpt.formats import table
from polyckpt.formats.described import Like
from polyckpt.formats.reading import ReadTensor
from polyckpt.heads import FILE_NAME
from polyckpt.snapshot import Snapshot
from polyckpt.storage import local


class Captured(Checkpoint):
    """A checkpoint that is not written yet. path: where what it holds came from."""

    def __init__(self, path: Path, made: Snapshot, *, verify: bool = True) -> None:
        self.path, self.verifies, self.unknown = path, verify, {}
        self.snapshot = made
        tensors = {
            section: {name: schema.Tensor(dtype=leaf.dtype, shape=leaf.shape, chunks=()) for name, leaf in leaves.items()}
            for section, leaves in made.sections.leaves.items()
        }
        saved = datetime.datetime.fromtimestamp(path.stat().st_mtime if path.exists() else 0, datetime.UTC)
        self.manifest = schema.Manifest(
            **made.draft, saved_at_utc=saved.isoformat(timespec="seconds"), files={}, tensors=tensors
        )

    def verify(self) -> None:
        """Read every tensor, and compare the checksums of the file. Raises CorruptError for the first that is not whole."""
        for section in (self.weights, self.optimizer, self.state):
            for tensor in section.stored.values():
                tensor.verify()
                tensor.raw()

    def _section(self, section: str) -> dict[str, StoredTensor]:
        leaves = self.snapshot.sections.leaves[section]
        return {name: ReadTensor(self.path, name, leaf) for name, leaf in leaves.items()}


class Foreign(Captured):
    """A checkpoint in a format of others. format: its name. left_out: what of it is not read, one line each."""

    def __init__(self, path: Path, format: str, contents: Contents, *, verify: bool) -> None:
        made = snapshot.compose(contents)
        if contents.check is not None:
            made.sections.compare(contents.check)
        if verify:
            made.sections.check_reads()
        super().__init__(path, made, verify=verify)
        self.format, self.left_out = format, tuple(contents.left_out)


def open_(
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    like: Callable[[], Like | None] = lambda: None,
    format: str | None = None,
) -> Checkpoint:
    """The checkpoint at `path`, in whatever format it is. like: makes what its tensors may have the names of.

    Raises NotACheckpointError, CorruptError, VersionError, StorageError; UnsupportedError for what a file holds and nobody
    may read; AdapterError, naming what to install; MismatchError where a `like` that is required does not fit.
    """
    wanted = local.absolute(path)
    if format is None:
        try:
            return Checkpoint(wanted, verify=verify)
        except NotACheckpointError as error:
            if not _exists(wanted):
                raise
            refusal = error
        try:
            chosen = table.of(wanted)
        except NotACheckpointError as error:
            # Of a directory that holds checkpoints of ours, the first refusal names them.
            raise (refusal if wanted.is_dir() and FILE_NAME in str(refusal) and _holds_ours(wanted) else error) from None
    else:
        chosen = table.named(format)
    asked = like()
    if asked is not None and chosen.adapter not in ("", asked.adapter):
        if asked.required:
            raise UnsupportedError(
                f"{wanted}: {chosen.title} holds what {chosen.adapter} writes; `like` is a model of {asked.adapter}"
            )
        asked = None
    wanted = [wanted, *chosen.steps(wanted)][-1]
    try:
        contents = chosen.read(wanted, asked)
    except OSError as error:
        if isinstance(error, PolyckptError):
            raise
        raise StorageError(error.errno, f"cannot read {wanted}: {error.strerror or error}") from error
    return Foreign(wanted, chosen.name, contents, verify=verify)


def _exists(path: Path) -> bool:
    # A TensorFlow checkpoint is named by what its files begin with.
    return path.exists() or path.with_name(f"{path.name}.index").exists()


def _holds_ours(path: Path) -> bool:
    return any((child / FILE_NAME).is_file() for child in path.iterdir())
