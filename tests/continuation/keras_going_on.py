"""Going on in Keras, from Keras and through all three, on one backend; run by test_keras.py in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import haiku
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import polyckpt
from polyckpt import MismatchError
from tests.continuation.test_going_on import Net, X, torch_run, train_nnx, train_torch

Y = np.zeros((len(X), 3), "float32")


def network(optimizer: Any = None, **settings: Any) -> Any:
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(7, activation="relu", **settings), keras.layers.Dense(3, **settings)]
    )
    if optimizer is not None:
        model.compile(optimizer, "mse")
    return model


def train(model: Any, steps: int) -> None:
    for step in range(steps):
        # The square of outputs times (step + 1), as in the other two.
        model.train_on_batch(X, Y, sample_weight=np.full(len(X), (step + 1.0) ** 2, "float32"))


def close(one: Any, other: Any) -> bool:
    return all(np.allclose(a, b, rtol=3e-5, atol=3e-6) for a, b in zip(weights(one), weights(other), strict=True))


def weights(model: Any) -> list[np.ndarray]:
    if isinstance(model, keras.Model):
        return [np.asarray(each) for each in model.get_weights()]
    if isinstance(model, torch.nn.Module):
        return [each.detach().numpy().T for each in model.parameters()]
    return [np.asarray(each[...]) for each in (model.first.kernel, model.first.bias, model.second.kernel, model.second.bias)]


@pytest.fixture
def from_torch(tmp_path: Path) -> tuple[Path, Any, Any]:
    model, optimizer = torch_run(lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, eps=1e-4))
    return polyckpt.save(tmp_path / "torch", model, optimizer, epoch=2, probe=X), model, optimizer


def test_a_compiled_model_goes_on_exactly(from_torch: tuple[Path, Any, Any], tmp_path: Path) -> None:
    path, model, optimizer = from_torch
    there = network(keras.optimizers.AdamW(0.5))
    there.fit(X, Y, verbose=0)  # compiled, and its optimizer built
    restored = polyckpt.load(path, there, continuation="exact")
    assert there.optimizer is restored.optimizer and restored.epoch == 2
    train_torch(model, optimizer, 3)
    train(there, 3)
    assert close(model, there)
    # Saved by polyckpt, by Keras, and resumed.
    middle = polyckpt.save(tmp_path / "keras", there)
    there.save(tmp_path / "whole.keras")
    again = network(type(there.optimizer).from_config(there.optimizer.get_config()))
    polyckpt.load(middle, again)
    stock = network(keras.optimizers.AdamW(0.5))
    assert polyckpt.load(middle, stock).optimizer is stock.optimizer and type(stock.optimizer) is type(there.optimizer)
    loaded = keras.models.load_model(tmp_path / "whole.keras")
    train_torch(model, optimizer, 2)
    for each in (there, again, loaded, stock):
        train(each, 2)
    assert close(model, there)
    for each in (again, loaded, stock):
        assert all(np.array_equal(a, b) for a, b in zip(weights(there), weights(each), strict=True))


def test_a_stock_optimizer_is_given_what_it_can_hold(from_torch: tuple[Path, Any, Any]) -> None:
    path, _, _ = from_torch
    there = network(keras.optimizers.AdamW(0.5))
    with pytest.raises(MismatchError, match=r"epsilon of group 0: checkpoint has 0.0001 beside the root"):
        polyckpt.load(path, there)
    assert not there.optimizer.built
    restored = polyckpt.load(path, there, accept={"epsilon"})
    found = restored.optimizer
    assert found is there.optimizer and int(keras.ops.convert_to_numpy(found.iterations)) == 5
    assert float(keras.ops.convert_to_numpy(found.learning_rate)) == pytest.approx(0.02)
    assert (found.weight_decay, found.epsilon) == (0.1, 1e-4)
    # Once it is built, Keras may have compiled what it holds.
    other = network(keras.optimizers.AdamW(0.5))
    other.fit(X, Y, verbose=0)
    with pytest.raises(MismatchError, match=r"weight_decay of group 0: checkpoint has 0.1, live object has 0.004"):
        polyckpt.load(path, other, accept={"epsilon"})


def test_slots_come_back_bit_for_bit_through_all_three(tmp_path: Path) -> None:
    """Where each step is exact: Adadelta, and NAdam under a constant momentum."""
    cases: dict[str, Any] = {
        "adadelta": (
            lambda p: torch.optim.Adadelta(p, lr=0.5, rho=0.95, eps=1e-7),
            lambda: keras.optimizers.Adadelta(0.1),
            lambda: optax.adadelta(0.5, rho=0.95, eps=1e-7),
        ),
        "sgd": (lambda p: torch.optim.SGD(p, lr=0.5), lambda: keras.optimizers.SGD(0.1), lambda: optax.sgd(0.5)),
    }
    for name, (in_torch, in_keras, in_optax) in cases.items():
        model, optimizer = torch_run(in_torch)
        first = polyckpt.save(tmp_path / name / "1", model, optimizer, probe=X, step=5)
        there = network(in_keras())
        reports = [polyckpt.load(first, there).report]
        second = polyckpt.save(tmp_path / name / "2", there, probe=X, step=5)
        flax = Net(1)
        live = nnx.Optimizer(flax, in_optax(), wrt=nnx.Param)
        reports.append(polyckpt.load(second, flax, live).report)
        third = polyckpt.save(tmp_path / name / "3", flax, live, probe=X, step=5)
        back, home = torch_run(in_torch, steps=0)
        reports.append(polyckpt.load(third, back, home).report)
        last = polyckpt.save(tmp_path / name / "4", back, home)
        assert all(report is not None and not report.optimizer[0].items for report in reports)
        one, other = polyckpt.inspect(first), polyckpt.inspect(last)
        for section in ("weights", "optimizer"):
            a, b = getattr(one, section), getattr(other, section)
            assert set(a) == set(b)
            assert all(a[key].tobytes() == b[key].tobytes() for key in a), (name, section)
        assert bool(one.optimizer) == (name == "adadelta")


def test_regularizers_are_a_coupled_decay(tmp_path: Path) -> None:
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.2))
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X)
    l2 = keras.regularizers.L2(0.1)
    there = network(keras.optimizers.SGD(0.5, momentum=0.9), kernel_regularizer=l2, bias_regularizer=l2)
    polyckpt.load(path, there)
    train_torch(model, optimizer, 3)
    for step in range(3):
        there.train_on_batch(X, Y, sample_weight=np.full(len(X), (step + 1.0) ** 2, "float32"))
    assert close(model, there)
    plain = network(keras.optimizers.SGD(0.5, momentum=0.9))
    with pytest.raises(MismatchError, match="weight_decay of group 0"):
        polyckpt.load(path, plain)


def test_a_schedule_gives_the_rate_of_its_step(tmp_path: Path) -> None:
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.4))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(5):
        scheduler.step()
    path = polyckpt.save(tmp_path / "torch", model, optimizer, scheduler=scheduler, step=5, probe=X)
    right = keras.optimizers.schedules.ExponentialDecay(0.4, 1, 0.5)
    wrong = keras.optimizers.schedules.ExponentialDecay(0.4, 1, 0.6)
    polyckpt.load(path, network(keras.optimizers.SGD(right)))
    with pytest.raises(MismatchError, match=r"learning_rate of group 0: checkpoint has 0.0125, live object has 0.031"):
        polyckpt.load(path, network(keras.optimizers.SGD(wrong)))


def test_averages_of_weights_begin_with_the_weights(tmp_path: Path) -> None:
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.4))
    path = polyckpt.save(tmp_path / "torch", model, optimizer, step=5, probe=X)
    there = network(keras.optimizers.SGD(0.1, use_ema=True, clipnorm=2.0))
    report = polyckpt.load(path, there).report
    averages = [keras.ops.convert_to_numpy(each) for each in there.optimizer._model_variables_moving_average]
    assert all(np.array_equal(a, b) for a, b in zip(averages, weights(there), strict=True))
    assert "parameter_average: default" in str(report)
    assert "clip_norm: default: none, unless the training loop does it, in the checkpoint, 2 here" in str(report)


def test_what_is_accumulated_counts_updates(tmp_path: Path) -> None:
    model, optimizer = torch_run(lambda p: torch.optim.Adadelta(p, lr=0.4, rho=0.95, eps=1e-7))
    path = polyckpt.save(tmp_path / "torch", model, optimizer, step=5, probe=X)
    there = network(keras.optimizers.Adadelta(0.1, gradient_accumulation_steps=2))
    polyckpt.load(path, there)
    assert int(keras.ops.convert_to_numpy(there.optimizer._iterations)) == 10


def test_keras_goes_on_in_flax(tmp_path: Path) -> None:
    there = network(keras.optimizers.SGD(0.05, momentum=0.9))
    train(there, 4)
    path = polyckpt.save(tmp_path / "keras", there, probe=X)
    for tx, continuation in (
        (optax.sgd(0.05, 0.9), "stock"),
        (optax.sgd(0.05, 0.9), "exact"),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=0.5, momentum=0.9), "exact"),
    ):
        model = Net(1)
        live = nnx.Optimizer(model, tx, wrt=nnx.Param)
        polyckpt.load(path, model, live, continuation=continuation)  # type: ignore[arg-type]
        assert np.array_equal(weights(model)[0], weights(there)[0])
        other = network(keras.optimizers.SGD(0.05, momentum=0.9))
        polyckpt.load(path, other)
        train(other, 2)
        train_nnx(model, live, 2)
        assert close(model, other), continuation
    # Injected, the rate can still be set by hand.
    live.opt_state[0].hyperparams["learning_rate"][...] = jnp.asarray(0.0)
    before = [each.copy() for each in weights(model)]
    train_nnx(model, live, 1)
    after = weights(model)
    assert not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_gate_of_the_other_sign_turns_first_moments_and_no_others(tmp_path: Path) -> None:
    """Haiku's update gate of a GRU is one minus that of Keras: its weights are the negative, and so are its gradients."""
    x = np.random.default_rng(3).standard_normal((4, 6, 5)).astype("float32")
    there = keras.Sequential([keras.Input((6, 5)), keras.layers.GRU(3, reset_after=False)])
    there.compile(keras.optimizers.Adam(0.02, epsilon=1e-3), "mse")
    zeros = np.zeros((4, 3), "float32")
    for _ in range(4):
        there.train_on_batch(x, zeros)
    path = polyckpt.save(tmp_path / "keras", there, probe=x)

    def unrolled(x: Any) -> Any:
        core = haiku.GRU(3)
        return haiku.dynamic_unroll(core, jnp.swapaxes(x, 0, 1), core.initial_state(len(x)))[1]

    network = haiku.without_apply_rng(haiku.transform(unrolled))
    params = network.init(jax.random.key(0), x)
    tx = optax.adam(0.02, eps=1e-3)
    restored = polyckpt.load(path, params, tx.init(params), tx=tx, apply=network.apply, continuation="exact")
    params, state = restored.model, restored.optimizer
    gradient = jax.grad(lambda params: (network.apply(params, x) ** 2).mean())
    for _ in range(3):
        changes, state = restored.tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, changes)
        there.train_on_batch(x, zeros)
    np.testing.assert_allclose(network.apply(params, x), there.predict_on_batch(x), rtol=1e-4, atol=2e-6)


def test_a_window_under_way_is_told(tmp_path: Path) -> None:
    there = network(keras.optimizers.Adadelta(0.5, gradient_accumulation_steps=3))
    train(there, 4)
    path = polyckpt.save(tmp_path / "keras", there, probe=X)
    model, optimizer = torch_run(lambda p: torch.optim.Adadelta(p, lr=0.1), steps=0)
    report = polyckpt.load(path, model, optimizer).report
    assert "gradient_accumulator: dropped: gradients of a window under way" in str(report)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_a_change_of_one_group_takes_the_slots_of_its_own(tmp_path: Path) -> None:
    """Two groups of torch with rates of their own, accepted into the one that Keras has: each momentum by its own rate."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    groups = [{"params": list(model[0].parameters()), "lr": 0.02}, {"params": list(model[2].parameters()), "lr": 0.04}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    train_torch(model, optimizer, 3)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, step=3, probe=X)
    there = network(keras.optimizers.SGD(0.5, momentum=0.9))
    polyckpt.load(path, there, accept={"learning_rate"})
    for index, (parameter, rate) in enumerate(zip(model.parameters(), (0.02, 0.02, 0.04, 0.04), strict=True)):
        held = keras.ops.convert_to_numpy(there.optimizer.momentums[index])
        np.testing.assert_allclose(held, -rate * optimizer.state[parameter]["momentum_buffer"].numpy().T, rtol=1e-6)


def without_decay_of_biases() -> tuple[Any, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.3},
        {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=0.02, eps=1e-4)


def test_biases_that_do_not_decay_go_there_and_back(tmp_path: Path) -> None:
    model, optimizer = without_decay_of_biases()
    train_torch(model, optimizer, 4)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X)

    def fresh() -> Any:
        adamw = keras.optimizers.AdamW(0.5, weight_decay=0.3)
        adamw.exclude_from_weight_decay(var_names=["bias"])
        return network(adamw)

    there = fresh()
    there.optimizer.build(there.trainable_variables)
    polyckpt.load(path, there, continuation="exact")
    train(there, 3)
    middle = polyckpt.save(tmp_path / "keras", there, probe=X)
    resumed = fresh()
    polyckpt.load(middle, resumed)
    back, home = without_decay_of_biases()
    polyckpt.load(middle, back, home)
    assert [group["weight_decay"] for group in home.param_groups] == [0.3, 0.0]
    train_torch(model, optimizer, 3)
    for each in (there, resumed):
        train(each, 2)
    for one, other in ((model, optimizer), (back, home)):
        train_torch(one, other, 2)
    assert close(model, there) and close(model, resumed) and close(model, back)


def test_groups_that_keras_cannot_hold_are_refused_or_set_up(tmp_path: Path) -> None:
    model, optimizer = without_decay_of_biases()
    optimizer.param_groups[1]["lr"] = 0.01
    train_torch(model, optimizer, 2)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X)
    there = network(keras.optimizers.AdamW(0.5, weight_decay=0.3))
    there.optimizer.exclude_from_weight_decay(var_names=["bias"])
    there.optimizer.build(there.trainable_variables)
    with pytest.raises(MismatchError, match=r"learning_rate: checkpoint has 0\.0\d and 0\.0\d, live object has one for all"):
        polyckpt.load(path, there, accept={"epsilon"})
    polyckpt.load(path, there, continuation="exact")
    train_torch(model, optimizer, 3)
    train(there, 3)
    assert close(model, there)


def test_regularizers_stay_when_another_formula_comes(tmp_path: Path) -> None:
    model, optimizer = torch_run(lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.2, eps=1e-4))
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X)
    l2 = keras.regularizers.L2(0.1)
    there = network(keras.optimizers.Adam(0.5), kernel_regularizer=l2, bias_regularizer=l2)
    polyckpt.load(path, there, continuation="exact")
    train(there, 3)
    middle = polyckpt.save(tmp_path / "keras", there, probe=X)
    back, home = torch_run(lambda p: torch.optim.Adam(p, lr=0.5), steps=0)
    polyckpt.load(middle, back, home)
    assert home.param_groups[0]["weight_decay"] == pytest.approx(0.2)
    train_torch(model, optimizer, 3)
    assert close(model, there)
    train(there, 1)
    train_torch(back, home, 1)
    assert close(back, there)


def muon_of_torch(path: Path, rates: tuple[float, float], **settings: Any) -> Path:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    kernels, biases = ([each for each in model.parameters() if each.ndim == axes] for axes in (2, 1))
    settings = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1, "nesterov": False, **settings}
    optimizers = [
        torch.optim.Muon(kernels, lr=rates[0], **settings),
        torch.optim.AdamW(biases, lr=rates[1], weight_decay=0.3, eps=1e-7, betas=(0.8, 0.95)),
    ]
    for step in range(4):
        model.zero_grad()
        (model(torch.tensor(X)) * (step + 1)).pow(2).mean().backward()
        for each in optimizers:
            each.step()
    return polyckpt.save(path, model, optimizers, step=4)


ACCEPTED = {"epsilon", "precision", "momentum"}


def test_two_rates_are_a_ratio_in_an_optimizer_that_is_not_built(tmp_path: Path) -> None:
    path = muon_of_torch(tmp_path / "torch", (0.02, 0.005))
    here = network(keras.optimizers.Muon(0.5, nesterov=False))
    polyckpt.load(path, here, accept=ACCEPTED)
    muon = here.optimizer
    assert float(keras.ops.convert_to_numpy(muon.learning_rate)) == pytest.approx(0.02)
    assert muon.adam_lr_ratio == pytest.approx(0.25) and (muon.adam_beta_1, muon.adam_beta_2) == (0.8, 0.95)
    # Keras decays all variables by the rate of the matrices.
    assert muon.weight_decay == pytest.approx(0.1) and muon.adam_weight_decay == pytest.approx(0.3 * 0.25)
    described = [
        (each.family or "muon", each.hyperparameters["learning_rate"], each.hyperparameters["weight_decay"])
        for each in polyckpt.inspect(polyckpt.save(tmp_path / "keras", here)).manifest.optimizer.groups
    ]
    assert described == [("muon", pytest.approx(0.02), pytest.approx(0.1)), ("adam", pytest.approx(0.005), pytest.approx(0.3))]


def test_two_rates_are_refused_where_their_ratio_is_built_in(tmp_path: Path) -> None:
    path = muon_of_torch(tmp_path / "torch", (0.02, 0.005))
    here = network(keras.optimizers.Muon(0.5, nesterov=False, weight_decay=0.1, adam_weight_decay=0.3, adam_beta_1=0.8))
    here.optimizer.build(here.trainable_variables)
    before = weights(here)
    with pytest.raises(MismatchError, match=r"learning_rate: checkpoint has 0\.02 and 0\.005, live object has one for all"):
        polyckpt.load(path, here, accept={*ACCEPTED, "beta1", "beta2", "weight_decay"})
    for one, other in zip(before, weights(here), strict=True):
        np.testing.assert_array_equal(one, other)


def test_momenta_and_first_moments_stand_in_one_list_of_keras(tmp_path: Path) -> None:
    here = network(keras.optimizers.Muon(0.02))
    train(here, 3)
    path = polyckpt.save(tmp_path / "keras", here)
    slots = polyckpt.inspect(path).manifest.optimizer.slots
    found = {slot: sorted(name.rpartition("/")[2] for name in entry.tensors) for slot, entry in slots.items() if entry.tensors}
    assert found["momentums"] == ["kernel", "kernel"] and slots["momentums"].meaning == "momentum"
    assert found["adam_momentums"] == ["bias", "bias"] and slots["adam_momentums"].meaning == "first_moment"
    train(here, 2)
    other = network(keras.optimizers.Muon(0.02))
    polyckpt.load(path, other)
    for step in (3, 4):  # as `train`, from where it stopped
        other.train_on_batch(X, Y, sample_weight=np.full(len(X), (step - 3 + 1.0) ** 2, "float32"))
    assert close(here, other)


def test_all_groups_of_a_continued_optimizer_follow_their_own_formula(tmp_path: Path) -> None:
    path = muon_of_torch(tmp_path / "torch", (0.02, 0.005))
    here = network(keras.optimizers.Muon(0.5, nesterov=False))
    restored = polyckpt.load(path, here, accept=ACCEPTED, continuation="exact")
    assert [form["family"] for form in restored.optimizer.forms] == ["muon", "adam"]
    assert [form["rate_factor"] for form in restored.optimizer.forms] == [1.0, pytest.approx(0.25)]
    second = polyckpt.save(tmp_path / "keras", here)
    train(here, 3)
    again = network(keras.optimizers.Muon(0.5, nesterov=False))
    polyckpt.load(second, again)
    train(again, 3)
    for one, other in zip(weights(here), weights(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_factor_of_the_loss_is_told(tmp_path: Path) -> None:
    here = network(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=1024.0))
    train(here, 1)
    path = polyckpt.save(tmp_path / "keras", here)
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.5))
    report = polyckpt.load(path, model, optimizer).report
    assert "loss_scale: default: 1024 in the checkpoint, none, unless the training loop does it" in str(report)


def test_momentum_that_looks_ahead_does_so_in_a_hook(tmp_path: Path) -> None:
    """The optimizer of torch was made without: the formula of the checkpoint counts, not the setting here."""
    here = network(keras.optimizers.SGD(0.02, momentum=0.9, nesterov=True))
    train(here, 4)
    path = polyckpt.save(tmp_path / "keras", here)
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9))
    polyckpt.load(path, model, optimizer, continuation="exact")
    train(here, 3)
    train_torch(model, optimizer, 3)
    assert close(here, model)


def test_a_rate_of_zero_says_nothing_of_ratios(tmp_path: Path) -> None:
    path = muon_of_torch(tmp_path / "torch", (0.0, 0.0))
    here = network(
        keras.optimizers.Muon(0.5, nesterov=False, weight_decay=0.1, adam_lr_ratio=0.5, adam_beta_1=0.8, adam_beta_2=0.95)
    )
    here.optimizer.build(here.trainable_variables)
    polyckpt.load(path, here, accept={*ACCEPTED, "weight_decay"})
    assert here.optimizer.adam_lr_ratio == 0.5 and float(keras.ops.convert_to_numpy(here.optimizer.learning_rate)) == 0.0
