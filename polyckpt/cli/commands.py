"""The commands of `polyckpt`: what lies on disk, whether it is whole, in what it differs. None of them imports a framework.

What opens a checkpoint is imported by the commands that do: it takes longer than to list a run.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from polyckpt import schema
from polyckpt.cli import pictures, runs, screen
from polyckpt.errors import CheckpointError, PlanError, PolicyError
from polyckpt.policy import value_of

if TYPE_CHECKING:
    from polyckpt import differences

app = typer.Typer(
    help="Checkpoints of PyTorch, Keras and JAX on disk: list, show, verify, compare, convert, plot and prune them.",
    epilog="Exit codes: 0 for yes, 1 for no (damaged, different), 2 where it could not be told.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


class Mode(enum.StrEnum):
    """Whether less or more of a metric is better."""

    auto, min, max = "auto", "min", "max"


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")]
CheckpointPath = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint.")]
Monitor = Annotated[
    str | None, typer.Option("--monitor", help="The metric by which one is best.", show_default="the manager's")
]
ModeOption = Annotated[Mode, typer.Option("--mode", help="Whether less or more of it is better; auto goes by its name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Rules = Annotated[list[str] | None, typer.Option("--rule", help="A pair of paths as FROM=TO; may be repeated.")]
RuleFile = Annotated[Path | None, typer.Option("--rules", metavar="FILE", help='JSON of such pairs: {"FROM": "TO"}.')]
LikeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--like",
        metavar="MODULE:FUNCTION",
        help="A function that makes a model with the names of a file, which tells what its layers are; may be repeated.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        from polyckpt import __version__

        typer.echo(f"polyckpt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # read in main()
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


@app.command("ls")
def list_(run: RunPath, monitor: Monitor = None, mode: ModeOption = Mode.auto, json: AsJson = False) -> None:
    """List the checkpoints of a run, oldest first.

    Example: polyckpt ls runs/digits --monitor val_loss
    """
    found = runs.listed(run, monitor, mode)
    if json:
        typer.echo(screen.as_json([_row_as_json(each) for each in found]))
        return
    metrics = list(dict.fromkeys(name for each in found for name in each.metrics))
    columns = ["checkpoint", "epoch", "step", *metrics, "size", "age", ""]
    rows = [
        [
            each.name,
            each.progress.epoch,
            each.progress.step,
            *(screen.number(each.metrics.get(name)) for name in metrics),
            screen.size(screen.bytes_of(each.path)),
            screen.age(each.time) if each.time else "",
            ", ".join(each.marks),
        ]
        for each in found
    ]
    screen.print_table(screen.console(), str(run), columns, rows, right=columns[1:-1])


def _row_as_json(each: runs.Listed) -> dict[str, Any]:
    metrics = {name: schema.to_number(value) for name, value in each.metrics.items()}
    return {
        "name": each.name,
        "path": str(each.path),
        **msgspec.to_builtins(each.progress),
        "metrics": metrics,
        "size_bytes": screen.bytes_of(each.path),
        "time": each.time,
        "marks": each.marks,
    }


@app.command()
def best(run: RunPath, monitor: Monitor = None, mode: ModeOption = Mode.auto) -> None:
    """Print the path of the best checkpoint of a run.

    Example: cp -r $(polyckpt best runs/digits) shipped
    """
    typer.echo(runs.best(run, monitor, mode))


@app.command()
def show(checkpoint: CheckpointPath, like: LikeOption = None, json: AsJson = False) -> None:
    """Show what a checkpoint holds, in whatever format it is: run, layers, parameters, optimizer.

    Example: polyckpt show runs/digits/last
    """
    from polyckpt.cli import factories
    from polyckpt.formats import table
    from polyckpt.formats.opened import Foreign

    opened = factories.opened(checkpoint, factories.made(like))
    manifest = opened.manifest
    if json:
        told = msgspec.to_builtins(manifest)
        typer.echo(screen.as_json({name: value for name, value in told.items() if name not in ("native", "files")}))
        return
    out = screen.console()
    producer = ", ".join(f"{name} {version}" for name, version in manifest.producer.versions.items())
    facts = {
        "model": f"{manifest.model.type} ({manifest.producer.adapter}; {producer})",
        "saved": manifest.saved_at_utc,
        **{name: value for name, value in msgspec.to_builtins(manifest.progress).items() if value is not None},
        **{name: screen.number(schema.from_number(value)) for name, value in manifest.metrics.items()},
        "size": screen.size(screen.bytes_of(opened.path)),
    }
    left_out: Sequence[str] = ()
    if isinstance(opened, Foreign):
        facts = {"format": table.named(opened.format).title, **facts}
        left_out = opened.left_out
    screen.print_table(out, str(opened.path), ["", ""], [*facts.items(), *(("not read", each) for each in left_out)])
    axes = {role.tensor: role.axes for layer in manifest.model.layers for role in layer.roles.values()}
    kinds = {role.tensor: layer.kind for layer in manifest.model.layers for role in layer.roles.values()}
    weights = opened.weights.stored
    aliases = manifest.model.aliases
    rows = [
        (
            name,
            kinds.get(name, ""),
            tensor.dtype,
            _shape(tensor.shape),
            axes.get(name, ""),
            f"= {aliases[name]}" if name in aliases else screen.size(tensor.size_bytes),
        )
        for name, tensor in weights.items()
    ]
    count = sum(math.prod(tensor.shape) for name, tensor in weights.items() if name not in aliases)
    columns = ["weight", "layer", "type", "shape", "axes", "size"]
    screen.print_table(out, f"{len(rows)} weights, {count:,} elements", columns, rows, right=["size"])
    if manifest.optimizer is not None:
        _show_optimizer(out, manifest.optimizer)


def _show_optimizer(out: Any, optimizer: schema.Optimizer) -> None:
    from polyckpt.slots import numbers

    step = "" if optimizer.step is None else f", step {optimizer.step}"
    rows: list[tuple[Any, ...]] = []
    for index, group in enumerate(optimizer.groups):
        values = numbers(group.hyperparameters)
        told = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        family = group.family or optimizer.family
        rows.append((f"group {index}", family, len(group.parameters), told))
    told = f"{optimizer.type}{step}"
    screen.print_table(out, told, ["", "family", "parameters", "hyperparameters"], rows, right=["parameters"])
    slots = [(name, slot.meaning, len(slot.tensors)) for name, slot in optimizer.slots.items()]
    screen.print_table(out, "", ["slot", "holds", "parameters"], slots, right=["parameters"])


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


@app.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Checkpoints, or directories of them.")],
) -> None:
    """Compare every byte of checkpoints with its checksum. Exits with 1 where one is damaged.

    Example: polyckpt verify runs/*
    """
    out, damaged = screen.console(), 0
    for path in runs.checkpoints(paths):
        try:
            told = f"ok       {path}  {_verified(path)}"
        except CheckpointError as error:
            damaged += 1
            told = f"DAMAGED  {error}"
        out.print(told, markup=False, soft_wrap=True)
    if damaged:
        raise typer.Exit(1)


def _verified(path: Path) -> str:
    from polyckpt.checkpoint import verify_all
    from polyckpt.formats.opened import Foreign, open_

    opened = open_(path)
    if isinstance(opened, Foreign):
        opened.verify()
        count = sum(map(len, (opened.weights, opened.optimizer, opened.state)))
        return f"({count} tensors can be read; the format has no checksums of ours)"
    sections = opened.weights, opened.optimizer, opened.state
    tensors = {id(tensor): tensor for section in sections for tensor in section.stored.values()}
    total = sum(tensor.size_bytes for tensor in tensors.values())
    with screen.progress() as bar:
        task = bar.add_task(path.name, total=total)
        verify_all(tensors.values(), lambda tensor: bar.advance(task, tensor.size_bytes))
    return f"({len(tensors)} tensors, {screen.size(total)})"


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another, of any framework.")],
    rule: Rules = None,
    rules: RuleFile = None,
    like: LikeOption = None,
    weights: Annotated[bool, typer.Option("--weights", help="Compare weights alone.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Show what is equal too.")] = False,
    json: AsJson = False,
) -> None:
    """Show in what two checkpoints differ, tensor by tensor; weights of two frameworks by the plan between them.

    Exits with 1 where anything differs. Example: polyckpt diff runs/digits/best runs/digits/last
    """
    from polyckpt import differences
    from polyckpt.cli import factories

    models = factories.made(like)
    pair = factories.opened(one, models), factories.opened(other, models)
    entries = list(differences.compare(*pair, demanded(rule, rules)))
    entries = [each for each in entries if each.section == "weights" or not weights]
    different = [each for each in entries if each.differs]
    shown = entries if every else different
    if json:
        typer.echo(screen.as_json([_entry_as_json(each) for each in shown]))
    elif shown:
        rows = [(each.section, each.name, each.one or "-", each.other or "-", _apart(each)) for each in shown]
        columns = ["", "name", str(one), str(other), "max |A - B|"]
        screen.print_table(screen.console(), "", columns, rows, right=columns[-1:])
    if not json:
        typer.echo(f"{len(different)} of {len(entries)} differ" if different else f"all {len(entries)} are equal")
    if different:
        raise typer.Exit(1)


def _apart(entry: differences.Entry) -> str:
    return "" if entry.largest is None else f"{entry.largest:.3g}"


def _entry_as_json(entry: differences.Entry) -> dict[str, Any]:
    told = msgspec.to_builtins(entry)
    return {**told, "largest": None if entry.largest is None else msgspec.to_builtins(schema.to_number(entry.largest))}


def demanded(rules: list[str] | None, file: Path | None) -> dict[str, str]:
    """The rules of a file and those on the command line, which prevail. Raises PlanError for what are none."""
    pairs: dict[str, str] = {}
    if file is not None:
        try:
            pairs |= msgspec.json.decode(file.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PlanError(f"--rules {file}: not an object of JSON whose values are texts: {error}") from error
    for rule in rules or ():
        source, separator, target = rule.partition("=")
        if not separator:
            raise PlanError(f"--rule {rule!r}: two paths, as encoder=body.encoder")
        pairs[source] = target
    return pairs


@app.command()
def plan(
    one: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="One of another framework, or of other names.")],
    rule: Rules = None,
    rules: RuleFile = None,
    like: LikeOption = None,
) -> None:
    """Show how the weights of A would become those of B. Exits with 1 where that cannot be told.

    Example: polyckpt plan runs/torch/last runs/keras/last
    """
    from polyckpt import differences
    from polyckpt.cli import factories

    models = factories.made(like)
    pair = factories.opened(one, models), factories.opened(other, models)
    made = differences.plan_between(*pair, demanded(rule, rules))
    rows = made.rows()
    out = screen.console()
    columns = ["B", "A", "how", "exactness", "evidence"]
    cells = [(row.target, row.source, row.how, row.exactness, row.evidence) for row in rows]
    screen.print_table(out, made.summary(rows), columns, cells)
    if not made.settled:
        out.print("\n".join(made.problems()), markup=False, soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def prune(
    run: RunPath,
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, help="How many of the newest stay.")] = 1,
    keep_best: Annotated[
        int | None, typer.Option("--keep-best", min=1, help="How many of the best stay; needs --monitor.")
    ] = None,
    monitor: Monitor = None,
    mode: ModeOption = Mode.auto,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing.")] = False,
) -> None:
    """Delete the checkpoints of a run that nothing keeps. The one marked best stays in any case.

    Example: polyckpt prune runs/digits --keep-last 3 --monitor val_loss --keep-best 2 --dry-run
    """
    out = screen.console()
    total = 0
    for size_bytes, name in runs.prune(run, monitor, mode, keep_last, keep_best, dry_run=dry_run):
        total += size_bytes
        out.print(
            f"{'would delete' if dry_run else 'deleted'}  {name}  {screen.size(size_bytes)}", markup=False, soft_wrap=True
        )
    out.print(f"{screen.size(total)} {'to be freed' if dry_run else 'freed'}")


@app.command()
def plot(
    run: RunPath,
    target: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A .png, .svg or .pdf.", show_default="the terminal")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="May be repeated.", show_default="all")] = None,
    monitor: Monitor = None,
    mode: ModeOption = Mode.auto,
) -> None:
    """Draw the metrics of a run, with its best and kept checkpoints: into a file, or as lines of blocks here.

    Example: polyckpt plot runs/digits metrics.png --metric val_loss
    """
    found = runs.opened(run, monitor, mode)
    records = found.records
    there = list(dict.fromkeys(name for each in records for name in each.metrics))
    if unknown := [name for name in metric or () if name not in there]:
        raise PolicyError(f"{run}: no metric {', '.join(unknown)}; there are {', '.join(there) or 'none'}")
    chosen = metric or there
    if not chosen:
        raise PolicyError(f"{run}: nothing was measured")
    marked = runs.best_of(found, run, monitor)
    if target is not None:
        pictures.plot(records, marked, chosen, target)
        typer.echo(target)
        return
    rows = []
    for name in chosen:
        values = [value_of(each, name) for each in records]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        at_best = next((value_of(each, name) for each in records if each.name is not None and each.name == marked), None)
        numbers = (min(finite), max(finite), finite[-1]) if finite else (None, None, None)
        rows.append((name, pictures.sparkline(values), *map(screen.number, (*numbers, at_best))))
    columns = ["metric", f"{len(records)} records by {pictures.axis_of(records)}", "min", "max", "last", "at best"]
    screen.print_table(screen.console(), str(run), columns, rows, right=columns[2:])
