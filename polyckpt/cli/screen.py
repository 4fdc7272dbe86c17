"""How things look in a terminal, and in a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_WIDE = 10_000
"""Nothing that is piped is cut or wrapped."""


def console() -> Console:
    """Where answers go."""
    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)


def print_table(
    out: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()
) -> None:
    """Print a table under its title. right: columns that hold numbers."""
    if title:
        out.print(Text(title, style="bold"), overflow="fold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    out.print(table)


def progress() -> Progress:
    """A bar over bytes on the terminal, nothing where there is none."""
    errors = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


def as_json(value: Any) -> str:
    """JSON with one member to a line; what is no finite number is its name."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def size(count_bytes: int) -> str:
    """Bytes for people.

    >>> size(999), size(12_300), size(5_000_000_000)
    ('999 B', '12.3 kB', '5.0 GB')
    """
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def age(since: float) -> str:
    """How long ago a time was (seconds since 1970), for people.

    >>> age(time.time() - 7300)
    '2 h'
    """
    seconds = max(0.0, time.time() - since)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def number(value: float | None) -> str:
    """A metric for people."""
    return "" if value is None else f"{value:.6g}"


def bytes_of(directory: Path) -> int:
    """The bytes of all files in a directory."""
    with os.scandir(directory) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries if entry.is_file(follow_symlinks=False))
