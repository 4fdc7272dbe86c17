"""The command line as it is used: in a process of its own, on a terminal or in a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt import BestBy, CheckpointManager
from polyckpt.cli import screen
from tests.sealing import REPOSITORY

COMMAND = Path(sys.executable).parent / "polyckpt"
LOSSES = [0.9, 0.5, float("nan"), 0.2, 0.4, 0.7]


def run(*arguments: Any, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run(
        [str(COMMAND), *map(str, arguments)], capture_output=True, text=True, env={**inherited, **environment}, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def on_terminal(*arguments: Any, columns: int) -> str:
    """What a terminal of that width shows."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen([str(COMMAND), *map(str, arguments)], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(timeout=120) == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "")


def weights(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {"layer": {"kernel": random.standard_normal((5, 3)).astype("float32"), "bias": np.zeros(3, "float32")}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run of six epochs, of which the newest two and the best are left."""
    path = tmp_path / "run"
    with CheckpointManager(path, monitor="val_loss", keep_last=2, keep=BestBy("val_acc")) as manager:
        for index, loss in enumerate(LOSSES):
            metrics = {"val_loss": loss, "val_acc": 0.5 + index / 100}
            manager.save(weights(index), epoch=index + 1, step=10 * (index + 1), metrics=metrics)
    return path


def cells(text: str) -> list[list[str]]:
    """The rows of a table."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip() and "──" not in line]


def test_ls_marks_the_best_and_the_last(directory: Path) -> None:
    rows = cells(run("ls", directory).stdout)
    assert rows[0] == [str(directory)]
    assert rows[1][:5] == ["checkpoint", "epoch", "step", "val_loss", "val_acc"]
    shown = [(row[0], *row[1:5], row[-1]) for row in rows[2:]]
    assert shown == [
        ("step-00000040", "4", "40", "0.2", "0.53", "best"),
        ("step-00000050", "5", "50", "0.4", "0.54", shown[1][-1]),
        ("step-00000060", "6", "60", "0.7", "0.55", "last"),
    ]
    assert re.fullmatch(r"\d+ (s|min)", shown[1][-1])  # neither: the last cell is the age


def test_ls_by_another_metric(directory: Path) -> None:
    told = json.loads(run("ls", directory, "--json", "--monitor", "val_acc").stdout)
    assert [each["marks"] for each in told] == [[], [], ["best", "last"]]
    assert told[0]["metrics"] == {"val_loss": 0.2, "val_acc": 0.53} and told[0]["epoch"] == 4
    assert all(each["size_bytes"] == sum(f.stat().st_size for f in Path(each["path"]).iterdir()) for each in told)


def test_ls_of_checkpoints_that_no_manager_wrote(tmp_path: Path) -> None:
    polyckpt.save(tmp_path / "first", weights(0), step=3, metrics={"loss": float("inf")})
    told = json.loads(run("ls", tmp_path, "--json").stdout)
    assert [(each["name"], each["step"], each["metrics"]) for each in told] == [("first", 3, {"loss": {"$float": "inf"}})]


def test_a_size_is_that_of_every_file_and_of_nothing_behind_a_link(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "run" / "one", weights(0))
    size_bytes = sum(file.stat().st_size for file in path.iterdir())
    (path / "notes" / "deep").mkdir(parents=True)
    (path / "notes" / "deep" / "text").write_bytes(b"x" * 1234)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "large").write_bytes(b"x" * 56789)
    (path / "file").symlink_to(tmp_path / "far" / "large")
    (path / "directory").symlink_to(tmp_path / "far")
    told = json.loads(run("ls", tmp_path / "run", "--json").stdout)
    assert [each["size_bytes"] for each in told] == [size_bytes + 1234]


def test_a_table_fits_its_terminal_and_is_whole_in_a_pipe(directory: Path) -> None:
    wide = directory.parent / ("long-" * 20 + "name")
    directory.rename(wide)
    assert max(map(len, on_terminal("show", wide / "best", columns=60).splitlines())) <= 60
    assert str(wide / "best") in run("show", wide / "best").stdout


def test_nothing_but_text_goes_into_a_pipe(directory: Path) -> None:
    done = run("verify", directory)
    assert "\x1b" not in done.stdout and done.stderr == ""
    assert len(done.stdout.splitlines()) == 3


def test_a_pipe_may_be_closed_early(directory: Path) -> None:
    done = subprocess.run(f"{COMMAND} show {directory}/last | head -1", shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "rror" not in done.stderr


def test_best_is_what_the_manager_took_or_what_a_metric_says(directory: Path, tmp_path: Path) -> None:
    assert run("best", directory).stdout.strip() == str(directory / "step-00000040")
    assert run("best", directory, "--monitor", "val_acc").stdout.strip() == str(directory / "step-00000060")
    assert run("best", directory, "--monitor", "val_acc", "--mode", "min").stdout.strip() == str(directory / "step-00000040")
    refused = run("best", directory, "--monitor", "nothing", "--mode", "min", code=2)
    assert "none of its 3 checkpoints has a finite 'nothing'; the metrics there are: val_acc, val_loss" in refused.stderr
    polyckpt.save(tmp_path / "plain" / "one", weights(0))
    assert "--monitor" in run("best", tmp_path / "plain", code=2).stderr


def test_show_says_what_there_is(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    path = polyckpt.save(tmp_path / "run", model, optimizer, step=1, metrics={"loss": 0.125})
    rows = cells(run("show", path).stdout)
    assert ["0.weight", "linear", "float32", "3 x 5", "out in", "60 B"] in rows
    assert ["step", "1"] in rows and ["loss", "0.125"] in rows
    assert any(row[:3] == ["group 0", "adam", "4"] and "learning_rate 0.25" in row[3] for row in rows)
    assert ["exp_avg_sq", "second_moment", "4"] in rows
    told = json.loads(run("show", path, "--json").stdout)
    assert told["tensors"]["weights"]["0.weight"]["shape"] == [3, 5] and "native" not in told


def flipped(checkpoint: Path) -> Path:
    """Change one bit in the largest file."""
    file = max(checkpoint.iterdir(), key=lambda each: each.stat().st_size if each.suffix == ".safetensors" else 0)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


def test_verify_names_what_is_damaged_and_goes_on(directory: Path) -> None:
    assert run("verify", directory / "last").stdout.startswith("ok ")
    file = flipped(directory / "step-00000050")
    lines = run("verify", directory, directory / "best", code=1).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "DAMAGED", "ok", "ok"]
    assert str(file) in lines[1]
    assert "no such file" in run("verify", directory / "nowhere", code=1).stdout


def test_diff_says_by_how_much(directory: Path) -> None:
    one, other = directory / "step-00000040", directory / "step-00000060"
    rows = cells(run("diff", one, other, code=1).stdout)
    apart = np.abs(weights(3)["layer"]["kernel"] - weights(5)["layer"]["kernel"]).max()
    found = next(row for row in rows if row[:2] == ["weights", "layer/kernel"])
    assert float(found[-1]) == pytest.approx(apart, rel=5e-3)
    assert ["run", "step", "40", "60"] in rows and not any("bias" in "".join(row) for row in rows)
    assert "are equal" in run("diff", one, one).stdout
    told = json.loads(run("diff", one, other, "--json", "--all", code=1).stdout)
    assert {each["name"]: each["largest"] for each in told}["layer/bias"] == 0.0


def test_diff_of_what_only_one_has_or_has_otherwise(tmp_path: Path) -> None:
    one = polyckpt.save(tmp_path / "one", {"a": np.ones(3), "b": np.ones((2, 3)), "c": np.array([1.0, np.nan, np.inf])})
    other = polyckpt.save(tmp_path / "other", {"b": np.ones((3, 2)), "c": np.array([1.0, np.nan, 2.0]), "d": np.ones(1)})
    told = {each["name"]: each for each in json.loads(run("diff", one, other, "--json", "--weights", code=1).stdout)}
    assert (told["a"]["one"], told["a"]["other"], told["a"]["largest"]) == ("float64[3]", "", None)
    assert (told["b"]["one"], told["b"]["other"], told["b"]["largest"]) == ("float64[2, 3]", "float64[3, 2]", None)
    assert told["c"]["largest"] == {"$float": "inf"}
    assert (told["d"]["one"], told["d"]["other"]) == ("", "float64[1]")


def test_diff_and_plan_across_frameworks(tmp_path: Path) -> None:
    import jax
    import torch
    from flax import linen

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    one = polyckpt.save(tmp_path / "torch", model)
    net = linen.Sequential([linen.Dense(7), linen.relu, linen.Dense(3)])
    there = net.init(jax.random.key(0), np.zeros((1, 5), "float32"))
    there = polyckpt.load(one, there).model
    same = polyckpt.save(tmp_path / "same", there)
    assert "all 4 are equal" in run("diff", one, same).stdout
    there["params"]["layers_2"]["bias"] = there["params"]["layers_2"]["bias"] + 0.5
    other = polyckpt.save(tmp_path / "other", there)
    told = json.loads(run("diff", one, other, "--json", code=1).stdout)
    assert [(each["name"], each["largest"]) for each in told] == [("params/layers_2/bias <- 2.bias", pytest.approx(0.5))]
    planned = run("plan", one, other).stdout
    assert re.search(r"params/layers_0/kernel +0\.weight +out in -> in out +exact", planned)


def test_plan_says_what_it_cannot_tell(tmp_path: Path) -> None:
    import torch
    from flax import nnx

    class Two(nnx.Module):
        def __init__(self) -> None:
            self.beta, self.alpha = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))

    one = polyckpt.save(tmp_path / "torch", torch.nn.ModuleDict({"x": torch.nn.Linear(4, 4), "y": torch.nn.Linear(4, 4)}))
    other = polyckpt.save(tmp_path / "nnx", Two())
    assert "x" in run("plan", one, other, code=1).stdout
    assert "not settled" not in run("plan", one, other, "--rule", "x=beta", "--rule", "y=alpha").stdout
    assert "two paths" in run("plan", one, other, "--rule", "x", code=2).stderr


def test_prune_deletes_what_nothing_keeps_and_tells_it_before(directory: Path) -> None:
    def left() -> list[str]:
        return sorted(path.name for path in directory.glob("step-*"))

    before = left()
    told = run("prune", directory, "--dry-run").stdout
    assert "would delete  step-00000050" in told and "step-00000040" not in told and left() == before
    assert "deleted  step-00000050" in run("prune", directory).stdout
    assert left() == ["step-00000040", "step-00000060"]
    with CheckpointManager(directory, monitor="val_loss") as manager:  # the run goes on
        assert [record.epoch for record in manager.checkpoints] == [4, 6] and manager.best.epoch == 4
        assert len(manager.records) == len(LOSSES)


def test_prune_leaves_a_run_alone_that_is_under_way(directory: Path) -> None:
    before = sorted(path.name for path in directory.glob("step-*"))
    with CheckpointManager(directory, monitor="val_loss") as manager:
        manager.save(weights(9), epoch=7, step=70, metrics={"val_loss": 0.3})
        during = sorted(path.name for path in directory.glob("step-*"))
        assert "another CheckpointManager writes to it" in run("prune", directory, code=2).stderr
        assert sorted(path.name for path in directory.glob("step-*")) == during
    assert before != during


def test_plot_draws_into_a_file_or_here(directory: Path, tmp_path: Path) -> None:
    for name, start in (("metrics.png", b"\x89PNG"), ("metrics.svg", b"<?xml")):
        assert run("plot", directory, tmp_path / name, "--metric", "val_loss").stdout.strip() == str(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    rows = cells(run("plot", directory).stdout)
    assert next(row for row in rows if row[0] == "val_loss")[-4:] == ["0.2", "0.9", "0.7", "0.2"]
    assert "there are val_loss, val_acc" in run("plot", directory, "--metric", "f1", code=2).stderr


def test_an_error_is_one_line_and_a_traceback_on_request(tmp_path: Path) -> None:
    told = run("show", tmp_path / "nothing", code=2)
    assert told.stdout == "" and told.stderr == f"polyckpt: {tmp_path / 'nothing'}: no such file or directory\n"
    assert "Traceback" in run("--debug", "show", tmp_path / "nothing", code=1).stderr
    assert "Traceback" in run("show", tmp_path / "nothing", "--debug", code=1).stderr
    assert "No such command" in run("shwo", code=2).stderr


@pytest.mark.parametrize("command", ["ls", "best", "show", "verify", "diff", "plan", "prune", "plot"])
def test_help_has_an_example(command: str) -> None:
    assert f"polyckpt {command} runs/" in re.sub(r"\s+", " ", run(command, "--help", COLUMNS="200").stdout)


def test_version() -> None:
    assert run("--version").stdout == f"polyckpt {polyckpt.__version__}\n"


def imported(*arguments: Any) -> set[str]:
    """The modules that a command imports."""
    program = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules))\n"  # after what the command prints
        "from polyckpt.cli import main; main()"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_no_framework_is_imported(directory: Path) -> None:
    assert not imported("verify", directory) & {"torch", "keras", "jax", "tensorflow"}


def test_listing_a_run_imports_nothing_that_opens_a_checkpoint(directory: Path) -> None:
    opening = {"numpy", "polyckpt.manifest", "polyckpt.checkpoint", "polyckpt.registry"}
    assert opening <= imported("verify", directory)
    assert not imported("ls", directory) & opening


def readme(command: str) -> list[list[str]]:
    """The rows that the README shows for a command."""
    text = (REPOSITORY / "README.md").read_text()
    block = re.search(rf"^\$ polyckpt {re.escape(command)}[^\n]*\n(.*?)(?=^\$|^```)", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return cells(block[1])


def test_the_readme_shows_what_comes(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "small", monitor="val_loss", keep_last=3) as manager:
        for epoch in range(12):
            loss = 1 / (epoch + 1) + 0.02 * (epoch - 7) ** 2 if epoch != 4 else float("nan")
            metrics = {"val_loss": loss, "val_acc": 0.5 + 0.04 * epoch}
            manager.save(weights(0), epoch=epoch + 1, step=10 * (epoch + 1), metrics=metrics)
    assert cells(run("plot", tmp_path / "small").stdout)[1:] == readme("plot runs/small")
    size_and_age = re.compile(r"\d+(\.\d+)? (B|kB|s|min)")
    told, shown = (
        [[cell for cell in row if not size_and_age.fullmatch(cell)] for row in rows]
        for rows in (cells(run("ls", tmp_path / "small").stdout)[1:], readme("ls runs/small"))
    )
    assert told == shown and len(told) == 5


def test_a_file_that_vanishes_while_a_directory_is_measured_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcde":
        (tmp_path / name).write_bytes(b"x" * 100)
    listing = os.scandir

    @contextlib.contextmanager
    def listed(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with listing(path) as entries:
            found = list(entries)
        Path(found[1].path).unlink()
        yield found

    monkeypatch.setattr(os, "scandir", listed)
    assert screen.bytes_of(tmp_path) == 400
