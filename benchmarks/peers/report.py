"""What was measured, for people: tables on the screen and in Markdown, and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

from benchmarks.peers.goals import BOUNDS, Outcome
from benchmarks.peers.measuring import Measured

COMPARED = """\
- All contenders of a table take turns in one process: each once per round, after one round that warms up and does not count.
  A number is the median of the rounds; beside it stand the least and the most. Before each run garbage is collected;
  before each save all that was written before is on disk. Every library runs with its defaults.
- Nobody is measured doing nothing: in the warm-up, live values are made zero before a load and compared with what was saved
  after it, bit for bit; of saves of a run that link, every checksum is compared.
- **Verified.** polyckpt alone stores a checksum of every tensor (XXH3, 128 bits) and, on load, compares all of them before it
  writes anything. torch.save puts a CRC-32 of every record into its file, which torch.load does not compare.
- **Durable.** polyckpt syncs its files and directories by itself. In the tables of durable saves, that of all others is
  followed, inside of the time, by an fsync of every file and directory that they wrote. Where it says "not durable",
  `os.fsync` and `os.fdatasync` do nothing, for polyckpt and for everybody (DCP calls them too). TensorStore, which writes for
  Orbax, syncs its data files from C++, which that does not reach. On tmpfs nothing is durable.
- **Loads** find the files in the page cache. "raw read" reads the same bytes from one file into the live tensors, with one
  system call each. With `mmap=True`, `optimizer.load_state_dict` keeps the maps that it is given: the moments, two thirds of
  the bytes, are not read at all then, but by the training step that follows. "+ copy_" reads them. JAX arrays come back new.
- **Blocked** is the time until the call of an asynchronous save returns; the wait for the background is not in it. Each save
  comes after a training step. "one copy" is `np.copyto` of every tensor into memory that was written to before.
- **Extra memory** is the most private memory (RssAnon, seen every 2 ms) during a save or load beyond what there was before it.
- **(d)**: low-rank adapters over frozen layers; adapters and their two moments are 5 % of all bytes of a checkpoint.
  Bytes written are those of the files that are no links to an earlier checkpoint.
- **New processes** are timed from start to end, the start of Python included; byte code is compiled before, as where packages
  were installed. `import polyckpt` imports its modules when they are first asked for; "polyckpt.save, not called" is the import
  and that.
"""

OURS, RAW, PEER = "#0b7285", "#ced4da", "#868e96"


def screen_table(measured: Measured) -> Table:
    """One work."""
    return _screen(measured.title, *_rows(measured))


def screen_summary(outcomes: Iterable[Outcome]) -> Table:
    """The goals."""
    return _screen("Goals", *_summary(outcomes))


def markdown(
    results: Mapping[str, Measured], outcomes: Sequence[Outcome], facts: Mapping[str, str], rounds: int, command: str
) -> str:
    """The whole document."""
    parts = [
        "# polyckpt beside its peers",
        f"Written by `{command}`, which repeats it: medians of {rounds} interleaved rounds or a few more.",
        "![medians](results.png)",
        "## Goals",
        _markdown(*_summary(outcomes)),
        *_bounds(outcomes),
        "## The machine",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        "## What is compared with what",
        COMPARED.rstrip(),
        "## Measured",
    ]
    for measured in results.values():
        parts += [f"### {measured.title}", _markdown(*_rows(measured))]
    return "\n\n".join(parts) + "\n"


def _bounds(outcomes: Sequence[Outcome]) -> list[str]:
    """What stands in the way of the goals that are not reached."""
    missed = {each.goal.key for each in outcomes if not each.reached} & BOUNDS.keys()
    lines = [f"- **{key}**: {BOUNDS[key]}" for key in BOUNDS if key in missed]
    return ["## What bounds what is not reached", "\n".join(lines)] if lines else []


def amount(value: float, unit: str) -> str:
    """With three digits; less than a second in milliseconds."""
    if unit == "s" and value < 1:
        value, unit = value * 1000, "ms"
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def _rows(measured: Measured) -> tuple[list[str], list[list[str]]]:
    first = next(iter(measured.values))
    base, columns = measured.median(first), measured.notes[first]
    columns = [column for column in columns if any(notes[column] for notes in measured.notes.values())]
    header = ["", "median", "least", "most", f"of {first}", *(["GB/s"] if measured.size_bytes else []), *columns]
    rows = []
    for name, values in measured.values.items():
        median = measured.median(name)
        row = [name, *(amount(value, measured.unit) for value in (median, min(values), max(values)))]
        row.append(f"{median / base:.2f}x" if base else "")
        if measured.size_bytes:
            row.append(f"{measured.size_bytes / median / 1e9:.2f}")
        rows.append([*row, *(measured.notes[name][column] for column in columns)])
    return header, rows


def _summary(outcomes: Iterable[Outcome]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for each in outcomes:
        found = f"{each.value:.{2 if each.value >= 0.1 else 3}f}x" if each.goal.against else amount(each.value, each.goal.unit)
        rows.append([each.goal.what, each.goal.text, found, "yes" if each.reached else "no"])
    return ["work", "goal", "measured", "reached"], rows


def _screen(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(header):
        table.add_column(column, no_wrap=index == 0)
    for row in rows:
        table.add_row(*row, style="bold cyan" if row[0].startswith("polyckpt") else None)
    return table


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The picture: panels of different heights in two columns, all bars equally thick. In inches:
_COLUMN = 7.7
_BAR, _HEAD, _FOOT = 0.27, 0.40, 0.40  # of a panel: a bar, and what lies above and below the bars
_NAMES = 2.8  # of a column, for the names of the contenders
_GAP = 0.4  # to the right of a column
_EDGE, _TITLE = 0.25, 0.55


def picture(results: Mapping[str, Measured], path: Path) -> None:
    """The medians of every work as bars on a logarithmic scale, polyckpt's in colour."""
    columns: list[list[Measured]] = [[], []]
    total, above = sum(map(_height, results.values())), 0.0
    for measured in results.values():  # in order, the first half to the left
        columns[above + _height(measured) / 2 > total / 2].append(measured)
        above += _height(measured)
    width = 2 * _COLUMN + 2 * _EDGE - _GAP
    height = max(sum(map(_height, column)) for column in columns) + 2 * _EDGE + _TITLE
    figure = Figure(figsize=(width, height), dpi=110)
    title = "polyckpt beside its peers: medians, less is better, logarithmic scales"
    figure.text(_EDGE / width, 1 - _EDGE / height, title, va="top", fontsize=13, weight="bold")
    legend = [Patch(color=OURS, label="polyckpt"), Patch(color=PEER, label="peers"), Patch(color=RAW, label="the bare minimum")]
    figure.legend(
        handles=legend, loc="upper right", bbox_to_anchor=(1 - _EDGE / width, 1 - 0.15 / height), ncols=3, frameon=False
    )
    for index, column in enumerate(columns):
        top = height - _EDGE - _TITLE
        for measured in column:
            bars = len(measured.values) * _BAR
            left = _EDGE + index * _COLUMN + _NAMES
            place = (left, top - _HEAD - bars, _COLUMN - _NAMES - _GAP, bars)
            sizes = (width, height, width, height)
            _panel(figure.add_axes(tuple(inches / size for inches, size in zip(place, sizes, strict=True))), measured)
            top -= _height(measured)
    figure.savefig(path)


def _height(measured: Measured) -> float:
    return _HEAD + len(measured.values) * _BAR + _FOOT


def _panel(axes: Axes, measured: Measured) -> None:
    names = sorted(measured.values, key=measured.median)
    medians = [max(measured.median(name), 0.01 if measured.unit == "MB" else 1e-6) for name in names]
    axes.barh(range(len(names)), medians, color=[_colour(name) for name in names], height=0.74)
    axes.set_xscale("log")
    low = 10 ** math.floor(math.log10(medians[0] / 1.3))
    axes.set_xlim(low, medians[-1] * (medians[-1] / low) ** 0.25)  # the amounts need room
    for index, (name, median) in enumerate(zip(names, medians, strict=True)):
        weight = "bold" if _colour(name) == OURS else "normal"
        text = amount(measured.median(name), measured.unit)
        axes.annotate(text, (median, index), (4, 0), textcoords="offset points", va="center", fontsize=8.5, weight=weight)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        if _colour(name) == OURS:
            label.set(color=OURS, weight="bold")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", which="both", labelsize=8, color=PEER, labelcolor=PEER)
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_major_formatter(lambda value, _: _tick(value, measured.unit))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color=RAW, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(measured.title, loc="left", x=-_NAMES / (_COLUMN - _NAMES - _GAP), fontsize=10, weight="bold")


def _tick(value: float, unit: str) -> str:
    return f"{value * 1000:g} ms" if unit == "s" and value < 1 else f"{value:g} {unit}"


def _colour(name: str) -> str:
    if "polyckpt" in name:
        return OURS
    return RAW if name.startswith(("raw", "one copy", "python")) else PEER
