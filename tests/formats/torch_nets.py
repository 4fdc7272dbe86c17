"""Small torch models of unequal dimensions, trained, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(3))
FLAT = torch.randn(8, 5, generator=torch.Generator().manual_seed(4))

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
}


class Net(nn.Module):
    """A convolution, a norm with buffers, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


class Tied(nn.Module):
    """A language model in little: what embeds is what tells."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.embedding(x))


def net(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net()


def mlp(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"](model.parameters())


def train(model: nn.Module, optimizers: Any, steps: int, *, scheduler: Any = None, x: torch.Tensor = X) -> torch.Tensor:
    """Some steps, and the loss of the last."""
    several: Sequence[torch.optim.Optimizer] = optimizers if isinstance(optimizers, list) else [optimizers]
    loss = torch.zeros(())
    for step in range(steps):
        for each in several:
            each.zero_grad()
        loss = (model(x) * (step + 1)).square().mean()
        loss.backward()
        for each in several:
            each.step()
        if scheduler is not None:
            scheduler.step()
    return loss


def saved(path: Path, make: Make = OPTIMIZERS["adamw"], **more: Any) -> tuple[nn.Module, torch.optim.Optimizer, StepLR]:
    """A run of three steps, saved as the tutorials of PyTorch do."""
    model = net(0)
    optimizer = make(model.parameters())
    scheduler = StepLR(optimizer, 2)
    loss = train(model, optimizer, 3, scheduler=scheduler)
    states = {
        "epoch": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "loss": loss,
    }
    torch.save(states, path, **more)
    return model, optimizer, scheduler


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether all tensors are, bit for bit."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and same_bits(x, y) for (a, x), (b, y) in pairs)


def same_bits(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def bits(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(value).tobytes()


def equal_slots(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    """Whether two optimizers hold the same of each parameter, in their order."""
    states = [list(each.state_dict()["state"].values()) for each in (one, other)]
    return len(states[0]) == len(states[1]) > 0 and all(
        a.keys() == b.keys() and all(same_bits(a[slot], b[slot]) for slot in a) for a, b in zip(*states, strict=True)
    )
