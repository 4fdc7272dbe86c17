"""What a checkpoint says of an optax optimizer: enough to compute its next update from the manifest and the slots alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import polyckpt
from polyckpt import schema
from polyckpt.checkpoint import Checkpoint
from polyckpt.optimizers import problems

SHAPES = {"a": (4, 3), "b": (5,), "c": (3, 2)}
RATE = optax.warmup_cosine_decay_schedule(0.01, 0.1, 4, 20)


def tree(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: scale * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}


def saved(tx: Any, directory: Path, steps: int = 5) -> tuple[Checkpoint, TrainState]:
    state = TrainState.create(apply_fn=None, params=tree(0), tx=tx)
    for step in range(steps):
        state = state.apply_gradients(grads=tree(step + 1, 0.01))
    return polyckpt.inspect(polyckpt.save(directory / "a", state)), state


def described(checkpoint: Checkpoint) -> schema.Optimizer:
    found = checkpoint.manifest.optimizer
    assert found is not None and not list(problems(found))
    return found


def slots(checkpoint: Checkpoint, name: str) -> dict[str, np.ndarray]:
    """The slots of one parameter by what they mean."""
    found = described(checkpoint).slots.values()
    return {slot.meaning: checkpoint.optimizer[slot.tensors[name]].astype(np.float64) for slot in found if name in slot.tensors}


def update(family: str, conventions: dict[str, str], h: dict[str, Any], s: dict[str, Any], g: Any, w: Any, t: int) -> Any:
    """What is added to w at the step t (from 1), by the formulas of the tables."""
    lr, decay, b1, b2, eps = (h.get(name, 0.0) for name in ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon"))
    if conventions.get("weight_decay") == "coupled":
        g, decay = g + decay * w, 0.0
    if "first_moment" in s and family not in ("rmsprop", "lion"):
        s["first_moment"] = b1 * s["first_moment"] + (1 - b1) * g
    mean = s.get("first_moment", 0) / (1 - b1**t)

    def root(square: Any) -> Any:
        return np.sqrt(square + eps) if conventions["epsilon"] == "inside_sqrt" else np.sqrt(square) + eps

    if family == "sgd":
        direction = g
    elif family in ("adam", "nadam", "radam", "lamb"):
        square = (b2 * s["second_moment"] + (1 - b2) * g**2) / (1 - b2**t)
        if h.get("amsgrad"):
            assert conventions["max_second_moment"] == "bias_corrected"
            square = np.maximum(s["max_second_moment"], square)
        if family == "nadam":
            assert conventions["momentum_schedule"] == "constant"
            mean = b1 * s["first_moment"] / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        direction = mean / root(square)
        if family == "radam":
            most = 2 / (1 - b2) - 1
            rho = most - 2 * t * b2**t / (1 - b2**t)
            tamed = np.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)) if rho > 5 else 0
            direction = direction * tamed if rho > 5 else mean
    elif family == "adamax":
        assert conventions["epsilon"] == "in_norm"
        direction = mean / np.maximum(b2 * s["infinity_norm"], np.abs(g) + eps)
    elif family == "rmsprop":
        square = h["rho"] * s["second_moment"] + (1 - h["rho"]) * g**2
        if h.get("centered"):
            square = square - (h["rho"] * s["first_moment"] + (1 - h["rho"]) * g) ** 2
        direction = g / root(square)
    elif family == "adagrad":
        direction = g / root(s["squared_sum"] + g**2)
    elif family == "adadelta":
        direction = (
            np.sqrt(s["squared_update"] + eps) / np.sqrt(h["rho"] * s["second_moment"] + (1 - h["rho"]) * g**2 + eps) * g
        )
    elif family == "lion":
        direction = np.sign(b1 * s["first_moment"] + (1 - b1) * g)
    momentum = h.get("momentum", 0.0)
    if conventions.get("momentum") == "scaled_by_learning_rate":
        total = momentum * s["momentum"] - lr * direction
        return momentum * total - lr * direction if h["nesterov"] else total
    if momentum:
        total = momentum * s["momentum"] + direction
        direction = direction + momentum * total if h["nesterov"] else total
    if conventions.get("weight_decay") == "in_trust_ratio":
        direction, decay = direction + decay * w, 0.0
    if family == "lamb":
        direction = direction * np.linalg.norm(w) / np.linalg.norm(direction)
    return -lr * (direction + decay * w)


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "sgd": ("sgd", lambda: optax.sgd(0.1)),
    "momentum": ("sgd", lambda: optax.sgd(RATE, 0.9)),
    "nesterov": ("sgd", lambda: optax.sgd(0.1, 0.8, nesterov=True)),
    "momentum of updates": ("sgd", lambda: optax.chain(optax.scale_by_learning_rate(RATE), optax.trace(0.9))),
    "sgd, coupled": ("sgd", lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9))),
    "adam": ("adam", lambda: optax.adam(RATE, b1=0.8, eps=1e-4)),
    "adam, coupled": ("adam", lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1))),
    "adamw": ("adam", lambda: optax.adamw(0.1, weight_decay=0.2)),
    "amsgrad": ("adam", lambda: optax.amsgrad(0.1)),
    "clipped": ("adam", lambda: optax.chain(optax.clip_by_global_norm(1e6), optax.adam(0.1))),
    "injected": ("adam", lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=RATE, b1=0.7)),
    "finite": ("adam", lambda: optax.apply_if_finite(optax.adam(0.1), 3)),
    "masked decay": ("adam", lambda: optax.adamw(0.1, weight_decay=0.2, mask={"a": True, "b": False, "c": True})),
    "masked by a function": (
        "adam",
        lambda: optax.adamw(0.1, weight_decay=0.2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    ),
    "accumulating": ("adam", lambda: optax.MultiSteps(optax.adam(0.1), 1)),
    "nadam": ("nadam", lambda: optax.nadam(0.1)),
    "radam": ("radam", lambda: optax.radam(0.1, b2=0.7)),
    "adamax": ("adamax", lambda: optax.adamax(0.1)),
    "rmsprop": ("rmsprop", lambda: optax.rmsprop(0.1, eps=1e-3)),
    "rmsprop, outside": ("rmsprop", lambda: optax.rmsprop(0.1, eps=1e-3, eps_in_sqrt=False)),
    "rmsprop, centered": ("rmsprop", lambda: optax.rmsprop(RATE, centered=True, momentum=0.9)),
    "adagrad": ("adagrad", lambda: optax.adagrad(0.1)),
    "adadelta": ("adadelta", lambda: optax.adadelta(0.1)),
    "lion": ("lion", lambda: optax.lion(0.1)),
    "lamb": ("lamb", lambda: optax.lamb(0.1, weight_decay=0.3)),
    "two rates": (
        "adam",
        lambda: optax.partition(
            {"slow": optax.adam(0.01), "fast": optax.adam(0.1, b1=0.5)}, {"a": "slow", "b": "fast", "c": "slow"}
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_next_update_follows_from_the_manifest(case: str, tmp_path: Path) -> None:
    family, make = CASES[case]
    checkpoint, state = saved(make(), tmp_path)
    optimizer = described(checkpoint)
    assert optimizer.family == family
    gradients = tree(77, 0.01)
    after = state.apply_gradients(grads=gradients)
    seen = []
    for group in optimizer.groups:
        for name in group.parameters:
            key = name.removeprefix("params/")
            before = np.asarray(state.params[key], np.float64)
            moved = np.asarray(after.params[key], np.float64) - before
            arguments = dict(group.hyperparameters), slots(checkpoint, name), np.asarray(gradients[key], np.float64), before
            expected = update(family, optimizer.conventions, *arguments, 6)
            np.testing.assert_allclose(moved, expected, rtol=2e-3, atol=2e-6 * np.abs(before).max())
            seen.append(key)
    assert sorted(seen) == list(SHAPES)


def test_adafactor_tells_what_it_is_made_of(tmp_path: Path) -> None:
    checkpoint, _ = saved(optax.adafactor(0.02, min_dim_size_to_factor=2, decay_rate=0.7, clipping_threshold=3.0), tmp_path)
    optimizer = described(checkpoint)
    assert optimizer.family == "adafactor" and optimizer.conventions == {"epsilon": "in_square", "rate": "as_given"}
    (group,) = optimizer.groups
    assert group.hyperparameters == {
        "learning_rate": 0.02,
        "epsilon": 1e-30,
        "epsilon2": 1e-3,
        "beta2_decay": -0.7,
        "clip_threshold": 3.0,
        "factored_from": 2,
    }


def test_groups_are_those_of_masks_and_labels(tmp_path: Path) -> None:
    optimizer = described(saved(CASES["masked decay"][1](), tmp_path / "1")[0])
    decays = {group.parameters: group.hyperparameters.get("weight_decay") for group in optimizer.groups}
    assert decays == {("params/a", "params/c"): 0.2, ("params/b",): None}
    checkpoint = saved(CASES["two rates"][1](), tmp_path / "2")[0]
    rates = {group.parameters: group.hyperparameters["learning_rate"] for group in described(checkpoint).groups}
    assert rates == {("params/a", "params/c"): 0.01, ("params/b",): 0.1}
    assert checkpoint.manifest.learning_rate == (0.01, 0.1)


def test_the_rate_of_a_schedule_is_that_of_the_next_update(tmp_path: Path) -> None:
    checkpoint, _ = saved(optax.adam(RATE), tmp_path, steps=7)
    assert checkpoint.manifest.learning_rate == pytest.approx(float(RATE(7)), rel=1e-6)


def test_frozen_parameters_are_in_no_group(tmp_path: Path) -> None:
    tx = optax.partition({"on": optax.adam(0.1), "off": optax.set_to_zero()}, {"a": "on", "b": "off", "c": "on"})
    assert [group.parameters for group in described(saved(tx, tmp_path)[0]).groups] == [("params/a", "params/c")]


def own(updates: Any, state: Any, params: Any = None) -> Any:
    return jax.tree.map(lambda each: -0.1 * each, updates), state


@pytest.mark.parametrize(
    "tx",
    [
        optax.GradientTransformation(lambda params: optax.EmptyState(), own),
        optax.chain(optax.scale_by_adam(), optax.scale_by_adam(), optax.scale(-0.1)),
        optax.chain(optax.scale_by_adam(), optax.clip(1.0), optax.scale(-0.1)),
        optax.chain(optax.scale_by_adam(eps_root=1e-8), optax.scale(-0.1)),
        optax.amsgrad(0.1, bias_correction_nu=False),
        optax.partition({"x": optax.adam(0.1), "y": optax.yogi(0.1)}, {"a": "x", "b": "y", "c": "x"}),
        optax.yogi(0.1),
        optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: -0.1 * count.at[()].get() ** 0)),  # fails
        optax.novograd(0.1),
    ],
)
def test_what_the_tables_do_not_say_is_custom(tx: Any, tmp_path: Path) -> None:
    optimizer = described(saved(tx, tmp_path)[0])
    assert not optimizer.conventions and not any(group.hyperparameters for group in optimizer.groups)


def test_groups_of_two_families_say_their_own(tmp_path: Path) -> None:
    tx = optax.partition({"x": optax.adam(0.1), "y": optax.sgd(0.2, 0.9)}, {"a": "x", "b": "y", "c": "x"})
    optimizer = described(saved(tx, tmp_path)[0])
    told = [
        (group.parameters, group.family or optimizer.family, {**optimizer.conventions, **group.conventions})
        for group in optimizer.groups
    ]
    assert told == [
        (("params/a", "params/c"), "adam", {"epsilon": "outside_sqrt"}),
        (("params/b",), "sgd", {"momentum": "unscaled"}),
    ]
    assert [group.hyperparameters["learning_rate"] for group in optimizer.groups] == [pytest.approx(0.1), pytest.approx(0.2)]
    meanings = {(slot.meaning, name) for slot in optimizer.slots.values() for name in slot.tensors}
    assert {("second_moment", "params/a"), ("momentum", "params/b")} <= meanings


def test_an_optimizer_of_nnx_tells_too_and_loads_as_before(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[nnx.Module, nnx.Optimizer]:
        model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(seed)), nnx.Linear(3, 2, rngs=nnx.Rngs(seed)))
        return model, nnx.Optimizer(model, optax.MultiSteps(optax.adamw(RATE), 2), wrt=nnx.Param)

    def train(model: Any, optimizer: nnx.Optimizer) -> None:
        for step in range(5):
            loss = lambda model, step=step: jnp.mean(model(jnp.ones((2, 4)) * step) ** 2)  # noqa: E731
            optimizer.update(model, nnx.grad(loss)(model))

    model, optimizer = make(0)
    train(model, optimizer)
    path = polyckpt.save(tmp_path / "nnx", model, optimizer)
    found = described(polyckpt.inspect(path))
    assert found.family == "adam" and found.conventions == {"epsilon": "outside_sqrt", "weight_decay": "decoupled"}
    assert len(found.groups) == 1 and len(found.groups[0].parameters) == 4
    again = make(1)
    polyckpt.load(path, *again)
    train(model, optimizer)
    train(*again)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, nnx.state(model), nnx.state(again[0]))))
