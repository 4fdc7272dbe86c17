"""The digits in PyTorch, some epochs of them: python move_torch.py RUN_DIRECTORY FIRST_EPOCH EPOCHS OF_ALL"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from digits import STEPS_PER_EPOCH, batches, images
from torch import nn
from torch.nn.functional import cross_entropy

import polyckpt

run, (first, epochs, of_all) = Path(sys.argv[1]), map(int, sys.argv[2:5])
x, y = images()[0]
x, y = torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(y).long()

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(16 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=of_all * STEPS_PER_EPOCH)

losses: list[float] = []
for epoch in range(first, epochs):
    for _, rows in batches(epoch, 0):
        loss = cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())

step = epochs * STEPS_PER_EPOCH
# The probe is what proves the conversion right, the order in which the images are flattened above all.
polyckpt.save(
    run / "last", model, optimizer, epoch=epochs, step=step, extra={"losses": losses}, probe=x[:4].numpy(), overwrite=True
)
