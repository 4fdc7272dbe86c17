"""Checkpoints that a Trainer of Lightning wrote: how far it came, what it measured, and training on, in a loop of one's own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import polyckpt
from polyckpt import MismatchError, NotACheckpointError
from tests.formats.torch_nets import X, adamw, equal, equal_slots, net


class Module(lightning.LightningModule):
    """The model stands in an attribute, as it usually does, and a second one where it is asked for."""

    def __init__(self, width: int = 4, critic: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net(0)
        if critic:
            self.critic = nn.Linear(2, 3)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self)
        return [optimizer], [StepLR(optimizer, 2)]


def fit(directory: Path, epochs: int, module: Module | None = None, **when: Any) -> Module:
    """Train for some epochs of three steps, with checkpoints."""
    module = module or Module()
    data = DataLoader(TensorDataset(X), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[ModelCheckpoint(directory, save_top_k=-1, **when)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory / "root",
        )
        trainer.fit(module, data, data)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Module]:
    directory = tmp_path_factory.mktemp("lightning")
    return directory, fit(directory, 3, monitor="val_loss", save_last=True)


def test_progress_and_the_metric_are_found(run: tuple[Path, Module]) -> None:
    directory, _ = run
    found = []
    for path in sorted(directory.glob("*.ckpt")):
        opened = polyckpt.open(path)
        raw = torch.load(path, weights_only=True)
        score = next(iter(raw["callbacks"].values()))["current_score"].item()
        assert dict(opened.manifest.metrics) == {"val_loss": score}
        found.append((path.name, opened.manifest.progress.epoch, opened.manifest.progress.step, opened.manifest.progress.batch))
    assert found == [
        ("epoch=0-step=3.ckpt", 1, 3, None),
        ("epoch=1-step=6.ckpt", 2, 6, None),
        ("epoch=2-step=9.ckpt", 3, 9, None),
        ("last.ckpt", 3, 9, None),
    ]


def test_within_an_epoch_the_batches_are_counted(tmp_path: Path) -> None:
    fit(tmp_path, 2, every_n_train_steps=2)
    progress = [polyckpt.open(path).manifest.progress for path in sorted(tmp_path.glob("*.ckpt"))]
    # The last is saved after the last batch, when the epoch is not over yet.
    assert [(each.epoch, each.step, each.batch) for each in progress] == [(0, 2, 2), (1, 4, 1), (1, 6, 3)]


def test_a_loop_of_ones_own_goes_on_as_lightning_would(run: tuple[Path, Module]) -> None:
    directory, module = run
    middle = directory / "epoch=1-step=6.ckpt"
    there = Module()
    optimizer = adamw(there)
    scheduler = StepLR(optimizer, 2)
    restored = polyckpt.load(middle, there, optimizer, scheduler=scheduler)
    assert restored.extra["hyper_parameters"] == {"width": 4, "critic": False} and scheduler.last_epoch == 2
    there.train()
    for (batch,) in DataLoader(TensorDataset(X), batch_size=2):
        optimizer.zero_grad()
        there.net(batch).square().mean().backward()
        optimizer.step()
    scheduler.step()
    assert equal(module, there)
    after = adamw(module)
    after.load_state_dict(torch.load(directory / "last.ckpt")["optimizer_states"][0])
    assert equal_slots(after, optimizer)


def test_the_bare_model_inside_is_loaded_with_its_optimizer(run: tuple[Path, Module]) -> None:
    directory, module = run
    bare = net()
    optimizer = adamw(bare)
    restored = polyckpt.load(directory / "last.ckpt", bare, optimizer)
    assert equal(module.net, bare) and restored.epoch == 3
    raw = torch.load(directory / "last.ckpt")["optimizer_states"][0]
    assert all(
        torch.equal(state["exp_avg_sq"], raw["state"][number]["exp_avg_sq"])
        for number, state in enumerate(optimizer.state.values())
    )
    around = Module()
    torch.save(bare.state_dict(), directory / "bare.pt")
    polyckpt.load(directory / "bare.pt", around)
    assert equal(around, module)


def test_a_part_of_a_module_is_named_and_loads_where_the_rest_may_stay(tmp_path: Path) -> None:
    module = fit(tmp_path, 1, Module(critic=True))
    path = next(tmp_path.glob("*.ckpt"))
    bare = net()
    with pytest.raises(MismatchError) as error:
        polyckpt.load(path, bare)
    assert [(each.kind, each.name) for each in error.value.problems] == [
        ("unexpected", "critic.weight"),
        ("unexpected", "critic.bias"),
    ]
    restored = polyckpt.load(path, bare, strict=False)
    assert equal(module.net, bare) and len(restored.skipped) == 2


def test_a_directory_of_checkpoints_lists_them(run: tuple[Path, Module]) -> None:
    with pytest.raises(NotACheckpointError, match=r"a directory of checkpoints, .*epoch=0-step=3.ckpt.*name the one"):
        polyckpt.open(run[0])
