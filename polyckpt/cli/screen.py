"""How things look in a terminal, and in a pipe."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress

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
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    if any(columns) and sum(widths) + 3 * len(widths) < out.width and not any("\n" in cell for row in cells for cell in row):
        _print_lines(out, columns, cells, widths, right)
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    out.print(table)


def _print_lines(
    out: Console, columns: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int], right: Sequence[str]
) -> None:
    """What Rich makes of a table in which nothing has to be folded; a thousand rows take it more than a second."""

    def line(cells: Sequence[str]) -> str:
        padded = (
            f"{' ' * (width - cell_len(cell))}{cell}" if name in right else f"{cell}{' ' * (width - cell_len(cell))}"
            for name, cell, width in zip(columns, cells, widths, strict=True)
        )
        return f" {'   '.join(padded)}".rstrip()

    out.print()
    out.print(Text(line(columns), style="bold"))
    out.print(Text(f" {'─' * (sum(widths) + 3 * (len(widths) - 1))}"))
    out.file.write("".join(f"{line(row)}\n" for row in rows))
    out.print()


def progress() -> Progress:
    """A bar over bytes on the terminal, nothing where there is none."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    errors = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


def spinner(what: str) -> Progress:
    """What is being done, and for how long, on the terminal; nothing where there is none."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    errors = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    shown = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
    shown.add_task(what, total=None)
    return shown


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


def bytes_of(path: Path) -> int:
    """The bytes of a file, or of all files in a directory."""
    if path.is_dir():
        return _bytes_in(path)
    # Where there is nothing, it is what the names of several files begin with.
    files = [path] if path.exists() else path.parent.glob(f"{glob.escape(path.name)}.*")
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def _bytes_in(directory: str | Path) -> int:
    """The bytes of all files in a directory, as far as it can be read. Links are not followed."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # deleted meanwhile
                if entry.is_dir(follow_symlinks=False):
                    total += _bytes_in(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    total += entry.stat(follow_symlinks=False).st_size
    return total
