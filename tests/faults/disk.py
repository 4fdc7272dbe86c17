"""A file system that loses power: what a sequence of calls may have left of itself.

Nothing that was not synced is certain. Of what was written to a file since its last sync every part may be there or not, and
where it is not there may be zeros. Of what happened to the names in a directory since it was last synced every part may be
there or not: in the order of the calls, as on a file system with a journal, or in any other. A rename, and an exchange of two
names, is there wholly or not at all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Operation = tuple[Any, ...]
"""A call and its arguments; paths are relative to the root:

mkdir PATH, create PATH, write PATH OFFSET DATA, truncate PATH SIZE, sync PATH, rename FROM TO, exchange ONE OTHER,
unlink PATH, rmdir PATH, symlink TARGET PATH, link FROM TO; and "mark VALUE", by which whoever recorded finds a moment again.
"""


@dataclass
class Change:
    """What one call did to names: (directory, name) -> node, None where it is gone. All of it or nothing is on disk."""

    names: dict[tuple[int, str], int | None]


@dataclass
class File:
    """on_disk: what the last sync made certain. pending: the writes since, and (size, None) for a truncation."""

    on_disk: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def with_writes(self, chosen: Sequence[tuple[int, bytes | None]]) -> bytes:
        content = bytearray(self.on_disk)
        for offset, data in chosen:
            if data is None:
                del content[offset:]
                continue
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data
        return bytes(content)


ROOT = 0


class Disk:
    """Applies operations, and knows what of them is certain."""

    def __init__(self) -> None:
        self.directories: dict[int, dict[str, int]] = {ROOT: {}}
        self.certain: dict[int, dict[str, int]] = {ROOT: {}}
        self.files: dict[int, File] = {}
        self.links: dict[int, str] = {}
        self.pending: list[Change] = []
        self._nodes = iter(range(1, 1 << 30))

    def sync_all(self) -> None:
        """Make all of it certain, as a disk is that has been idle for long."""
        self.certain = {node: dict(names) for node, names in self.directories.items()}
        self.pending = []
        for file in self.files.values():
            file.on_disk, file.pending = file.with_writes(file.pending), []

    def apply(self, operation: Operation) -> None:
        getattr(self, f"_{operation[0]}")(*operation[1:])

    def _find(self, path: str) -> tuple[int, str]:
        node, (*parents, name) = ROOT, path.split("/")
        for parent in parents:
            node = self.directories[node][parent]
        return node, name

    def _node(self, path: str) -> int:
        if path in ("", "."):
            return ROOT
        directory, name = self._find(path)
        return self.directories[directory][name]

    def _change(self, names: dict[tuple[int, str], int | None]) -> None:
        for (directory, name), node in names.items():
            if node is None:
                self.directories[directory].pop(name, None)
            else:
                self.directories[directory][name] = node
        self.pending.append(Change(names))

    def _mark(self, value: Any) -> None:
        """A moment, and nothing else."""

    def _mkdir(self, path: str) -> None:
        node = next(self._nodes)
        self.directories[node], self.certain[node] = {}, {}
        self._change({self._find(path): node})

    def _create(self, path: str) -> None:
        node = next(self._nodes)
        self.files[node] = File()
        self._change({self._find(path): node})

    def _symlink(self, target: str, path: str) -> None:
        node = next(self._nodes)
        self.links[node] = target
        self._change({self._find(path): node})

    def _link(self, source: str, path: str) -> None:
        self._change({self._find(path): self._node(source)})

    def _write(self, path: str, offset: int, data: bytes) -> None:
        self.files[self._node(path)].pending.append((offset, data))

    def _truncate(self, path: str, size_bytes: int) -> None:
        self.files[self._node(path)].pending.append((size_bytes, None))

    def _rename(self, source: str, target: str) -> None:
        node = self._node(source)
        self._change({self._find(source): None, self._find(target): node})

    def _exchange(self, one: str, other: str) -> None:
        self._change({self._find(one): self._node(other), self._find(other): self._node(one)})

    def _unlink(self, path: str) -> None:
        self._change({self._find(path): None})

    _rmdir = _unlink

    def _sync(self, path: str) -> None:
        node = self._node(path)
        if node in self.files:
            file = self.files[node]
            file.on_disk, file.pending = file.with_writes(file.pending), []
            return
        synced = [change for change in self.pending if any(directory == node for directory, _ in change.names)]
        self.pending = [change for change in self.pending if change not in synced]
        self._settle(self.certain, synced)

    @staticmethod
    def _settle(directories: dict[int, dict[str, int]], changes: Sequence[Change]) -> None:
        for change in changes:
            for (directory, name), node in change.names.items():
                if node is None:
                    directories[directory].pop(name, None)
                else:
                    directories[directory][name] = node

    # After a loss of power.

    def states(self, rng: random.Random, count: int) -> Iterator[State]:
        """What may be left: the extremes first, then `count` at random."""
        changes = self.pending
        for chosen in ([], changes):  # nothing of what happened to names, and all of it
            for writes in ("none", "all", "zeros"):
                yield self._state(chosen, writes, rng)
        for index in range(len(changes)):  # each alone missing, and each alone there
            yield self._state([*changes[:index], *changes[index + 1 :]], "some", rng)
            yield self._state([changes[index]], "all", rng)
        for _ in range(count):
            if rng.random() < 0.5:
                yield self._state(changes[: rng.randint(0, len(changes))], "some", rng)
            else:
                yield self._state([change for change in changes if rng.random() < 0.5], "some", rng)

    def _state(self, chosen: Sequence[Change], writes: str, rng: random.Random) -> State:
        directories = {node: dict(names) for node, names in self.certain.items()}
        self._settle(directories, chosen)
        return State(directories, {node: self._content(file, writes, rng) for node, file in self.files.items()}, self.links)

    @staticmethod
    def _content(file: File, writes: str, rng: random.Random) -> bytes:
        if writes == "none" or not file.pending:
            return file.on_disk
        if writes == "all":
            return file.with_writes(file.pending)
        if writes == "zeros":
            return file.with_writes([(offset, data and bytes(len(data))) for offset, data in file.pending])
        chosen: list[tuple[int, bytes | None]] = []
        for offset, data in file.pending:
            kind = rng.choice(["lost", "there", "zeros", "torn"])
            if kind == "there" or data is None:
                chosen.append((offset, data))
            elif kind == "zeros":
                chosen.append((offset, bytes(len(data))))
            elif kind == "torn":
                chosen.append((offset, data[: rng.randint(0, len(data))]))
        return file.with_writes(chosen)


@dataclass
class State:
    """What is left: the names in each directory, the contents of each file, the targets of links."""

    directories: dict[int, dict[str, int]]
    files: dict[int, bytes]
    links: dict[int, str]

    def contents(self, node: int = ROOT) -> tuple[Any, ...]:
        """The tree as a value."""
        if node not in self.directories:
            return ("link", self.links[node]) if node in self.links else ("file", self.files[node])
        return ("directory", *((name, self.contents(child)) for name, child in sorted(self.directories[node].items())))

    def build(self, place: Path, node: int = ROOT) -> None:
        """Make it in the directory `place`, which is created."""
        place.mkdir()
        for name, child in self.directories[node].items():
            if child in self.directories:
                self.build(place / name, child)
            elif child in self.links:
                os.symlink(self.links[child], place / name)
            else:
                (place / name).write_bytes(self.files[child])
