"""A torch loop that can be killed at any moment: python digits_torch.py RUN_DIRECTORY [EPOCHS]"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from digits import STEPS_PER_EPOCH, batches, images
from torch import nn
from torch.nn.functional import cross_entropy

import polyckpt

run, epochs = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4
(x, y), (x_val, y_val) = [
    (torch.from_numpy(images).movedim(-1, 1), torch.from_numpy(labels).long()) for images, labels in images()
]

random.seed(0)
np.random.seed(0)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Dropout(0.3), nn.Linear(16 * 4 * 4, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10),
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * STEPS_PER_EPOCH)

epoch, batch, total, metrics = 0, 0, 0.0, {}
if (run / "last").exists():
    restored = polyckpt.load(run / "last", model, optimizer, scheduler=scheduler)
    epoch, batch, total, metrics = restored.epoch, restored.batch, restored.extra["loss_total"], restored.metrics
    print(f"torch: resumed in epoch {epoch + 1} after {batch} batches", flush=True)

for epoch in range(epoch, epochs):
    model.train()
    for batch, rows in batches(epoch, batch):
        loss = cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
        polyckpt.save(
            run / "last", model, optimizer, scheduler=scheduler, epoch=epoch, batch=batch + 1,
            step=epoch * STEPS_PER_EPOCH + batch + 1, metrics=metrics, extra={"loss_total": total}, overwrite=True,
        )  # fmt: skip
    model.eval()
    with torch.no_grad():
        logits = model(x_val)
    metrics = {
        "loss": total / STEPS_PER_EPOCH,
        "val_loss": cross_entropy(logits, y_val).item(),
        "val_accuracy": (logits.argmax(1) == y_val).double().mean().item(),
    }
    batch, total = 0, 0.0
    print(f"torch: epoch {epoch + 1}/{epochs} " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items()), flush=True)

polyckpt.save(run / "final", model, optimizer, scheduler=scheduler, epoch=epochs, metrics=metrics, overwrite=True)
