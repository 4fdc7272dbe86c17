"""The table of formats, and what people read of it."""

from __future__ import annotations

import re

import pytest

from polyckpt.errors import UnsupportedError
from polyckpt.formats.table import formats, named
from tests.cli.test_commands import run
from tests.sealing import REPOSITORY


def test_the_readme_lists_every_format_and_whether_it_is_written() -> None:
    rows = re.findall(r"^\| [^|]+ \| `([a-z-]+)` \| ([^|]*)\|", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert {name: bool(written.strip()) for name, written in rows} == {
        name: bool(each.writer) for name, each in formats().items()
    }


def test_the_command_line_lists_what_it_writes() -> None:
    told = " ".join(run("convert", "--help").stdout.split())
    listed = re.search(r"Formats that can be written: ([a-z, -]+)\.", told)
    assert listed is not None
    assert set(listed[1].split(", ")) == {"polyckpt", *(name for name, each in formats().items() if each.writer)}


def test_what_cannot_be_written_says_what_can() -> None:
    with pytest.raises(UnsupportedError, match=r"can be read, not written; these can be: .*safetensors"):
        named("dcp").write(None, REPOSITORY / "nowhere")
