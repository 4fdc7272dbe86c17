"""Directories of torch.distributed.checkpoint, of one process and of several that hold shards, read by a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict
from torch.distributed.checkpoint.stateful import Stateful

import polyckpt
from polyckpt import CorruptError, PolyckptError, UnsupportedError
from tests.formats.torch_nets import FLAT, adamw, equal, equal_slots, mlp, net, same_bits, train
from tests.sealing import REPOSITORY

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Run = tuple[nn.Module, torch.optim.Optimizer]


def run() -> Run:
    model = net(0)
    optimizer = adamw(model)
    train(model, optimizer, 3)
    return model, optimizer


class App(Stateful):
    """What the tutorial of torch saves: model and optimizer as one."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parts = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(*self.parts)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def flattened(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer, options=options)}


FORMS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], dict[str, Any]]] = {
    "numbered": lambda model, optimizer: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
    "named": lambda model, optimizer: dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)),
    "flattened": flattened,
    "one object": lambda model, optimizer: {"app": App(model, optimizer)},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on(form: str, tmp_path: Path) -> None:
    model, optimizer = run()
    dcp.save({**FORMS[form](model, optimizer), "epoch": 2, "step": 3, "loss": 0.5}, checkpoint_id=tmp_path, no_dist=True)
    there = net()
    continued = adamw(there)
    restored = polyckpt.load(tmp_path, there, continued)
    assert (restored.epoch, restored.step, restored.metrics) == (2, 3, {"loss": 0.5}) and restored.checkpoint.format == "dcp"
    train(model, optimizer, 2)
    train(there, continued, 2)
    assert equal(model, there) and equal_slots(optimizer, continued)


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 7), nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) - 2 * self.right(x)


def test_slots_go_by_name_and_not_by_their_place(tmp_path: Path) -> None:
    """Two layers of one shape, given to the live optimizer in another order."""
    model, there = Twins(), Twins()
    optimizer = adamw(model)
    train(model, optimizer, 3, x=FLAT)
    dcp.save(FORMS["named"](model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    continued = torch.optim.AdamW([*there.right.parameters(), *there.left.parameters()])
    polyckpt.load(tmp_path, there, continued)
    for one, other in ((model.left, there.left), (model.right, there.right)):
        assert same_bits(optimizer.state[one.weight]["exp_avg"], continued.state[other.weight]["exp_avg"])
    assert not same_bits(continued.state[there.left.weight]["exp_avg"], continued.state[there.right.weight]["exp_avg"])


def test_bfloat16_and_empty_tensors_are_exact(tmp_path: Path) -> None:
    model = mlp(0).bfloat16()
    model.register_buffer("nothing", torch.zeros(0, 3))
    model.register_buffer("count", torch.tensor(7))
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    there = mlp().bfloat16()
    there.register_buffer("nothing", torch.zeros(0, 3))
    there.register_buffer("count", torch.tensor(0))
    polyckpt.load(tmp_path, there)
    assert equal(model, there)


SHARDED = """
import sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.formats.torch_nets import FLAT, adamw, mlp, train
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2)
model = mlp(0)
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = adamw(model)
train(model, optimizer, 3, x=FLAT)
states = dict(zip(("model", "optim"), get_state_dict(model, optimizer)))
assert type(states["model"]["0.weight"]).__name__ == "DTensor"
dcp.save({**states, "step": 3}, checkpoint_id=f"{sys.argv[1]}/saved")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saved, each of them a part of every tensor; seven rows are no equal parts."""
    directory = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(directory), str(rank)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for each in ranks:
        output, _ = each.communicate(timeout=120)
        assert each.returncode == 0, output
    return directory / "saved"


def test_shards_of_two_processes_are_put_together(sharded: Path) -> None:
    assert len(list(sharded.glob("*.distcp"))) == 2
    model, there = mlp(0), mlp()
    optimizer, continued = adamw(model), adamw(there)
    restored = polyckpt.load(sharded, there, continued)
    assert restored.step == 3
    # Both ranks saw the same batch, so that the mean of their gradients is that of one process.
    train(model, optimizer, 3, x=FLAT)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(model.parameters(), there.parameters(), strict=True))
    whole = {"model": {name: torch.empty_like(value) for name, value in there.state_dict().items()}}
    dcp.load(whole, checkpoint_id=sharded, no_dist=True)
    assert all(same_bits(value, whole["model"][name]) for name, value in there.state_dict().items())
    held = polyckpt.open(sharded)
    slots = {f"optim.state.{name}.exp_avg": torch.empty_like(value) for name, value in there.named_parameters()}
    dcp.load(slots, checkpoint_id=sharded, no_dist=True)
    for name, parameter in there.named_parameters():
        assert same_bits(continued.state[parameter]["exp_avg"], slots[f"optim.state.{name}.exp_avg"])
        assert held.optimizer[f"exp_avg/{name}"].shape == tuple(parameter.shape)


def saved(path: Path) -> Path:
    model, optimizer = run()
    dcp.save(FORMS["numbered"](model, optimizer), checkpoint_id=path, no_dist=True)
    return path


class Canary:
    """A pickle that would run code: it names a function and what to call it with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_an_index_cannot_run_code(tmp_path: Path) -> None:
    path = saved(tmp_path / "saved")
    (path / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    with pytest.raises(UnsupportedError, match=r"\.metadata: it names posix\.system, .*so it is not read"):
        polyckpt.open(path)
    assert not (tmp_path / "ran").exists()


def test_a_value_cannot_run_code(tmp_path: Path) -> None:
    model, _ = run()
    dcp.save({"model": model.state_dict(), "x": Canary(tmp_path / "ran")}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(UnsupportedError, match=r"x: it is a pickle that needs posix\.system"):
        polyckpt.open(tmp_path / "saved")
    assert not (tmp_path / "ran").exists()


def test_an_index_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    path = saved(tmp_path / "saved")
    index = path / ".metadata"
    (tmp_path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes())
    name = b"__0_0.distcp"
    outside = b"../" + name[:-3]
    assert len(outside) == len(name) and name in index.read_bytes()
    index.write_bytes(index.read_bytes().replace(name, outside))
    with pytest.raises(CorruptError, match=r"not the name of a file in the directory"):
        polyckpt.open(path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "saved")
    (path / "__0_0.distcp").rename(path / "other.distcp")
    with pytest.raises(CorruptError, match=r"__0_0.distcp.*the index says"):
        polyckpt.open(path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_parts_of_files_are_refused(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "saved")
    whole = (path / name).read_bytes()
    for size in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        (path / name).write_bytes(whole[:size])
        with pytest.raises(PolyckptError):
            polyckpt.open(path).verify()


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    """Of the data each changed bit is found by the checksums of torch, or changes nothing that is read."""
    path = saved(tmp_path / "saved")
    opened = polyckpt.open(path)
    before = {name: value.tobytes() for part in (opened.weights, opened.optimizer) for name, value in part.items()}
    data = path / "__0_0.distcp"
    whole = data.read_bytes()
    refused = 0
    for place in range(0, len(whole), 607):
        data.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            opened = polyckpt.open(path)
            found = {name: value.tobytes() for part in (opened.weights, opened.optimizer) for name, value in part.items()}
        except PolyckptError:
            refused += 1
        else:
            assert found == before
    assert refused > 10
