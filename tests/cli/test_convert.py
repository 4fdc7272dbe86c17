"""The command line on the formats of others, as it is used: in a process of its own, with models from a file of the user's."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import polyckpt
from tests.cli.test_commands import cells, on_terminal, run

NETS = """
import os
os.environ.setdefault("KERAS_BACKEND", "jax")

def torch_net():
    import torch
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 6), torch.nn.Linear(6, 2))
    return model, torch.optim.Adam(model.parameters(), lr=0.01)

def keras_net():
    import keras
    dense = keras.layers.Dense
    model = keras.Sequential([keras.layers.Input((5,)), dense(7, activation="relu"), dense(6), dense(2)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model

def broken(size):
    return size
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user, with models in a file."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def net() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    namespace: dict[str, object] = {}
    exec(NETS, namespace)
    return namespace["torch_net"]()  # type: ignore[operator]


def trained(work: Path) -> Path:
    torch.manual_seed(0)
    model, optimizer = net()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    return polyckpt.save(work / "run", model, optimizer, step=3, metrics={"loss": 0.25})


def test_out_and_back_is_exact(work: Path) -> None:
    """Through formats that hold names and values, and back into one of ours with a model that says what they are."""
    path = trained(work)
    run("convert", path, "a.safetensors")
    run("convert", "a.safetensors", "b.npz")
    done = run("convert", "b.npz", "back", "--to", "polyckpt", "--like", "nets:torch_net")
    assert done.stdout.startswith(f"wrote {work / 'back'}") and done.stderr == ""
    assert run("diff", path, "back", "--weights").stdout == "all 6 are equal\n"
    assert cells(run("plan", "b.npz", path).stdout)[2] == ["0.weight", "0.weight", "out in", "exact", "names and shapes"]
    stored = polyckpt.inspect(path).weights
    assert all(np.array_equal(value, stored[name]) for name, value in np.load("b.npz").items())
    assert all(np.array_equal(value, stored[name]) for name, value in load_file("a.safetensors").items())
    assert polyckpt.inspect("back").manifest.model.layers[0].kind == "linear"


def test_into_another_framework_by_two_models(work: Path) -> None:
    path = trained(work)
    run("convert", path, "a.safetensors")
    run("convert", "a.safetensors", "k", "--to", "polyckpt", "--like", "nets:torch_net", "--like", "nets:keras_net")
    assert run("diff", path, "k", "--weights").stdout == "all 6 are equal\n"
    keras = ("--to", "polyckpt", "--like", "nets:keras_net")
    assert "epsilon of group 0" in run("convert", path, "direct", *keras, code=2).stderr
    run("convert", path, "direct", *keras, "--accept", "epsilon")
    direct = polyckpt.inspect("direct")
    assert direct.manifest.producer.adapter == "keras" and direct.manifest.progress.step == 3
    moment = direct.optimizer["momentums/sequential/dense/kernel"]
    assert np.array_equal(moment.T, polyckpt.inspect(path).optimizer["exp_avg/0.weight"])


def test_what_is_there_is_replaced_only_by_force(work: Path) -> None:
    path = trained(work)
    Path("a.npz").write_text("precious")
    assert "is there already" in run("convert", path, "a.npz", code=2).stderr
    assert Path("a.npz").read_text() == "precious"
    run("convert", path, "a.npz", "--force")
    assert len(np.load("a.npz").files) == 6
    Path("folder").mkdir()
    Path("folder/other").write_text("precious")
    assert "is not replaced" in run("convert", path, "folder", "--to", "npz", "--force", code=2).stderr
    assert Path("folder/other").read_text() == "precious"


def test_refusals_say_what_to_do(work: Path) -> None:
    path = trained(work)
    refused = {
        "nope:net": "No module named 'nope'",
        "nets:net": "nets has no function 'net'; it has broken, keras_net, torch_net",
        "nets": "write it as module:function",
        "nets:broken": "broken() without arguments",
    }
    for name, why in refused.items():
        assert why in run("convert", path, "x.npz", "--like", name, code=2).stderr
    assert "pass --to" in run("convert", path, "x.unknown", code=2).stderr
    assert "no format is called 'pickle'" in run("convert", path, "x", "--to", "pickle", code=2).stderr
    assert "a checkpoint of polyckpt already" in run("convert", path, "x", "--to", "polyckpt", code=2).stderr
    assert "--like" in run("convert", path, "x.npz", "--rule", "a=b", code=2).stderr
    Path("text.pt").write_text("not a checkpoint at all")
    assert "neither a checkpoint of polyckpt nor one of" in run("show", "text.pt", code=2).stderr
    assert sorted(each.name for each in work.iterdir() if each.name.startswith("x")) == []


def test_a_model_that_has_other_tensors_is_not_ignored(work: Path) -> None:
    save_file({"0.weight": torch.zeros(3, 2)}, "other.safetensors", metadata={"format": "pt"})
    refused = run("convert", "other.safetensors", "x", "--to", "polyckpt", "--like", "nets:torch_net", code=2).stderr
    assert "missing    weights: 0.bias" in refused and "float32[3, 2], live object has float32[7, 5]" in refused
    path = trained(work)
    refused = run("convert", path, "x.npz", "--like", "nets:torch_net", code=2).stderr
    assert "has no part in this" in refused and not Path("x").exists()


def test_ls_best_plot_and_verify_know_other_peoples_checkpoints(work: Path) -> None:
    path = trained(work)
    Path("many").mkdir()
    for step in (1, 2):
        run("convert", path, f"many/net-{step}.safetensors")
    Path("many/damaged.npz").write_bytes(Path("many/net-1.safetensors").read_bytes()[:40])
    with zipfile.ZipFile("many/short.npz", "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY")
    told = {each["name"]: each["marks"] for each in json.loads(run("ls", "many", "--json").stdout)}
    assert told.keys() == {"net-1.safetensors", "net-2.safetensors", "short.npz", "damaged.npz"} - {"damaged.npz"}
    assert told["short.npz"] == ["damaged"]
    verified = run("verify", "many", code=1).stdout.splitlines()
    assert [line.split()[0] for line in verified] == ["ok", "ok", "DAMAGED"]
    assert "no CheckpointManager wrote" in run("prune", "many", code=2).stderr


def test_show_names_the_format(work: Path) -> None:
    path = trained(work)
    run("convert", path, "a.safetensors")
    rows = cells(run("show", "a.safetensors").stdout)
    assert ["format", "a safetensors file"] in rows
    assert ["0.weight", "float32", "7 x 5", "140 B"] in rows
    rows = cells(run("show", "a.safetensors", "--like", "nets:torch_net").stdout)
    assert ["0.weight", "linear", "float32", "7 x 5", "out in", "140 B"] in rows


def test_a_terminal_shows_that_something_happens(work: Path) -> None:
    path = trained(work)
    assert "wrote" in on_terminal("convert", path, "a.npz", columns=80)
