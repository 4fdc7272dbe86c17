"""What is written for torch: files and folders that its own loaders read, exactly, where polyckpt cannot be imported."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import polyckpt
from tests.formats.torch_nets import Tied, X, adamw, equal, equal_slots, mlp, net, saved, train
from tests.sealing import run_python

ALONE = """
import sys
sys.modules["polyckpt"] = None
import torch
"""


def test_torch_goes_on_from_what_is_exported_without_us(tmp_path: Path) -> None:
    model = net(0)
    optimizer = adamw(model)
    scheduler = StepLR(optimizer, 2)
    train(model, optimizer, 3, scheduler=scheduler)
    polyckpt.save(tmp_path / "run", model, optimizer, scheduler=scheduler, epoch=1, step=3, metrics={"loss": 0.25})
    polyckpt.export(tmp_path / "run", tmp_path / "a.pt")
    alone = (
        ALONE
        + """
from pathlib import Path
names = {"__name__": "nets"}
exec(Path(sys.argv[1]).read_text(), names)
held = torch.load(sys.argv[2], weights_only=True)
assert (held["epoch"], held["step"], held["metrics"]) == (1, 3, {"loss": 0.25}), held.keys()
model = names["net"](1)
optimizer = names["OPTIMIZERS"]["adamw"](model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
model.load_state_dict(held["model_state_dict"])
optimizer.load_state_dict(held["optimizer_state_dict"])
scheduler.load_state_dict(held["scheduler_state_dict"])
names["train"](model, optimizer, 2, scheduler=scheduler)
torch.save([model.state_dict(), optimizer.state_dict()], sys.argv[3])
"""
    )
    # In a process of its own too, since other work of this one may change how torch computes.
    resumed = """
import sys, torch, polyckpt
from tests.formats.torch_nets import adamw, net, train
model = net(1)
optimizer = adamw(model)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
polyckpt.load(sys.argv[2], model, optimizer, scheduler=scheduler)
train(model, optimizer, 2, scheduler=scheduler)
torch.save([model.state_dict(), optimizer.state_dict()], sys.argv[3])
"""
    ends = []
    for code, source in ((alone, tmp_path / "a.pt"), (resumed, tmp_path / "run")):
        done = run_python(code, Path(__file__).with_name("torch_nets.py"), source, tmp_path / "after.pt")
        assert done.returncode == 0, done.stderr
        there = net()
        continued = adamw(there)
        for live, state in zip((there, continued), torch.load(tmp_path / "after.pt"), strict=True):
            live.load_state_dict(state)
        ends.append((there, continued))
    (exported, slots), (expected, slots_expected) = ends
    assert equal(exported, expected) and equal_slots(slots, slots_expected) and not equal(exported, model)


def test_exported_weights_are_exact_and_tied_for_torch_and_safetensors(tmp_path: Path) -> None:
    model = nn.ModuleDict({"tied": Tied(), "narrow": mlp(0).bfloat16(), "count": nn.BatchNorm1d(4)})
    polyckpt.save(tmp_path / "run", model)
    torch.save(model.state_dict(), tmp_path / "expected.pt")
    for name in ("a.pt", "a.safetensors"):
        polyckpt.export(tmp_path / "run", tmp_path / name)
    code = ALONE + (
        """
import safetensors.torch
expected, ours = (torch.load(path, weights_only=True) for path in sys.argv[1:3])
others = safetensors.torch.load_file(sys.argv[3])
assert expected.keys() == ours.keys()
for name, value in expected.items():
    assert torch.equal(value, ours[name]) and value.dtype == ours[name].dtype, name
    if name in others:
        assert torch.equal(value, others[name]) and value.dtype == others[name].dtype, name
assert expected.keys() - others.keys() <= {"tied.out.weight"}
tied = ours["tied.out.weight"], ours["tied.embedding.weight"]
assert tied[0].data_ptr() == tied[1].data_ptr()
"""
    )
    done = run_python(code, tmp_path / "expected.pt", tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr
    for name in ("a.pt", "a.safetensors"):
        there = nn.ModuleDict({"tied": Tied(), "narrow": mlp().bfloat16(), "count": nn.BatchNorm1d(4)})
        polyckpt.load(tmp_path / name, there)
        assert equal(model, there) and there["tied"].out.weight is there["tied"].embedding.weight


def test_a_file_that_torch_wrote_goes_out_again_with_its_optimizer(tmp_path: Path) -> None:
    model, optimizer, _ = saved(tmp_path / "a.pt")
    polyckpt.export(tmp_path / "a.pt", tmp_path / "b.pt")
    held, before = torch.load(tmp_path / "b.pt", weights_only=True), torch.load(tmp_path / "a.pt", weights_only=True)
    assert held["optimizer_state_dict"]["param_groups"] == before["optimizer_state_dict"]["param_groups"]
    assert held["scheduler_state_dict"] == before["scheduler_state_dict"] and held["epoch"] == 3
    there = net()
    there.load_state_dict(held["model_state_dict"])
    continued = adamw(there)
    continued.load_state_dict(held["optimizer_state_dict"])
    assert equal(model, there) and equal_slots(optimizer, continued)
    assert torch.equal(model.eval()(X), there.eval()(X))
