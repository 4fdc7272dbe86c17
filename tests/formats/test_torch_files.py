"""Files that torch.save wrote: read whatever they hold, trained on bit for bit, and moved into other frameworks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn
from torch.optim.lr_scheduler import StepLR

import polyckpt
from polyckpt import MismatchError, UnsupportedError
from tests.formats.torch_nets import FLAT, OPTIMIZERS, Tied, adamw, bits, equal, equal_slots, mlp, net, same_bits, saved, train
from tests.sealing import run_python

LIMIT = 1e-5
"""Of outputs that are about one, in float32, after steps that divide small gradients by small moments."""

os.environ.setdefault("KERAS_BACKEND", "jax")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("family", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(family: str, legacy: bool, tmp_path: Path) -> None:
    path, make = tmp_path / "run.pt", OPTIMIZERS[family]
    model, optimizer, scheduler = saved(path, make, _use_new_zipfile_serialization=not legacy)
    loss = torch.load(path)["loss"].item()
    there = net()
    continued = make(there.parameters())
    schedule = StepLR(continued, 2)
    restored = polyckpt.load(path, there, continued, scheduler=schedule)
    assert (restored.epoch, restored.metrics, restored.extra) == (3, {"loss": loss}, {})
    assert equal(model, there) and equal_slots(optimizer, continued)
    for each in ((model, optimizer, scheduler), (there, continued, schedule)):
        train(*each[:2], 2, scheduler=each[2])
    assert equal(model, there) and equal_slots(optimizer, continued)
    assert continued.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)


@pytest.mark.parametrize("family", OPTIMIZERS)
def test_the_class_of_an_optimizer_is_told_by_what_it_writes(family: str, tmp_path: Path) -> None:
    _, optimizer, _ = saved(tmp_path / "run.pt", OPTIMIZERS[family])
    opened = polyckpt.open(tmp_path / "run.pt")
    told = opened.manifest.optimizer
    assert told is not None and told.type.endswith(type(optimizer).__name__) and told.family != "custom"
    assert opened.left_out == () and told.groups[0].parameters[:2] == ("conv.weight", "conv.bias")
    slot = next(slot for slot in optimizer.state[optimizer.param_groups[0]["params"][0]] if slot != "step")
    assert bits(opened.optimizer[f"{slot}/conv.weight"]) == bits(optimizer.state[optimizer.param_groups[0]["params"][0]][slot])


def test_a_class_that_cannot_be_told_is_said_and_settled_by_a_live_one(tmp_path: Path) -> None:
    model = net(0)
    states = {"model": model.state_dict(), "optimizer": torch.optim.Adamax(model.parameters()).state_dict()}
    torch.save(states, tmp_path / "run.pt")
    opened = polyckpt.open(tmp_path / "run.pt")
    assert opened.manifest.optimizer.family == "custom" and "of which class it is cannot be told" in opened.left_out[0]
    like = (net(), torch.optim.Adamax(net().parameters()))
    settled = polyckpt.open(tmp_path / "run.pt", like=like)
    assert settled.manifest.optimizer.family == "adamax" and settled.left_out == ()


SEVERAL = {
    "keys": lambda one, two: {"optimizer_conv": one, "optimizer_rest": two},
    "list": lambda one, two: {"optimizers": [one, two]},
    "dict": lambda one, two: {"optimizers": {"conv": one, "rest": two}},
}


@pytest.mark.parametrize("form", SEVERAL)
def test_several_optimizers_go_on(form: str, tmp_path: Path) -> None:
    def make(model: Any) -> list[torch.optim.Optimizer]:
        rest = [*model.norm.parameters(), *model.fc.parameters()]
        return [OPTIMIZERS["sgd"](model.conv.parameters()), OPTIMIZERS["adamw"](rest)]

    model = net(0)
    optimizers = make(model)
    train(model, optimizers, 3)
    torch.save({"model": model.state_dict(), **SEVERAL[form](*(each.state_dict() for each in optimizers))}, tmp_path / "a.pt")
    alone = polyckpt.open(tmp_path / "a.pt")
    assert alone.manifest.optimizer is None and "which number is which weight" in alone.left_out[0]
    there = net()
    continued = make(there)
    polyckpt.load(tmp_path / "a.pt", there, continued)
    train(model, optimizers, 2)
    train(there, continued, 2)
    assert equal(model, there) and all(map(equal_slots, optimizers, continued))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz", ".h5", ""])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_content_tells_and_not_the_suffix(suffix: str, legacy: bool, tmp_path: Path) -> None:
    path, model, there = tmp_path / f"weights{suffix}", net(0), net()
    with open(path, "wb") as file:
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=not legacy)
    restored = polyckpt.load(path, there)
    assert equal(model, there) and restored.checkpoint.format == "torch"


def test_a_compiled_model_loads_into_a_bare_one_and_back(tmp_path: Path) -> None:
    model, there = net(0), net()
    compiled = torch.compile(model, backend="eager")
    torch.save({"model": compiled.state_dict(), "optimizer": adamw(compiled).state_dict()}, tmp_path / "a.pt")
    polyckpt.load(tmp_path / "a.pt", there, adamw(there))
    assert equal(model, there)
    torch.save(model.state_dict(), tmp_path / "b.pt")
    other = net(2)
    polyckpt.load(tmp_path / "b.pt", torch.compile(other, backend="eager"))
    assert equal(model, other)


def test_a_wrapped_model_loads_into_a_bare_one(tmp_path: Path) -> None:
    code = """
import sys, torch, torch.distributed as dist
from tests.formats.torch_nets import OPTIMIZERS, net, train
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(net(0))
optimizer = OPTIMIZERS["adamw"](model.parameters())
train(model, optimizer, 3)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{sys.argv[1]}/ddp.pt")
dist.destroy_process_group()
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    held = torch.load(tmp_path / "ddp.pt")
    model, there = net(0), net()
    optimizer, continued = adamw(model), adamw(there)
    model.load_state_dict({name.removeprefix("module."): value for name, value in held["model"].items()})
    optimizer.load_state_dict(held["optimizer"])
    assert "module.conv.weight" in held["model"] and not equal(model, there)
    polyckpt.load(tmp_path / "ddp.pt", there, continued)
    assert equal(model, there) and equal_slots(optimizer, continued)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tokens = torch.tensor([[1, 2, 6]])
    model, there = Tied(), Tied()
    optimizer, continued = adamw(model), adamw(there)
    train(model, optimizer, 3, x=tokens)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    assert polyckpt.open(tmp_path / "a.pt").manifest.model.aliases == {"out.weight": "embedding.weight"}
    polyckpt.load(tmp_path / "a.pt", there, continued)
    assert there.out.weight is there.embedding.weight
    train(model, optimizer, 2, x=tokens)
    train(there, continued, 2, x=tokens)
    assert equal(model, there) and equal_slots(optimizer, continued)


def test_bfloat16_goes_on_and_loads_into_wider_types(tmp_path: Path) -> None:
    model, there = mlp(0).bfloat16(), mlp().bfloat16()
    optimizer, continued = adamw(model), adamw(there)
    train(model, optimizer, 3, x=FLAT.bfloat16())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    polyckpt.load(tmp_path / "a.pt", there, continued)
    wide = mlp()
    polyckpt.load(tmp_path / "a.pt", wide)
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), wide.parameters(), strict=True))
    for each in ((model, optimizer), (there, continued)):
        train(*each, 2, x=FLAT.bfloat16())
    assert equal(model, there) and equal_slots(optimizer, continued)


def test_what_loops_of_their_own_save_is_found(tmp_path: Path) -> None:
    """Numbers as tensors and as NumPy has them, arguments, paths, one more level, and whatever else there is."""
    model = net(0)
    optimizer = adamw(model)
    train(model, optimizer, 3)
    states = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iter_num": np.int64(7),
        "epoch": torch.tensor(2),
        "best_val_loss": torch.tensor(0.25),
        "val_acc": np.float32(0.5),
        "args": argparse.Namespace(width=4, out=Path("runs/a")),
        "history": np.arange(6, dtype=">f4").reshape(2, 3),
        "seen": {"a", "b"},
        "sparse": torch.eye(3).to_sparse(),
    }
    torch.save({"checkpoint": states}, tmp_path / "a.pt")
    there = net()
    continued = adamw(there)
    restored = polyckpt.load(tmp_path / "a.pt", there, continued)
    assert equal(model, there) and equal_slots(optimizer, continued)
    assert (restored.epoch, restored.step, restored.metrics) == (2, 7, {"best_val_loss": 0.25, "val_acc": 0.5})
    history = restored.extra.pop("history")
    assert history.shape == (2, 3) and np.array_equal(history, states["history"])
    assert restored.extra == {"args": {"width": 4, "out": "runs/a"}, "seen": {"a", "b"}}
    assert [each.partition(":")[0] for each in restored.checkpoint.left_out] == ["sparse"]


def test_which_of_two_models_is_meant_is_told_by_the_live_one(tmp_path: Path) -> None:
    generator, critic = mlp(0), net(0)
    torch.save({"generator": generator.state_dict(), "critic": critic.state_dict()}, tmp_path / "gan.pt")
    with pytest.raises(UnsupportedError, match=r"several state dicts, generator, critic.*pass like="):
        polyckpt.open(tmp_path / "gan.pt")
    there, other = mlp(), net()
    restored = polyckpt.load(tmp_path / "gan.pt", there)
    assert equal(generator, there) and same_bits(restored.extra["critic"]["conv.weight"], critic.conv.weight)
    polyckpt.load(tmp_path / "gan.pt", other)
    assert equal(critic, other)


def test_weights_alone_do_not_restore_an_optimizer(tmp_path: Path) -> None:
    torch.save(net(0).state_dict(), tmp_path / "a.pt")
    there = net()
    before = {name: value.clone() for name, value in there.state_dict().items()}
    with pytest.raises(MismatchError, match=r"optimizer.*pass optimizer=False to load weights only"):
        polyckpt.load(tmp_path / "a.pt", there, adamw(there))
    assert all(torch.equal(before[name], value) for name, value in there.state_dict().items())


class Nnx(nnx.Module):
    """The model of `mlp` in Flax."""

    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.first, self.second = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    """A run whose optimizer decays matrices alone, as most do, so that only a live one can tell its parameters."""
    model = mlp(0)
    optimizer = split(model)
    train(model, optimizer, 3, x=FLAT)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}, tmp_path / "a.pt")
    return tmp_path / "a.pt", model, optimizer


def split(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    matrices = [each for each in parameters if each.ndim > 1]
    rest = {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([{"params": matrices}, rest], lr=0.02, weight_decay=0.1)


def test_an_nnx_model_trains_on(moved: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    path, model, optimizer = moved
    there = Nnx(1)
    decayed = lambda params: jax.tree.map(lambda each: each.ndim > 1, params)  # noqa: E731
    live = nnx.Optimizer(there, optax.adamw(0.02, weight_decay=0.1, mask=decayed), wrt=nnx.Param)
    names = {"0": "first", "2": "second"}
    with pytest.raises(MismatchError, match=r"which number is which weight(?s:.*)pass like=\(model, optimizer\)"):
        polyckpt.load(path, there, live, like=(mlp(), split(mlp())), rules=names)
    like = mlp()
    restored = polyckpt.load(path, there, live, like=(like, split(like)), rules=names)
    assert restored.epoch == 2 and int(live.step[...]) == 3
    moment = optimizer.state[model[2].weight]["exp_avg"].numpy()
    assert np.array_equal(np.asarray(live.opt_state[0].mu["second"]["kernel"][...]).T, moment)
    assert np.abs(there(jnp.asarray(FLAT.numpy())) - model(FLAT).detach().numpy()).max() < LIMIT
    train(model, optimizer, 2, x=FLAT)
    for step in range(2):
        loss = lambda model, step=step: ((model(jnp.asarray(FLAT.numpy())) * (step + 1)) ** 2).mean()  # noqa: E731
        live.update(there, nnx.grad(loss)(there))
    assert np.abs(there(jnp.asarray(FLAT.numpy())) - model(FLAT).detach().numpy()).max() < LIMIT


def test_a_keras_model_trains_on(tmp_path: Path) -> None:
    import keras

    model = mlp(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    y = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(FLAT), y).backward()
            optimizer.step()

    steps(3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "a.pt")
    dense = keras.layers.Dense
    there = keras.Sequential([keras.Input((5,)), dense(7, activation="relu"), dense(3)])
    there.compile(keras.optimizers.SGD(0.5, momentum=0.9), "mse")
    restored = polyckpt.load(tmp_path / "a.pt", there, like=mlp())
    assert restored.step == 3 and float(there.optimizer.learning_rate) == pytest.approx(0.02)
    assert np.allclose(there.predict(FLAT.numpy(), verbose=0), model(FLAT).detach(), rtol=1e-5, atol=1e-6)
    there.fit(FLAT.numpy(), y.numpy(), batch_size=8, epochs=2, shuffle=False, verbose=0)
    steps(2)
    assert np.allclose(there.predict(FLAT.numpy(), verbose=0), model(FLAT).detach(), rtol=1e-5, atol=1e-6)
