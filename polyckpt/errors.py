"""Every exception that polyckpt raises.

::

    PolyckptError
    ├── CheckpointError              what lies on disk cannot be used
    │   ├── NotACheckpointError      nothing that looks like a checkpoint (also FileNotFoundError)
    │   ├── CorruptError             a checkpoint, but bytes are missing, changed or contradictory
    │   └── VersionError             written to a major version of the format that this library does not know
    ├── CheckpointExistsError        the target of a save is taken (also FileExistsError)
    ├── StorageError                 the file system refused a read or a write (also OSError)
    ├── UnsupportedError             an object or a value that cannot be stored, named with the reason
    ├── MismatchError                the checkpoint and the live objects do not fit; `.problems` lists every entry
    │   ├── AmbiguityError           which tensor is which cannot be told, and a guess is not made
    │   └── ParityError              the converted model does not compute what the one that was saved did
    ├── PlanError                    rules or a plan that cannot be followed (also ValueError)
    ├── AdapterError                 no adapter for an object, or its framework is not installed
    ├── PolicyError                  a policy, or a metric for one, that decides nothing (also ValueError)
    └── RunError                     a call that contradicts the run in a manager's directory
        └── LockedError              another manager writes to the directory
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


class PolyckptError(Exception):
    """Base class of every error raised by polyckpt."""


class CheckpointError(PolyckptError):
    """What lies on disk cannot be used."""


class NotACheckpointError(CheckpointError, FileNotFoundError):
    """The path holds nothing that looks like a checkpoint."""


class CorruptError(CheckpointError):
    """A checkpoint whose bytes are missing, changed or contradictory."""


class VersionError(CheckpointError):
    """A checkpoint of a major format version that this library does not know."""


class CheckpointExistsError(PolyckptError, FileExistsError):
    """The target of a save is taken and `overwrite` is off, or is something that is never overwritten."""


class StorageError(PolyckptError, OSError):
    """The file system refused a read or a write; `errno` is that of the system call."""


class UnsupportedError(PolyckptError):
    """An object or a value that cannot be stored; the message names it and says why."""


class AdapterError(PolyckptError):
    """No adapter handles an object, or the framework it needs is not installed."""


class PolicyError(PolyckptError, ValueError):
    """A policy, or a metric for one, by which nothing can be decided; the message says what would do."""


class RunError(PolyckptError):
    """A call that contradicts the run in a manager's directory: steps that go back, checkpoints of another run."""


class LockedError(RunError):
    """Another manager writes to the directory; the message names its process and host."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One entry on which a checkpoint and the live objects differ.

    kind: `missing` (in the live objects only), `unexpected` (in the checkpoint only), `shape`, `dtype`,
    or `value` (anything else that must agree).
    """

    kind: Literal["missing", "unexpected", "shape", "dtype", "value"]
    section: str
    name: str
    stored: str = "absent"
    live: str = "absent"

    def __str__(self) -> str:
        return f"{self.kind:<10} {self.section}: {self.name}: checkpoint has {self.stored}, live object has {self.live}"


class MismatchError(PolyckptError):
    """The checkpoint and the live objects do not fit. Nothing was written to the live objects."""

    def __init__(self, summary: str, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([summary, *(f"  {problem}" for problem in self.problems)]))


class AmbiguityError(MismatchError):
    """Which tensor is which cannot be told from the two models; the message lists what is alike and how to settle it."""


class ParityError(MismatchError):
    """A converted model does not compute what the one that was saved did; the message names the first layer that diverges."""


class PlanError(PolyckptError, ValueError):
    """Rules or a plan that cannot be followed: they name what is not there, fit nothing, or contradict each other."""
