"""A PyTorch training loop that can be stopped at any time and started again: python torch_loop.py [DIRECTORY] [--epochs N]"""

from __future__ import annotations

import argparse
import logging

import torch
from digits import images
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import polyckpt


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[tuple[torch.Tensor, ...]]) -> float:
    model.train()
    total = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    model.eval()
    logits = model(x)
    return cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


def main(directory: str, epochs: int) -> None:
    train_set, validation_set = (
        TensorDataset(torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(y).long()) for x, y in images()
    )
    torch.manual_seed(0)
    # The order of the batches is drawn from a generator of its own, which is saved beside the model.
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(train_set, batch_size=64, shuffle=True, generator=generator)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(16 * 4 * 4, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)
    extra = {"generator": generator}

    with polyckpt.CheckpointManager(
        directory, monitor="val_loss", mode="min", keep_best=3, keep_last=2, patience=5, min_delta=1e-4,
        async_save=True, preemption=True,
    ) as ckpts:  # fmt: skip
        start = ckpts.restore(model, optimizer, scheduler=scheduler, extra=extra)
        for epoch in range(start.epoch, epochs):
            if ckpts.should_stop:
                break
            loss = train(model, optimizer, loader)
            scheduler.step()
            val_loss, val_acc = evaluate(model, *validation_set.tensors)
            print(f"epoch {epoch + 1}: loss {loss:.4f}, val_loss {val_loss:.4f}, val_acc {val_acc:.4f}", flush=True)
            metrics = {"val_loss": val_loss, "val_acc": val_acc}
            ckpts.save(model, optimizer, scheduler=scheduler, epoch=epoch + 1, metrics=metrics, extra=extra)
        best = ckpts.restore_best(model)

    _, accuracy = evaluate(model, *validation_set.tensors)
    print(f"best: epoch {best.epoch}, val_acc {accuracy:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", default="runs/torch_loop", help="where the checkpoints are")
    parser.add_argument("--epochs", type=int, default=30)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main(**vars(parser.parse_args()))
