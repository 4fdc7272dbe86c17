"""Going on in another framework, as its users do it: groups, hooks, what is refused and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from flax.training.train_state import TrainState

import polyckpt
from polyckpt import MismatchError

X = np.random.default_rng(0).standard_normal((8, 5)).astype("float32")


def torch_run(make: Callable[[Any], torch.optim.Optimizer], steps: int = 5) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    optimizer = make(model.parameters())
    train_torch(model, optimizer, steps)
    return model, optimizer


def train_torch(model: Any, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        (model(torch.tensor(X)) * (step + 1)).pow(2).mean().backward()
        optimizer.step()


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.first, self.second = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


def train_nnx(model: Net, optimizer: nnx.Optimizer, steps: int) -> None:
    for step in range(steps):
        loss = lambda model, step=step: ((model(jnp.asarray(X)) * (step + 1)) ** 2).mean()  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))


def weights(model: Any) -> list[np.ndarray]:
    if isinstance(model, torch.nn.Module):
        return [each.detach().numpy().T for each in model.parameters()]
    return [np.asarray(each[...]) for each in (model.first.kernel, model.first.bias, model.second.kernel, model.second.bias)]


def close(one: Any, other: Any) -> bool:
    return all(np.allclose(a, b, rtol=2e-5, atol=2e-6) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture
def adamw(tmp_path: Path) -> Iterator[tuple[Path, Any, Any]]:
    model, optimizer = torch_run(lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1))
    yield polyckpt.save(tmp_path / "torch", model, optimizer, probe=X), model, optimizer


def test_an_nnx_optimizer_goes_on(adamw: tuple[Path, Any, Any]) -> None:
    path, model, optimizer = adamw
    there = Net(1)
    live = nnx.Optimizer(there, optax.adamw(0.02, weight_decay=0.1), wrt=nnx.Param)
    restored = polyckpt.load(path, there, live)
    assert restored.optimizer is live and int(live.step[...]) == 5
    assert "optimizer: torch.optim.adamw.AdamW -> flax.nnx.training.optimizer.Optimizer, step 5, 4 parameters: exact" in str(
        restored.report
    )
    train_torch(model, optimizer, 4)
    train_nnx(there, live, 4)
    assert close(model, there)


def test_a_train_state_goes_on_with_an_injected_rate(adamw: tuple[Path, Any, Any]) -> None:
    path, _, optimizer = adamw

    class Dense(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(3, name="second")(linen.relu(linen.Dense(7, name="first")(x)))

    net = Dense()
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.5, weight_decay=0.7)
    state = TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(0), X)["params"], tx=tx)
    restored = polyckpt.load(path, state, apply=lambda state, x: net.apply({"params": state.params}, x)).model
    assert int(restored.step) == 5 and float(restored.opt_state.hyperparams["learning_rate"]) == pytest.approx(0.02)
    assert float(restored.opt_state.hyperparams["weight_decay"]) == pytest.approx(0.1)
    moment = np.asarray(restored.opt_state.inner_state[0].mu["first"]["kernel"])
    first = next(iter(optimizer.state.values()))["exp_avg"]
    np.testing.assert_array_equal(moment, first.numpy().T)


def test_what_a_transformation_cannot_be_given_is_named(adamw: tuple[Path, Any, Any]) -> None:
    path, _, _ = adamw
    there = Net(1)
    before = [each.copy() for each in weights(there)]
    live = nnx.Optimizer(there, optax.adamw(0.03, weight_decay=0.2), wrt=nnx.Param)
    with pytest.raises(MismatchError) as error:
        polyckpt.load(path, there, live)
    for line in (
        "learning_rate of group 0: checkpoint has 0.02, live object has 0.03",
        "weight_decay of group 0: checkpoint has 0.1",
    ):
        assert line in str(error.value)
    assert all(np.array_equal(a, b) for a, b in zip(before, weights(there), strict=True)) and int(live.step[...]) == 0
    restored = polyckpt.load(path, there, live, accept={"learning_rate", "weight_decay"})
    assert int(live.step[...]) == 5 and close(adamw[1], there) and restored.optimizer is live


def test_another_family_is_refused(adamw: tuple[Path, Any, Any]) -> None:
    there = Net(1)
    with pytest.raises(MismatchError, match="family: checkpoint has adam, live object has sgd"):
        polyckpt.load(adamw[0], there, nnx.Optimizer(there, optax.sgd(0.1), wrt=nnx.Param))


def test_a_bare_state_needs_its_transformation(adamw: tuple[Path, Any, Any], tmp_path: Path) -> None:
    path, _, _ = adamw
    params = {
        "a": {"kernel": jnp.zeros((5, 7)), "bias": jnp.zeros(7)},
        "b": {"kernel": jnp.zeros((7, 3)), "bias": jnp.zeros(3)},
    }
    tx = optax.adamw(0.02, weight_decay=0.1)
    with pytest.raises(MismatchError, match="pass tx="):
        polyckpt.load(path, params, tx.init(params))
    restored = polyckpt.load(path, params, tx.init(params), tx=tx)
    assert int(restored.optimizer[0].count) == 5 and restored.tx is tx
    back = polyckpt.save(tmp_path / "back", restored.model, restored.optimizer, tx=tx)
    model, optimizer = torch_run(lambda p: torch.optim.AdamW(p, lr=0.5), steps=0)
    polyckpt.load(back, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02) and optimizer.param_groups[0][
        "weight_decay"
    ] == pytest.approx(0.1)


def test_an_epsilon_is_refused_accepted_or_set_up(tmp_path: Path) -> None:
    there = Net(1)
    live = nnx.Optimizer(there, optax.rmsprop(0.01, decay=0.9, eps=1e-4), wrt=nnx.Param)
    train_nnx(there, live, 4)
    path = polyckpt.save(tmp_path / "nnx", there, live, probe=X)

    def fresh() -> tuple[Any, Any]:
        return torch_run(lambda p: torch.optim.RMSprop(p, lr=0.5), steps=0)

    model, optimizer = fresh()
    with pytest.raises(MismatchError, match=r"epsilon of group 0: checkpoint has 0.0001 under the root.*accept=\{'epsilon'\}"):
        polyckpt.load(path, model, optimizer)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.5
    report = polyckpt.load(path, model, optimizer, accept={"epsilon"}).report
    assert "epsilon: approximate" in str(report) and optimizer.param_groups[0]["alpha"] == 0.9
    model, optimizer = fresh()
    polyckpt.load(path, model, optimizer, continuation="exact")
    train_nnx(there, live, 3)
    for step in range(3):
        optimizer.zero_grad()
        (model(torch.tensor(X)) * (step + 1)).pow(2).mean().backward()
        optimizer.step()
    assert close(model, there)


@pytest.mark.parametrize("closure", [False, True])
def test_a_hooked_optimizer_of_torch_is_saved_and_resumed_bit_for_bit(tmp_path: Path, closure: bool) -> None:
    there = Net(1)
    live = nnx.Optimizer(there, optax.chain(optax.scale_by_learning_rate(0.05), optax.trace(0.8)), wrt=nnx.Param)
    train_nnx(there, live, 4)
    path = polyckpt.save(tmp_path / "nnx", there, live, probe=X)
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8), steps=0)
    polyckpt.load(path, model, optimizer, continuation="exact")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def train(model: Any, optimizer: Any, scheduler: Any) -> None:
        for step in range(3):

            def loss(model: Any = model, optimizer: Any = optimizer, step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                value = (model(torch.tensor(X)) * (step + 1)).pow(2).mean()
                value.backward()
                return value

            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
            scheduler.step()

    train(model, optimizer, scheduler)
    assert all(parameter.grad is not None for parameter in model.parameters())
    middle = polyckpt.save(tmp_path / "torch", model, optimizer, scheduler=scheduler)
    described = polyckpt.inspect(middle).manifest.optimizer
    assert described and described.conventions["momentum"] == "scaled_by_learning_rate"
    again, other = torch_run(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8), steps=0)
    schedule = torch.optim.lr_scheduler.StepLR(other, 1, 0.5)
    polyckpt.load(middle, again, other, scheduler=schedule)
    train(model, optimizer, scheduler)
    train(again, other, schedule)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    # A checkpoint of a plain optimizer takes the hook away again.
    plain = polyckpt.save(tmp_path / "plain", *torch_run(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8)))
    polyckpt.load(plain, again, other)
    described = polyckpt.inspect(polyckpt.save(tmp_path / "after", again, other)).manifest.optimizer
    assert described and described.conventions["momentum"] == "unscaled"


def test_a_fused_optimizer_cannot_be_hooked(tmp_path: Path) -> None:
    there = Net(1)
    live = nnx.Optimizer(there, optax.chain(optax.scale_by_learning_rate(0.05), optax.trace(0.8)), wrt=nnx.Param)
    train_nnx(there, live, 2)
    path = polyckpt.save(tmp_path / "nnx", there, live, probe=X)
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8, fused=True), steps=0)
    before = [each.copy() for each in weights(model)]
    with pytest.raises(polyckpt.UnsupportedError, match="fused=False"):
        polyckpt.load(path, model, optimizer, continuation="exact")
    assert all(np.array_equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_groups_go_to_groups(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    groups = [
        {"params": [model[0].weight, model[2].weight], "lr": 0.02, "weight_decay": 0.1},
        {"params": [model[0].bias, model[2].bias], "lr": 0.01, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    train_torch(model, optimizer, 5)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X)
    there = Net(1)
    parts = {"kernels": optax.adamw(0.02, weight_decay=0.1), "biases": optax.adam(0.01)}
    tx = optax.partition(parts, lambda tree: jax.tree.map(lambda leaf: "kernels" if leaf.ndim > 1 else "biases", tree))
    live = nnx.Optimizer(there, tx, wrt=nnx.Param)
    report = polyckpt.load(path, there, live).report
    assert report is not None and [each.label.partition(":")[0] for each in report.optimizer] == [
        "group 0 of 2",
        "group 1 of 2",
    ]
    train_torch(model, optimizer, 4)
    train_nnx(there, live, 4)
    assert close(model, there)
    # One group for both is one decay for both.
    one = Net(1)
    with pytest.raises(MismatchError, match=r"weight_decay of group 0: checkpoint has 0.1 and 0"):
        polyckpt.load(path, one, nnx.Optimizer(one, optax.adamw(0.02, weight_decay=0.1), wrt=nnx.Param))


def test_frozen_parameters_stay_frozen(adamw: tuple[Path, Any, Any]) -> None:
    path, model, optimizer = adamw
    there = Net(1)
    parts = {"on": optax.adamw(0.02, weight_decay=0.1), "off": optax.set_to_zero()}
    tx = optax.partition(
        parts, lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: "off" if "first" in str(p) else "on", tree)
    )
    live = nnx.Optimizer(there, tx, wrt=nnx.Param)
    polyckpt.load(path, there, live)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    train_torch(model, optimizer, 1)
    train_nnx(there, live, 1)
    assert close(model, there)


def test_what_had_no_gradient_begins_anew_and_is_told(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    train_torch(model, optimizer, 3)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X)
    there = Net(1)
    live = nnx.Optimizer(there, optax.adam(0.02), wrt=nnx.Param)
    assert "slots: default: none of first/bias" in str(polyckpt.load(path, there, live).report)


def test_parameters_of_several_steps_are_refused(tmp_path: Path) -> None:
    model, optimizer = torch_run(lambda p: torch.optim.Adam(p, lr=0.02))
    model[0].requires_grad_(False)
    train_torch(model, optimizer, 2)
    for state in list(optimizer.state.values())[:2]:
        state["step"] -= 2
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X)
    there = Net(1)
    with pytest.raises(MismatchError, match="parameters of several steps"):
        polyckpt.load(path, there, nnx.Optimizer(there, optax.adam(0.02), wrt=nnx.Param))


def test_a_failing_optimizer_leaves_the_model_as_it_was(adamw: tuple[Path, Any, Any], tmp_path: Path) -> None:
    there = Net(1)
    live = nnx.Optimizer(there, optax.adamw(0.02, weight_decay=0.1), wrt=nnx.Param)
    train_nnx(there, live, 2)
    path = polyckpt.save(tmp_path / "nnx", there, live, probe=X)

    class Failing(torch.optim.AdamW):
        def load_state_dict(self, state_dict: Any) -> None:
            raise RuntimeError("no")

    model, optimizer = torch_run(lambda p: Failing(p, lr=0.5), steps=1)
    before = [each.copy() for each in weights(model)]
    with pytest.raises(MismatchError, match="refused what was stored: no"):
        polyckpt.load(path, model, optimizer)
    assert all(np.array_equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_continued_transformation_is_saved_resumed_and_converted(tmp_path: Path) -> None:
    """NAdam under torch's schedule, which optax's does not have."""
    model, optimizer = torch_run(lambda p: torch.optim.NAdam(p, lr=0.02))
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X)
    there = Net(1)
    live = nnx.Optimizer(there, optax.chain(optax.clip_by_global_norm(1e9), optax.nadam(0.02)), wrt=nnx.Param)
    polyckpt.load(path, there, live, continuation="exact")
    train_nnx(there, live, 3)
    middle = polyckpt.save(tmp_path / "nnx", there, live, probe=X)
    again = Net(2)
    other = nnx.Optimizer(again, live.tx, wrt=nnx.Param)
    polyckpt.load(middle, again, other)
    # The script that is started again still gives it the transformation of optax.
    resumed = Net(3)
    plain = nnx.Optimizer(resumed, optax.chain(optax.clip_by_global_norm(1e9), optax.nadam(0.02)), wrt=nnx.Param)
    assert polyckpt.load(middle, resumed, plain).optimizer is plain
    back, home = torch_run(lambda p: torch.optim.NAdam(p, lr=0.5), steps=0)
    report = polyckpt.load(middle, back, home).report
    assert report is not None and [item.name for item in report.optimizer[0].items] == ["clip_global_norm"]
    train_torch(model, optimizer, 3)
    for one, step in ((there, live), (again, other), (resumed, plain)):
        train_nnx(one, step, 2)
    assert all(np.array_equal(a, b) for a, b in zip(weights(there), weights(resumed), strict=True))
    for one, step in ((model, optimizer), (back, home)):
        train_torch(one, step, 2)
    assert close(there, again) and close(model, there) and close(model, back)


def test_slots_follow_packed_projections(tmp_path: Path) -> None:
    """torch packs queries, keys and values in one tensor; nnx has a kernel for each, split by head."""

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 8)
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = torch.nn.Linear(8, 11)

        def forward(self, x: torch.Tensor) -> Any:
            h = self.embedding(x)
            return self.head(h + self.attention(h, h, h, need_weights=False)[0])

    class Split(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(3)
            self.embedding = nnx.Embed(11, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.head = nnx.Linear(8, 11, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            h = self.embedding(x)
            return self.head(h + self.attention(h, h, h))

    torch.manual_seed(1)
    model, x = Packed(), np.random.default_rng(1).integers(0, 11, (3, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.tensor(x)).pow(2).mean().backward()
            optimizer.step()

    train(4)
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=x)
    there = Split()
    live = nnx.Optimizer(there, optax.adam(0.01), wrt=nnx.Param)
    report = polyckpt.load(path, there, live).report
    assert report is not None and not report.optimizer[0].items
    mu = live.opt_state[0].mu
    packed = optimizer.state[model.attention.in_proj_weight]["exp_avg"].numpy()
    assert np.array_equal(np.asarray(mu["attention"]["value"]["kernel"][...]), packed[16:].T.reshape(8, 2, 4))
    train(3)
    for _ in range(3):
        live.update(there, nnx.grad(lambda there: (there(jnp.asarray(x)) ** 2).mean())(there))
    after = model.attention.in_proj_weight.detach().numpy()[16:].T.reshape(8, 2, 4)
    np.testing.assert_allclose(np.asarray(there.attention.value.kernel[...]), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biases", ["two to one", "one to two"])
def test_two_biases_for_one_move_at_another_pace(biases: str, tmp_path: Path) -> None:
    class Flax(nnx.Module):
        def __init__(self) -> None:
            self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 5, rngs=nnx.Rngs(0)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.rnn(x)

    x = np.random.default_rng(1).standard_normal((3, 6, 4)).astype("float32")
    model, there = torch.nn.LSTM(4, 5, batch_first=True), Flax()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.tensor(x))[0].pow(2).mean().backward()
    optimizer.step()
    live = nnx.Optimizer(there, optax.adam(0.01), wrt=nnx.Param)
    live.update(there, nnx.grad(lambda there: (there(jnp.asarray(x)) ** 2).mean())(there))
    if biases == "two to one":
        path, arguments = polyckpt.save(tmp_path / "torch", model, optimizer, probe=x), (there, live)
    else:
        path, arguments = polyckpt.save(tmp_path / "nnx", there, live, probe=x), (model, optimizer)
    with pytest.raises(MismatchError, match=r"accept=\{'folded'\}"):
        polyckpt.load(path, *arguments)
    assert "folded: approximate, by how much cannot be told" in str(polyckpt.load(path, *arguments, accept={"folded"}).report)


def test_what_only_its_own_framework_can_use_is_named(tmp_path: Path) -> None:
    model, optimizer = torch_run(lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1))
    average = torch.optim.swa_utils.AveragedModel(model)
    extra = {"scaler": torch.amp.GradScaler("cpu"), "ema": average, "number": 3}
    path = polyckpt.save(tmp_path / "torch", model, optimizer, extra=extra, probe=X)
    there = Net(1)
    restored = polyckpt.load(path, there, nnx.Optimizer(there, optax.adamw(0.02, weight_decay=0.1), wrt=nnx.Param))
    assert restored.extra == {"number": 3} and restored.report is not None
    assert [each.split(",")[0] for each in restored.report.left_out] == ["extra scaler", "extra ema"]
    assert "left out: extra scaler, the state of a torch.amp.grad_scaler.GradScaler" in str(restored.report)


def test_a_flipped_bit_in_a_slot_is_found_before_anything_is_written(adamw: tuple[Path, Any, Any]) -> None:
    path, _, _ = adamw
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    there = Net(1)
    before = [each.copy() for each in weights(there)]
    live = nnx.Optimizer(there, optax.adamw(0.02, weight_decay=0.1), wrt=nnx.Param)
    with pytest.raises(polyckpt.CorruptError, match="changed after they were written"):
        polyckpt.load(path, there, live)
    assert all(np.array_equal(a, b) for a, b in zip(before, weights(there), strict=True)) and int(live.step[...]) == 0


def test_what_accumulates_or_skips_goes_on_inside(adamw: tuple[Path, Any, Any]) -> None:
    path, model, optimizer = adamw
    inner = optax.adamw(0.02, weight_decay=0.1)
    there, other = Net(1), Net(2)
    several = nnx.Optimizer(there, optax.MultiSteps(inner, 2), wrt=nnx.Param)
    polyckpt.load(path, there, several)
    assert int(several.opt_state.gradient_step[...]) == int(several.opt_state.inner_opt_state[0].count[...]) == 5
    finite = nnx.Optimizer(other, optax.apply_if_finite(optax.chain(optax.clip(1e9), inner), 3), wrt=nnx.Param)
    polyckpt.load(path, other, finite)
    train_torch(model, optimizer, 3)
    train_nnx(other, finite, 3)
    assert close(model, other)


def test_a_wider_type_is_rounded_on_request_only(tmp_path: Path) -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    train_torch(model, optimizer, 2)
    path = polyckpt.save(tmp_path / "torch", model, optimizer)
    there = nnx.Linear(5, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    live = nnx.Optimizer(there, optax.adam(0.02), wrt=nnx.Param)
    with pytest.raises(
        MismatchError, match=r"second_moment of kernel: checkpoint has float32\[3, 5\], live object has bfloat16"
    ):
        polyckpt.load(path, there, live)
    polyckpt.load(path, there, live, cast=True)
    rounded = optimizer.state[model.weight]["exp_avg"].bfloat16().float().numpy().T
    assert np.array_equal(np.asarray(live.opt_state[0].mu["kernel"][...], np.float32), rounded)


def test_groups_of_several_rates_are_set_up_together(tmp_path: Path) -> None:
    """Momentum that holds updates, each scaled by the rate of its own group; one formula for both in torch."""
    there = Net(1)
    slow = optax.chain(optax.scale_by_learning_rate(0.01), optax.trace(0.8))
    fast = optax.chain(optax.scale_by_learning_rate(0.04), optax.trace(0.8))
    label = lambda tree: jax.tree.map(lambda leaf: "slow" if leaf.ndim > 1 else "fast", tree)  # noqa: E731
    live = nnx.Optimizer(there, optax.partition({"slow": slow, "fast": fast}, label), wrt=nnx.Param)
    train_nnx(there, live, 4)
    path = polyckpt.save(tmp_path / "nnx", there, live, probe=X)

    def fresh() -> tuple[Any, Any]:
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
        groups = [{"params": [model[0].weight, model[2].weight]}, {"params": [model[0].bias, model[2].bias]}]
        return model, torch.optim.SGD(groups, lr=0.5, momentum=0.8)

    for continuation in ("stock", "exact"):
        model, optimizer = fresh()
        polyckpt.load(path, model, optimizer, continuation=continuation)  # type: ignore[arg-type]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.04])
        again = Net(2)
        other = nnx.Optimizer(again, live.tx, wrt=nnx.Param)
        polyckpt.load(path, again, other)
        train_torch(model, optimizer, 3)
        train_nnx(again, other, 3)
        assert close(model, again), continuation
    # One group for both cannot have two rates, and says so.
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8), steps=0)
    with pytest.raises(MismatchError, match="learning_rate of group 0: checkpoint has 0"):
        polyckpt.load(path, model, optimizer)


def test_before_the_first_update_torch_begins_as_it_does(tmp_path: Path) -> None:
    """Its first buffer is the gradient itself, whatever the dampening: a buffer of zeros would be another beginning."""
    there = Net(1)
    live = nnx.Optimizer(there, optax.sgd(0.02, 0.9), wrt=nnx.Param)
    path = polyckpt.save(tmp_path / "nnx", there, live, probe=X)
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), steps=0)
    polyckpt.load(path, model, optimizer)
    assert not optimizer.state
    train_torch(model, optimizer, 3)
    train_nnx(there, live, 3)
    assert close(model, there)


def test_what_only_changes_gradients_stays_in_its_place(tmp_path: Path) -> None:
    model, optimizer = torch_run(lambda p: torch.optim.NAdam(p, lr=0.02))
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X)
    params = {
        "a": {"kernel": jnp.zeros((5, 7)), "bias": jnp.zeros(7)},
        "b": {"kernel": jnp.zeros((7, 3)), "bias": jnp.zeros(3)},
    }
    clip = optax.clip_by_global_norm(0.01)
    tx = optax.chain(clip, optax.nadam(0.02))
    restored = polyckpt.load(path, params, tx.init(params), tx=tx, continuation="exact")
    middle = polyckpt.save(tmp_path / "jax", restored.model, restored.optimizer, tx=restored.tx)
    again = polyckpt.load(middle, params, tx.init(params), tx=tx)
    assert jax.tree.structure(again.optimizer) == jax.tree.structure(restored.optimizer)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again.optimizer, restored.optimizer))
    large = jax.tree.map(lambda leaf: 100 * jnp.ones_like(leaf), params)
    clipped, _ = clip.update(large, clip.init(params))
    one, other = (restored.tx.update(each, restored.optimizer, restored.model)[0] for each in (large, clipped))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-5), one, other)))


def test_arrays_of_numpy_are_no_optimizer(adamw: tuple[Path, Any, Any]) -> None:
    arrays = {"first": {"w": np.zeros((7, 5), "float32")}}
    with pytest.raises(MismatchError, match="optimizer"):
        polyckpt.load(adamw[0], arrays, {"m": np.zeros(3)})


def test_slots_that_are_factored_over_other_axes_are_refused(tmp_path: Path) -> None:
    """Of a kernel of a convolution torch averages over the window, optax over the channels: one does not give the other."""
    model = torch.nn.Conv2d(3, 4, 2)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01, eps=(1e-15, 1e-3))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 3, 5, 5)).pow(2).mean().backward()
        optimizer.step()
    path = polyckpt.save(tmp_path / "torch", model, optimizer)
    there = nnx.Conv(3, 4, (2, 2), padding="VALID", rngs=nnx.Rngs(0))
    live = nnx.Optimizer(there, optax.adafactor(0.01, min_dim_size_to_factor=1, decay_rate=0.8), wrt=nnx.Param)
    with pytest.raises(MismatchError, match=r"slots: checkpoint has those of kernel.*accept=\{'slots'\}"):
        polyckpt.load(path, there, live)
    report = polyckpt.load(path, there, live, accept={"slots"}).report
    assert "slots: default: none of kernel in the checkpoint, as before the first update here" in str(report)


@pytest.mark.parametrize(
    ("clip", "told"), [(optax.clip_by_global_norm(1.5), "clip_global_norm"), (optax.clip(1.5), "clip_value")]
)
def test_clipping_that_one_side_leaves_to_the_loop_is_told(clip: Any, told: str, tmp_path: Path) -> None:
    there = Net(1)
    live = nnx.Optimizer(there, optax.chain(clip, optax.sgd(0.01)), wrt=nnx.Param)
    train_nnx(there, live, 2)
    path = polyckpt.save(tmp_path / "nnx", there, live, probe=X, step=2)
    report = polyckpt.load(path, *torch_run(lambda p: torch.optim.SGD(p, lr=0.5), steps=0)).report
    assert f"{told}: default: 1.5 in the checkpoint, none, unless the training loop does it, here" in str(report)
    again = Net(2)
    same = nnx.Optimizer(again, optax.chain(clip, optax.sgd(0.01)), wrt=nnx.Param)
    assert told not in str(polyckpt.load(path, again, same, rules={"{*all}": "{*all}"}).report)


@pytest.mark.parametrize("continuation", ["stock", "exact"])
def test_a_model_of_equinox_goes_on(continuation: Any, tmp_path: Path) -> None:
    """It holds its activation functions as leaves, which an optimizer state has no place for."""
    model, optimizer = torch_run(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9))
    path = polyckpt.save(tmp_path / "torch", model, optimizer, probe=X, step=5)
    there = equinox.nn.MLP(5, 3, 7, 1, key=jax.random.key(0))
    chain = (optax.trace(0.9), optax.scale_by_learning_rate(0.02))
    tx = optax.chain(*(chain if continuation == "stock" else reversed(chain)))
    state = tx.init(equinox.filter(there, equinox.is_inexact_array))
    call = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    restored = polyckpt.load(path, there, state, tx=tx, apply=call, continuation=continuation)
    there, state = restored.model, restored.optimizer
    for step in range(3):
        loss = lambda model, step=step: ((call(model, jnp.asarray(X)) * (step + 1)) ** 2).mean()  # noqa: E731
        changes, state = restored.tx.update(
            equinox.filter_grad(loss)(there), state, equinox.filter(there, equinox.is_inexact_array)
        )
        there = equinox.apply_updates(there, changes)
    train_torch(model, optimizer, 3)
    np.testing.assert_allclose(there.layers[0].weight, model[0].weight.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_what_clips_updates_is_no_step_of_gradients() -> None:
    """Adafactor ends with a bound of its updates, by the same transformation that elsewhere bounds gradients."""
    from polyckpt.adapters.jax import transforms

    before = transforms.gradient_steps(optax.chain(optax.zero_nans(), optax.clip(1.0), optax.adafactor(0.1)))
    assert before is not None and len(before) == 2
    assert transforms.gradient_steps(optax.adafactor(0.1)) == []
