"""The formats that there are, and which of them a path is in.

Formats are entry points of the group "polyckpt.formats": the name is what `format=` and `--to` take, the value a `Format`.
So a further framework brings those of its own, and nothing here changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from polyckpt.errors import AdapterError, NotACheckpointError, StorageError, UnsupportedError

GROUP = "polyckpt.formats"
_LISTED = 100
"""Of a directory that is no checkpoint so many entries are looked at, whether they are."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of others.

    name: what `format=` and `--to` take. title: for people. adapter: whose names and layouts it holds, "" for anybody's.
    recognises: tells by the content of a file or directory, reading little, importing no framework. reader: "module:function",
    called as read(path, like) -> Contents. writer: likewise, as write(source, target), "" where it cannot be written.
    suffixes: of the names of such files; only for choosing a format to write. needs: what to install, as pip calls it.
    steps: the checkpoints in a directory of many of a run, oldest first; what opens it opens the newest.
    """

    name: str
    title: str
    adapter: str
    recognises: Callable[[Path], bool]
    reader: str
    writer: str = ""
    suffixes: tuple[str, ...] = ()
    needs: str = ""
    steps: Callable[[Path], Sequence[Path]] = lambda path: ()

    def read(self, path: Path, like: Any) -> Any:
        """The `Contents` of a path. Raises AdapterError, naming what to install, and as readers do."""
        return self._call(self.reader, path, like)

    def write(self, source: Any, target: Path) -> None:
        """Write a `Source`. Raises UnsupportedError where the format cannot be written, or does not hold what there is."""
        if not self.writer:
            writable = ", ".join(name for name, each in sorted(formats().items()) if each.writer)
            raise UnsupportedError(f"{self.title} can be read, not written; these can be: {writable}")
        self._call(self.writer, source, target)

    def _call(self, where: str, *arguments: Any) -> Any:
        return call(where, self.title, self.needs, *arguments)


def call(where: str, title: str, needs: str, *arguments: Any) -> Any:
    """Call "module:function", which reads or writes a `title`. Raises AdapterError, naming what to install for it."""
    module, _, function = where.partition(":")
    try:
        called = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("polyckpt"):
            raise
        raise AdapterError(
            f"{title} needs a package that cannot be imported: {error}. Install it with: pip install '{needs}'"
        ) from error
    return called(*arguments)


@cache
def formats() -> dict[str, Format]:
    """Every registered format by name."""
    from importlib.metadata import entry_points

    return {entry.name: entry.load() for entry in entry_points(group=GROUP)}


def named(name: str) -> Format:
    """The format of this name. Raises UnsupportedError, listing those that there are."""
    if name not in formats():
        raise UnsupportedError(f"no format is called {name!r}; there are {', '.join(sorted(formats()))}")
    return formats()[name]


def candidates(path: Path) -> list[Format]:
    """Every format that the content of `path` is in. Raises StorageError."""
    try:
        return [each for _, each in sorted(formats().items()) if each.recognises(path)]
    except OSError as error:
        raise StorageError(error.errno, f"cannot read {path}: {error.strerror}") from error


def steps(path: Path) -> list[Path]:
    """The checkpoints in a directory that is one of a whole run in a format of others, oldest first."""
    return [step for each in candidates(path) for step in each.steps(path)]


def of(path: Path) -> Format:
    """The format that the content of `path` is in.

    Raises NotACheckpointError for none of them, or for a directory that is in several; StorageError.
    """
    found = candidates(path)
    if len(found) == 1:
        return found[0]
    if found:
        raise NotACheckpointError(
            f"{path}: holds several kinds of checkpoints: {', '.join(each.title for each in found)}. "
            f"Name the file that is meant, or pass format= one of {', '.join(each.name for each in found)}"
        )
    if path.is_dir() and (inside := [each.name for each in islice(sorted(path.iterdir()), _LISTED) if candidates(each)]):
        raise NotACheckpointError(f"{path}: a directory of checkpoints, {', '.join(inside)}: name the one that is meant")
    known = ", ".join(sorted(each.title for each in formats().values()))
    raise NotACheckpointError(f"{path}: neither a checkpoint of polyckpt nor one of: {known}")


def by_suffix(path: Path) -> Format | None:
    """The one format whose files are named so."""
    fitting = {
        each.name: suffix
        for each in formats().values()
        for suffix in each.suffixes
        if each.writer and path.name.endswith(suffix)
    }
    longest = max(map(len, fitting.values()), default=0)
    names = [name for name, suffix in fitting.items() if len(suffix) == longest]
    return formats()[names[0]] if len(names) == 1 else None
