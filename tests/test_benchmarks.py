"""The benchmarks run: every contender is measured and checked, the goals are judged, and what is written can be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sealing import REPOSITORY, run_python

_SAVED = {"polyckpt", "polyckpt (JAX)", "polyckpt (Keras)", "raw write", "torch.save", "safetensors", "DCP", "Orbax", "Keras"}
CONTENDERS = {
    "MB: durable save": _SAVED,
    "MB: save, not durable": _SAVED,
    "MB: load": {
        "polyckpt",
        "polyckpt, verify=False",
        "polyckpt (JAX)",
        "polyckpt (Keras)",
        "raw read",
        "torch.load + load_state_dict",
        "torch.load(mmap=True) + load_state_dict",
        "torch.load(mmap=True) + copy_",
        "safetensors load_file + copy_",
        "DCP load in place",
        "Orbax",
        "Keras load_weights",
    },
    "training blocked": {"polyckpt", "polyckpt (JAX)", "one copy", "DCP async_save", "Orbax AsyncCheckpointer"},
    "extra memory": {"polyckpt.save", "torch.save", "polyckpt.load", "torch.load + load_state_dict"},
    "tmpfs: save": {"polyckpt (JAX)", "Orbax", "safetensors", "torch.save", "raw write"},
    "tmpfs: load": {"polyckpt (JAX)", "Orbax", "safetensors", "torch.load", "raw read"},
    "KB: save": {"polyckpt", "safetensors", "raw write"},
    "KB: load": {"polyckpt", "safetensors", "raw read"},
    "KB: list": {"polyckpt", "safetensors"},
}


@dataclass(frozen=True)
class Done:
    """A run of the benchmarks: its tables by title, rows of cells, and what it wrote."""

    tables: Mapping[str, list[list[str]]]
    results: Path
    left: list[Path]

    def table(self, part: str) -> list[list[str]]:
        """The one table whose title holds `part`."""
        (rows,) = (rows for title, rows in self.tables.items() if part in title)
        return rows


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    disk, results = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("results")
    command = f"{sys.executable} -m benchmarks.peers --scale 0.002 --rounds 1 --only a,b,c --directory {disk} --write {results}"
    quiet = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command.split(), cwd=REPOSITORY, env=quiet, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    tables: dict[str, list[list[str]]] = {}
    for line in ended.stdout.splitlines():
        if line[0] not in "┏┃┡└│":
            tables[line.strip()] = rows = []
        elif line[0] == "│":
            rows.append([cell.strip() for cell in line.split("│")[1:-1]])
    return Done(tables, results, list(disk.iterdir()))


@pytest.mark.parametrize("part", CONTENDERS)
def test_every_contender_is_measured(done: Done, part: str) -> None:
    rows = done.table(part)
    assert {row[0] for row in rows} == CONTENDERS[part]
    assert all(re.fullmatch(r"[\d,.]+ (s|ms|MB)", cell) for row in rows for cell in row[1:4])
    assert all(float(row[1].split()[0].replace(",", "")) > 0 for row in rows if row[1].endswith("s"))


def test_ratios_are_those_of_the_medians(done: Done) -> None:
    for title, rows in done.tables.items():
        if title != "Goals":
            base, *medians = (_amount(row[1]) for row in rows)
            assert [float(row[4].rstrip("x")) for row in rows[1:]] == pytest.approx(
                [m / base for m in medians], rel=0.02, abs=0.01
            )


def test_the_goals_are_judged_by_what_was_measured(done: Done) -> None:
    goals = {(what, goal): (found, reached) for what, goal, found, reached in done.table("Goals")}
    assert len(goals) == 18
    for (_, goal), (found, reached) in goals.items():
        limit = float(re.findall(r"≤ ([\d.]+)", goal)[0])
        value = float(re.findall(r"[\d,.]+", found)[0].replace(",", ""))
        assert reached == ("yes" if value <= limit else "no") or value == pytest.approx(limit, rel=0.01)  # it is rounded
    medians = {row[0]: _amount(row[1]) for row in done.table("MB: durable save")}
    found, _ = goals["save (a), durable, checksummed", "≤ 0.5x torch.save"]
    assert float(found.rstrip("x")) == pytest.approx(medians["polyckpt"] / medians["torch.save"], rel=0.02, abs=0.01)


def test_the_results_are_written_and_nothing_else_stays(done: Done) -> None:
    text = (done.results / "RESULTS.md").read_text()
    assert all(f"### {title}" in text for title in done.tables if title != "Goals")
    assert all(f"| {' | '.join(row)} |" in text for row in done.table("Goals"))
    assert "results.png" in text and "python -m benchmarks.peers --scale 0.002" in text
    picture = (done.results / "results.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert done.left == []


def test_who_brings_nothing_back_is_not_measured() -> None:
    code = """
from benchmarks.peers import measuring, values
run = values.TorchRun(20_000)
idle = measuring.Contender(name="idle", run=lambda: None, spoil=run.spoil, check=lambda _: run.check("idle"))
try:
    measuring.measure(measuring.Work(key="", title="", contenders=[idle], meter=measuring.seconds), 1)
except AssertionError as error:
    print(error)
"""
    ended = run_python(code)
    assert ended.stdout.startswith("idle: 240 of 240 tensors came back wrong"), ended.stderr


def test_meters_measure_what_they_say(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
import numpy as np
from benchmarks.peers import measuring
directory = pathlib.Path(sys.argv[1])
(directory / "of-another").write_bytes(bytes(5_000_000))
new = directory / "new"
new.mkdir()
(new / "own").write_bytes(bytes(3_000_000))
os.link(directory / "of-another", new / "linked")
print(measuring.written(lambda: new)[0])
print(measuring.extra_memory(lambda: np.ones(100_000_000, np.uint8).sum() and __import__("time").sleep(0.1))[0])
real = os.fsync
with measuring.not_durable():
    print(os.fsync(-1), os.fdatasync(-1))
print(os.fsync is real)
"""
    ended = run_python(code, tmp_path)
    written, memory, synced, restored = ended.stdout.splitlines()
    assert (written, synced, restored) == ("3.0", "None None", "True"), ended.stderr
    assert 95 < float(memory) < 115


def _amount(cell: str) -> float:
    value, unit = cell.split()
    return float(value.replace(",", "")) * (0.001 if unit == "ms" else 1)
