"""Schedules of the learning rate: the run goes on at the rate of its step, and what comes after is compared value by value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import torch
from flax import nnx

import polyckpt
from polyckpt import MismatchError
from tests.continuation.test_going_on import Net, X, torch_run, train_nnx, train_torch

S = torch.optim.lr_scheduler
RATE = 0.04


def warm_up_then_cosine(optimizer: Any) -> Any:
    parts = [S.LinearLR(optimizer, 0.1, 1.0, 4), S.CosineAnnealingLR(optimizer, 16)]
    return S.SequentialLR(optimizer, parts, [4])


def restarts(count: Any) -> Any:
    cycles = [optax.cosine_decay_schedule(RATE, 10 * 2**each) for each in range(8)]
    return optax.join_schedules(cycles, [10 * (2**each - 1) for each in range(1, 8)])(count)


KINDS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "constant": (lambda o: S.ConstantLR(o, 0.5, 3), optax.join_schedules([lambda _: RATE / 2, lambda _: RATE], [3])),
    "step": (lambda o: S.StepLR(o, 3, 0.5), optax.exponential_decay(RATE, 3, 0.5, staircase=True)),
    "multi-step": (
        lambda o: S.MultiStepLR(o, [2, 7, 9], 0.1),
        optax.piecewise_constant_schedule(RATE, {2: 0.1, 7: 0.1, 9: 0.1}),
    ),
    "exponential": (lambda o: S.ExponentialLR(o, 0.9), optax.exponential_decay(RATE, 1, 0.9)),
    "linear": (lambda o: S.LinearLR(o, 0.1, 1.0, 8), optax.linear_schedule(0.1 * RATE, RATE, 8)),
    "polynomial": (lambda o: S.PolynomialLR(o, 20, 2.0), optax.polynomial_schedule(RATE, 0.0, 2.0, 20)),
    "cosine with restarts": (lambda o: S.CosineAnnealingWarmRestarts(o, 10, 2), restarts),
    "one-cycle": (
        lambda o: S.OneCycleLR(o, RATE, 1101, pct_start=331 / 1101, cycle_momentum=False),
        optax.cosine_onecycle_schedule(1100, RATE, 0.3, div_factor=25.0, final_div_factor=1e4),
    ),
    "warm-up": (
        lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 4), S.ExponentialLR(o, 0.9)], [4]),
        optax.join_schedules([optax.linear_schedule(0.1 * RATE, RATE, 4), optax.exponential_decay(RATE, 1, 0.9)], [4]),
    ),
}


def in_torch(make: Callable[[Any], Any], steps: int) -> tuple[Any, Any, Any]:
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=RATE), steps=0)
    scheduler = make(optimizer)
    for _ in range(steps):
        train_torch(model, optimizer, 1)
        scheduler.step()
    return model, optimizer, scheduler


def in_nnx(schedule: Any, steps: int) -> tuple[Net, nnx.Optimizer]:
    model = Net(steps)
    optimizer = nnx.Optimizer(model, optax.sgd(schedule), wrt=nnx.Param)
    train_nnx(model, optimizer, steps)
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_of_torch_goes_on_in_optax(kind: str, tmp_path: Path) -> None:
    make, schedule = KINDS[kind]
    model, optimizer, scheduler = in_torch(make, 5)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, scheduler=scheduler, step=5, probe=X)
    report = polyckpt.load(path, *in_nnx(schedule, 0)).report
    assert "schedule: exact" in str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_of_optax_goes_on_in_torch(kind: str, tmp_path: Path) -> None:
    make, schedule = KINDS[kind]
    path = polyckpt.save(tmp_path / "nnx", *in_nnx(schedule, 5), step=5, probe=X)
    model, optimizer, scheduler = in_torch(make, 0)
    restored = polyckpt.load(path, model, optimizer, scheduler=scheduler)
    assert restored.scheduler is scheduler and "schedule: exact" in str(restored.report)
    _, other, expected = in_torch(make, 5)
    for _ in range(12):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        for each in (scheduler, expected):
            each.step()


def test_the_first_step_that_differs_is_named(tmp_path: Path) -> None:
    """torch's cosine rises again after its end, optax's stays there."""
    model, optimizer, scheduler = in_torch(warm_up_then_cosine, 5)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, scheduler=scheduler, step=5, probe=X)
    there = optax.warmup_cosine_decay_schedule(0.1 * RATE, RATE, 4, 20)
    with pytest.raises(MismatchError, match=r"schedule of group 0 at step 21: checkpoint has 0\.000384294, live object has 0"):
        polyckpt.load(path, *in_nnx(there, 0))
    report = polyckpt.load(path, *in_nnx(there, 0), accept={"schedule"}).report
    assert "schedule: approximate: 0.000384294 at step 21 in the checkpoint, 0 at step 21 here" in str(report)


def test_another_rate_at_this_step_is_refused(tmp_path: Path) -> None:
    model, optimizer, scheduler = in_torch(lambda o: S.ExponentialLR(o, 0.9), 5)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, scheduler=scheduler, step=5, probe=X)
    with pytest.raises(MismatchError, match=r"learning_rate of group 0: checkpoint has 0\.0236"):
        polyckpt.load(path, *in_nnx(optax.exponential_decay(RATE, 1, 0.8), 0))


def test_a_scheduler_of_epochs(tmp_path: Path) -> None:
    """Ten updates in two epochs, and a call after each epoch."""
    model, optimizer, scheduler = in_torch(lambda o: S.StepLR(o, 1, 0.5), 2)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, scheduler=scheduler, step=10, epoch=2, probe=X)
    rates = polyckpt.inspect(path).manifest.optimizer.rates  # type: ignore[union-attr]
    assert rates is not None and rates.updates[:3] == (0, 5, 10) and rates.values[:2] == ((0.01,), (0.005,))
    report = polyckpt.load(path, *in_nnx(optax.exponential_decay(RATE, 5, 0.5, staircase=True), 0)).report
    assert "schedule: exact" in str(report)
    back = polyckpt.save(tmp_path / "nnx", *in_nnx(optax.exponential_decay(RATE, 5, 0.5, staircase=True), 10), epoch=2, probe=X)
    model, optimizer, scheduler = in_torch(lambda o: S.StepLR(o, 1, 0.5), 0)
    polyckpt.load(back, model, optimizer, scheduler=scheduler)
    assert scheduler.last_epoch == 2 and optimizer.param_groups[0]["lr"] == 0.01


def test_what_is_not_told_is_reported(tmp_path: Path) -> None:
    model, optimizer, scheduler = in_torch(lambda o: S.ExponentialLR(o, 0.9), 5)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, scheduler=scheduler, step=5, probe=X)
    report = polyckpt.load(path, *in_nnx(float(optimizer.param_groups[0]["lr"]), 0)).report
    assert "schedule: dropped: from 0.0236196 to " in str(report)
    plateau = S.ReduceLROnPlateau(optimizer)
    path = polyckpt.save(tmp_path / "plateau", model, optimizer, scheduler=plateau, step=5, probe=X)
    report = polyckpt.load(path, *in_nnx(lambda count: 0.0236196 + 0 * count, 0)).report
    assert "schedule: default: not told in the checkpoint, its own here" in str(report)


def test_a_scheduler_that_was_called_already_is_refused(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "nnx", *in_nnx(optax.exponential_decay(RATE, 1, 0.9), 5), probe=X)
    model, optimizer, scheduler = in_torch(lambda o: S.ExponentialLR(o, 0.9), 1)
    with pytest.raises(MismatchError, match="called 1 times already: pass a new one"):
        polyckpt.load(path, model, optimizer, scheduler=scheduler)


def test_saving_leaves_a_scheduler_where_it_is(tmp_path: Path) -> None:
    model, optimizer, scheduler = in_torch(warm_up_then_cosine, 3)
    before = [repr(each.state_dict()) for each in (scheduler, *scheduler._schedulers)], optimizer.param_groups[0]["lr"]
    polyckpt.save(tmp_path / "torch", model, optimizer, scheduler=scheduler, step=3)
    assert before == (
        [repr(each.state_dict()) for each in (scheduler, *scheduler._schedulers)],
        optimizer.param_groups[0]["lr"],
    )
    assert np.isfinite(before[1])


def test_a_schedule_that_ends_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    model, optimizer, scheduler = in_torch(lambda o: S.OneCycleLR(o, RATE, 9, cycle_momentum=False), 5)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, scheduler=scheduler, step=5)
    rates = polyckpt.inspect(path).manifest.optimizer.rates  # type: ignore[union-attr]
    assert rates is not None and rates.updates == (0, 1, 2, 3, 4)
