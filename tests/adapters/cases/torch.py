"""PyTorch runs: every optimizer class, every scheduler, and the modules that checkpoints stumble over."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt


def _seed(seed: int) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _net() -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * 4 * 5, 7),
        nn.LayerNorm(7),
        nn.Linear(7, 3, bias=False),
    )


def _image() -> Any:
    import torch

    # Data from all three random states.
    return torch.randn(5, 2, 6, 7) * random.random() + float(np.random.rand())


def _arrays(prefix: str, value: Any) -> dict[str, Any]:
    """Every tensor of a nested state by name."""
    import torch

    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous()
        return {prefix: flat.reshape(-1).view(torch.uint8).numpy().reshape(-1) if flat.numel() else np.zeros(0)}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = {name: array for key, child in items for name, array in _arrays(f"{prefix}/{key}", child).items()}
    return found or {prefix: np.frombuffer(repr(value).encode(), np.uint8)}


class TorchRun:
    """A loop of forward, backward, optimizer step, scheduler step."""

    def __init__(
        self,
        seed: int,
        optimizer: Callable[[Any], Any],
        scheduler: Callable[[Any], Any] | None = None,
        net: Callable[[], Any] = _net,
        data: Callable[[], Any] = _image,
        extra: Callable[[TorchRun], dict[str, Any]] | None = None,
    ) -> None:
        import torch

        _seed(seed)
        self.torch = torch
        self.net, self.data = net(), data
        self.optimizer = optimizer(self.net)
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.extra = extra(self) if extra else {}
        self.loss = 1.0

    def forward(self) -> Any:
        output = self.net(self.data())
        return (output[0] if isinstance(output, tuple) else output).float().square().mean()

    def closure(self) -> Any:
        self.optimizer.zero_grad()
        loss = self.forward()
        loss.backward()
        return loss

    def step(self) -> float:
        loss = self.optimizer.step(self.closure)
        self.loss = float(loss)
        if self.scheduler is not None:
            plateau = isinstance(self.scheduler, self.torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([self.loss] if plateau else []))
        return self.loss

    def save(self, path: Path) -> None:
        polyckpt.save(path, self.net, self.optimizer, scheduler=self.scheduler, extra=self.extra)

    def load(self, path: Path) -> None:
        polyckpt.load(path, self.net, self.optimizer, scheduler=self.scheduler, extra=self.extra)

    def state(self) -> dict[str, Any]:
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else {}
        for key in ("_schedulers",):
            scheduler = {**scheduler, **({key: list(scheduler[key])} if key in scheduler else {})}
        extra = {
            name: value.get_state() if isinstance(value, self.torch.Generator) else value.state_dict()
            for name, value in self.extra.items()
        }
        return {
            **_arrays("net", self.net.state_dict()),
            **_arrays("optimizer", self.optimizer.state_dict()),
            **_arrays("scheduler", scheduler),
            **_arrays("extra", extra),
            "rng": self.torch.get_rng_state().numpy(),
            "numpy": np.random.get_state()[1],
            "python": np.asarray(random.getstate()[1]),
        }


def _optimizer(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(net: Any) -> Any:
        import torch

        return getattr(torch.optim, name)(net.parameters(), **options)

    return make


def _groups(net: Any) -> Any:
    """Three groups with their own hyperparameters, not in the order of the model, one parameter frozen."""
    import torch

    first, *_, last = [module for module in net if list(module.parameters())]
    middle = [p for module in net for p in module.parameters() if module not in (first, last)]
    middle[0].requires_grad_(False)
    return torch.optim.AdamW(
        [
            {"params": last.parameters(), "lr": 3e-3, "weight_decay": 0.0},
            {"params": middle, "betas": (0.8, 0.95), "amsgrad": True},
            {"params": first.parameters(), "lr": torch.tensor(2e-3)},
        ],
        lr=1e-3,
    )


def _matrix_net() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False))


def _matrix() -> Any:
    import torch

    return torch.randn(7, 6)


def _sparse_net() -> Any:
    import torch
    from torch import nn

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 5, sparse=True)

        def forward(self, index: Any) -> Any:
            return self.table(index) * torch.arange(1.0, 6.0)

    return Bag()


def _indices() -> Any:
    import torch

    return torch.randint(0, 11, (4,))


def _schedulers() -> dict[str, Callable[[Any], Any]]:
    def make(name: str, **options: Any) -> Callable[[Any], Any]:
        def build(optimizer: Any) -> Any:
            import torch

            return getattr(torch.optim.lr_scheduler, name)(optimizer, **options)

        return build

    def sequential(optimizer: Any) -> Any:
        import torch

        parts = [make("LinearLR", total_iters=2)(optimizer), make("CosineAnnealingLR", T_max=9)(optimizer)]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])

    def chained(optimizer: Any) -> Any:
        import torch

        parts = [make("ConstantLR", total_iters=4)(optimizer), make("ExponentialLR", gamma=0.9)(optimizer)]
        return torch.optim.lr_scheduler.ChainedScheduler(parts)

    class Warmup:
        """A callable schedule with state of its own, as LambdaLR allows."""

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, epoch: int) -> float:
            self.calls += 1
            return min(1.0, self.calls / 9)

    def swa(optimizer: Any) -> Any:
        import torch

        return torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=5)

    return {
        "LambdaLR": lambda optimizer: make("LambdaLR", lr_lambda=Warmup())(optimizer),
        "MultiplicativeLR": make("MultiplicativeLR", lr_lambda=lambda epoch: 0.95),
        "StepLR": make("StepLR", step_size=2),
        "MultiStepLR": make("MultiStepLR", milestones=[1, 4, 4]),
        "ConstantLR": make("ConstantLR", total_iters=4),
        "LinearLR": make("LinearLR", total_iters=5),
        "ExponentialLR": make("ExponentialLR", gamma=0.9),
        "PolynomialLR": make("PolynomialLR", total_iters=8),
        "CosineAnnealingLR": make("CosineAnnealingLR", T_max=7),
        "CosineAnnealingWarmRestarts": make("CosineAnnealingWarmRestarts", T_0=2),
        "ReduceLROnPlateau": make("ReduceLROnPlateau", patience=0, cooldown=1),
        "CyclicLR": make("CyclicLR", base_lr=1e-4, max_lr=1e-2, step_size_up=2, mode="exp_range", gamma=0.9),
        "OneCycleLR": make("OneCycleLR", max_lr=0.02, total_steps=12),
        "SequentialLR": sequential,
        "ChainedScheduler": chained,
        "SWALR": swa,
    }


def _tied_net() -> Any:
    import torch
    from torch import nn

    class Tied(nn.Module):
        """An embedding tied to the output, a module used under two names, and an expanded buffer."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.inner = nn.Linear(6, 6)
            self.again = self.inner
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("expanded", torch.rand(1, 6).expand(4, 6))
            self.register_buffer("strided", torch.rand(5, 8)[:, ::2])
            self.register_buffer("scratch", torch.rand(3), persistent=False)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, index: Any) -> Any:
            self.count += 1
            return self.head(self.again(torch.tanh(self.inner(self.embedding(index)))) * self.expanded)

    return Tied()


def _parametrized_net() -> Any:
    from torch import nn
    from torch.nn.utils import parametrizations

    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 5)),
        parametrizations.spectral_norm(nn.Linear(5, 5)),
        parametrizations.orthogonal(nn.Linear(5, 4)),
    )


def _recurrent_net() -> Any:
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, 2, proj_size=3, bidirectional=True, dropout=0.2)
            self.gru = nn.GRU(6, 5)
            self.cell = nn.RNNCell(5, 4)
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 9)

        def forward(self, x: Any) -> Any:
            x = self.gru(self.lstm(x)[0])[0]
            x = self.cell(x.flatten(0, 1)).unsqueeze(1)
            return self.encoder(self.attention(x, x, x)[0])

    return Recurrent()


def _sequence() -> Any:
    import torch

    return torch.randn(4, 3, 6)


def _mixed_net() -> Any:
    import torch
    from torch import nn

    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(torch.bfloat16)
    net.register_buffer("lookup", torch.randn(3, 2).to(torch.float8_e4m3fn))
    net.register_buffer("phase", torch.randn(2, 3, dtype=torch.complex64))
    net.register_buffer("packed", torch.randint(0, 255, (7,), dtype=torch.uint8))
    return net


def _bfloat() -> Any:
    import torch

    return torch.randn(7, 6).to(torch.bfloat16)


class _MasterAdam:
    """Builds Adam whose moments are float32 although the parameters are bfloat16."""

    def __call__(self, net: Any) -> Any:
        import torch

        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, foreach=False)
        for parameter in net.parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros(parameter.shape, dtype=torch.float32),
                "exp_avg_sq": torch.zeros(parameter.shape, dtype=torch.float32),
            }
        return optimizer


class MasterRun(TorchRun):
    """Steps the float32 moments by hand: torch itself has no optimizer that keeps them."""

    def step(self) -> float:
        loss = self.closure()
        with self.torch.no_grad():
            for parameter in self.net.parameters():
                state = self.optimizer.state[parameter]
                state["step"] += 1
                state["exp_avg"].lerp_(parameter.grad.float(), 0.1)
                state["exp_avg_sq"].mul_(0.99).add_(parameter.grad.float().square() * 0.01)
                parameter.sub_(0.01 * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8))
        return float(loss)


class ExtrasRun(TorchRun):
    """EMA, an extra generator, a second optimizer, and steps through GradScaler's bookkeeping."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, _optimizer("RAdam", lr=1e-2), extra=ExtrasRun._extras)

    def _extras(self) -> dict[str, Any]:
        torch = self.torch
        critic = torch.nn.Linear(3, 1)
        generator = torch.Generator().manual_seed(int(torch.randint(0, 1000, ())))
        return {
            "ema": torch.optim.swa_utils.AveragedModel(
                self.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
            ),
            "critic": critic,
            "critic optimizer": torch.optim.SGD(critic.parameters(), lr=0.1, momentum=0.9),
            "generator": generator,
            "scaler": torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2),
        }

    def step(self) -> float:
        scaler, critic, second = self.extra["scaler"], self.extra["critic"], self.extra["critic optimizer"]
        self.optimizer.zero_grad()
        second.zero_grad()
        noise = self.torch.randn(5, 3, generator=self.extra["generator"])
        loss = (critic(self.net(self.data())) * noise).square().mean()
        scaler.scale(loss).backward()
        scaler.step(self.optimizer)
        scaler.step(second)
        scaler.update()
        self.extra["ema"].update_parameters(self.net)
        return float(loss)


class AccumulationRun(TorchRun):
    """Updates every second step; the save falls between the two, so the gradients are part of the run."""

    micro_steps = 0

    def step(self) -> float:
        loss = self.forward()
        loss.backward()
        self.micro_steps += 1
        if self.micro_steps % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss)

    def save(self, path: Path) -> None:
        gradients = {name: parameter.grad for name, parameter in self.net.named_parameters()}
        polyckpt.save(path, self.net, self.optimizer, extra={"gradients": gradients, "micro_steps": self.micro_steps})

    def load(self, path: Path) -> None:
        restored = polyckpt.load(path, self.net, self.optimizer)
        self.micro_steps = restored.extra["micro_steps"]
        for name, parameter in self.net.named_parameters():
            parameter.grad = restored.extra["gradients"][name]


def _compiled_net() -> Any:
    import torch

    # The eager backend wraps and renames as any other does, and compiles nothing.
    net = _net()
    net[5] = torch.compile(net[5], backend="eager")
    return torch.compile(net, backend="eager")


_LR = {"lr": 1e-2}

CASES: dict[str, Callable[[int], Any]] = {
    **{
        name: functools.partial(TorchRun, optimizer=_optimizer(kind, **options))
        for name, kind, options in [
            ("SGD", "SGD", _LR),
            ("SGD-momentum", "SGD", {**_LR, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
            ("SGD-nesterov", "SGD", {**_LR, "momentum": 0.9, "nesterov": True}),
            ("Adam", "Adam", _LR),
            ("Adam-amsgrad-foreach", "Adam", {**_LR, "amsgrad": True, "foreach": True}),
            ("Adam-fused", "Adam", {**_LR, "fused": True}),
            ("AdamW", "AdamW", _LR),
            ("AdamW-maximize", "AdamW", {"lr": 1e-4, "maximize": True}),
            ("NAdam", "NAdam", _LR),
            ("RAdam", "RAdam", _LR),
            ("Adamax", "Adamax", _LR),
            ("Adadelta", "Adadelta", {}),
            ("Adagrad", "Adagrad", {**_LR, "lr_decay": 0.1}),
            ("RMSprop", "RMSprop", _LR),
            ("RMSprop-centered-momentum", "RMSprop", {**_LR, "centered": True, "momentum": 0.5}),
            ("Rprop", "Rprop", _LR),
            ("ASGD", "ASGD", {**_LR, "t0": 2}),
            ("Adafactor", "Adafactor", _LR),
            ("LBFGS", "LBFGS", {"lr": 0.1, "max_iter": 3, "history_size": 4, "line_search_fn": "strong_wolfe"}),
        ]
    },
    "Muon": functools.partial(TorchRun, optimizer=_optimizer("Muon", **_LR), net=_matrix_net, data=_matrix),
    "SparseAdam": functools.partial(TorchRun, optimizer=_optimizer("SparseAdam", **_LR), net=_sparse_net, data=_indices),
    "groups": functools.partial(TorchRun, optimizer=_groups),
    **{
        f"scheduler-{name}": functools.partial(TorchRun, optimizer=_optimizer("SGD", lr=0.05, momentum=0.8), scheduler=make)
        for name, make in _schedulers().items()
    },
    "tied": functools.partial(TorchRun, optimizer=_optimizer("AdamW", **_LR), net=_tied_net, data=_indices),
    "parametrized": functools.partial(TorchRun, optimizer=_optimizer("AdamW", **_LR), net=_parametrized_net, data=_matrix),
    "recurrent": functools.partial(TorchRun, optimizer=_optimizer("NAdam", **_LR), net=_recurrent_net, data=_sequence),
    "dtypes": functools.partial(TorchRun, optimizer=_optimizer("AdamW", lr=0.1), net=_mixed_net, data=_bfloat),
    "float32-moments": functools.partial(MasterRun, optimizer=_MasterAdam(), net=_mixed_net, data=_bfloat),
    "extras": ExtrasRun,
    "accumulation": functools.partial(AccumulationRun, optimizer=_optimizer("AdamW", **_LR)),
    "compiled": functools.partial(TorchRun, optimizer=_optimizer("Adam", **_LR), net=_compiled_net),
}
