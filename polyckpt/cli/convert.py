"""The command that writes a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polyckpt.cli import screen
from polyckpt.cli.commands import CheckpointPath, LikeOption, RuleFile, Rules, app, demanded
from polyckpt.errors import UnsupportedError
from polyckpt.formats import table
from polyckpt.storage import local


@app.command()
def convert(
    source: CheckpointPath,
    target: Annotated[Path, typer.Argument(metavar="DST", help="What is to be written.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="FORMAT", help="The format.", show_default="as DST is named")
    ] = None,
    like: LikeOption = None,
    rule: Rules = None,
    rules: RuleFile = None,
    accept: Annotated[list[str] | None, typer.Option("--accept", help="As accept= of polyckpt.load; may be repeated.")] = None,
    cast: Annotated[bool, typer.Option("--cast", help="Also round to narrower types.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a checkpoint in another format, for the same framework or another.

    Formats that can be written: polyckpt, torch, safetensors, huggingface, keras, keras-weights, orbax, msgpack, equinox, npz.
    Between frameworks a model of each side is needed, where its file does not say what the layers are: --like names functions
    that make them, and returns (model, optimizer) where the optimizer is to come along.

    Examples: polyckpt convert runs/digits/best digits.safetensors
    polyckpt convert model.pt model.keras --like nets:torch_net --like nets:keras_net
    """
    from polyckpt import api
    from polyckpt.cli import factories

    made = factories.made(like)
    chosen = _format(target, to)
    described = factories.source_of(source, made)
    adapter = described.adapter if described else factories.opened(source).manifest.producer.adapter
    into = factories.target_of(made, table.named(chosen).adapter if chosen != api.OURS else "", adapter)
    for each in made:
        if each not in (described, into):
            factories.refuse(each, source, chosen)
    options: dict[str, Any] = {}
    if into is not None:
        options = {"rules": demanded(rule, rules) or None, "accept": set(accept or ()), "cast": cast}
    elif rule or rules or accept or cast:
        raise UnsupportedError("--rule, --rules, --accept and --cast are for a conversion into a model: name one with --like")
    with screen.spinner(f"{source} -> {target}"):
        written = api.export(
            source,
            target,
            into.model if into else None,
            into.optimizer if into else None,
            to=chosen,
            overwrite=force,
            like=described.model if described else None,
            **options,
        )
    screen.console().print(f"wrote {written}  {screen.size(screen.bytes_of(written))}", markup=False, soft_wrap=True)


def _format(target: Path, to: str | None) -> str:
    if to is not None:
        return to
    if (found := table.by_suffix(local.absolute(target))) is None:
        raise UnsupportedError(f"{target}: its name does not say which format it is to have: pass --to")
    return found.name
