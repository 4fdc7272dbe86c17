"""Muon goes on with all that real runs have beside it: Adam for biases and embeddings, other rates, turned matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import polyckpt
from polyckpt import MismatchError

TOKENS = np.random.default_rng(0).integers(0, 11, (6, 4))
RATE, RATE_BESIDE = 0.02, 0.003


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 5)
        self.first, self.second = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)

    def forward(self, tokens: Any) -> Any:
        return self.second(torch.relu(self.first(self.embed(tokens))))


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(11, 5, rngs=rngs)
        self.first, self.second = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        return self.second(nnx.relu(self.first(self.embed(tokens))))


def torch_run(steps: int, *, embeddings: bool, seed: int = 0, **settings: Any) -> tuple[TorchNet, list[torch.optim.Optimizer]]:
    """embeddings: whether Muon has the table of embeddings too."""
    torch.manual_seed(seed)
    model = TorchNet()
    chosen = [each for name, each in model.named_parameters() if each.ndim == 2 and (embeddings or "embed" not in name)]
    others = [each for each in model.parameters() if all(each is not one for one in chosen)]
    settings = {"lr": RATE, "weight_decay": 0.1, **settings}
    optimizers = [torch.optim.Muon(chosen, **settings), torch.optim.AdamW(others, lr=RATE_BESIDE, weight_decay=0.2)]
    train_torch(model, optimizers, range(steps))
    return model, optimizers


def train_torch(model: TorchNet, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        model.zero_grad()
        (model(torch.tensor(TOKENS)) * (step + 1)).pow(2).mean().backward()
        for each in optimizers:
            each.step()


def train_nnx(model: Net, optimizer: nnx.Optimizer, steps: range) -> None:
    for step in steps:
        loss = lambda model, step=step: ((model(jnp.asarray(TOKENS)) * (step + 1)) ** 2).mean()  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))


def torch_weights(model: TorchNet) -> list[np.ndarray]:
    turned = lambda name, each: each.T if name.endswith("weight") and "embed" not in name else each  # noqa: E731
    return [turned(name, each.detach().numpy()) for name, each in model.named_parameters()]


def nnx_weights(model: Net) -> list[np.ndarray]:
    layers = model.embed.embedding, model.first.kernel, model.first.bias, model.second.kernel, model.second.bias
    return [np.asarray(each[...]) for each in layers]


def nnx_run(directory: Path, steps: int, **settings: Any) -> tuple[Net, nnx.Optimizer, Path]:
    """A network that was trained for some steps, its optimizer, and the checkpoint of both."""
    net = Net(0)
    optimizer = nnx_optimizer(net, **settings)
    train_nnx(net, optimizer, range(steps))
    return net, optimizer, polyckpt.save(directory / "nnx", net, optimizer)


def hidden_only(params: Any) -> Any:
    dims = optax.contrib.MuonDimensionNumbers()
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: dims if leaf.ndim == 2 and "embed" not in str(path) else None, params
    )


def nnx_optimizer(model: Net, **settings: Any) -> nnx.Optimizer:
    tx = optax.contrib.muon(
        RATE,
        adam_learning_rate=RATE_BESIDE,
        weight_decay=0.1,
        adam_weight_decay=0.2,
        **{"nesterov": False, "muon_weight_dimension_numbers": hidden_only, **settings},
    )
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


ACCEPTED = {"names and order", "epsilon", "precision", "momentum"}


def test_two_optimizers_of_torch_are_saved_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    model, optimizers = torch_run(4, embeddings=False)
    path = polyckpt.save(tmp_path / "run", model, optimizers, step=4)
    train_torch(model, optimizers, range(4, 8))
    other, fresh = torch_run(1, embeddings=False, seed=1)
    restored = polyckpt.load(path, other, fresh)
    assert restored.optimizer is fresh
    train_torch(other, fresh, range(4, 8))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(optimizers, fresh, strict=True):
        assert repr(one.state_dict()) == repr(two.state_dict())


def test_two_optimizers_are_one_of_optax_and_back(tmp_path: Path) -> None:
    model, optimizers = torch_run(4, embeddings=False, nesterov=False)
    path = polyckpt.save(tmp_path / "torch", model, optimizers, step=4)
    described = polyckpt.inspect(path).manifest.optimizer
    assert [group.family or described.family for group in described.groups] == ["muon", "adam"]
    net = Net(0)
    optimizer = nnx_optimizer(net)
    polyckpt.load(path, net, optimizer, accept=ACCEPTED)
    second = polyckpt.save(tmp_path / "nnx", net, optimizer)
    other, fresh = torch_run(1, embeddings=False, nesterov=False, seed=1)
    polyckpt.load(second, other, fresh, accept=ACCEPTED)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(optimizers, fresh, strict=True):
        for parameter, twin in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
            for slot, value in one.state[parameter].items():
                torch.testing.assert_close(two.state[twin][slot], value, rtol=0, atol=0)


def test_it_goes_on_there_as_it_would_have_here_but_for_bfloat16(tmp_path: Path) -> None:
    net, optimizer, path = nnx_run(tmp_path, 4)
    before = nnx_weights(net)
    train_nnx(net, optimizer, range(4, 9))
    for continuation, bound in (("exact", 1e-5), ("stock", 0.1)):
        model, optimizers = torch_run(1, embeddings=False, nesterov=False, seed=1)
        polyckpt.load(path, model, optimizers, accept=ACCEPTED, continuation=continuation)
        train_torch(model, optimizers, range(4, 9))
        way = max(np.abs(one - other).max() for one, other in zip(nnx_weights(net), before, strict=True))
        apart = max(np.abs(one - other).max() for one, other in zip(nnx_weights(net), torch_weights(model), strict=True))
        assert apart <= bound * way


def test_a_table_of_embeddings_lies_otherwise_than_kernels_do(tmp_path: Path) -> None:
    """Muon scales by outputs over inputs, which are rows over columns in torch and the reverse in optax, but for embeddings."""
    model, optimizers = torch_run(4, embeddings=True, nesterov=False)
    path = polyckpt.save(tmp_path / "torch", model, optimizers, step=4)
    net = Net(0)
    optimizer = nnx_optimizer(net, muon_weight_dimension_numbers=None)
    for continuation in ("stock", "exact"):
        with pytest.raises(MismatchError, match=r"scale of group .*embed/embedding.*the other way round"):
            polyckpt.load(path, net, optimizer, accept=ACCEPTED, continuation=continuation)
    polyckpt.load(path, net, optimizer, accept={*ACCEPTED, "scale"})


def test_what_muon_has_there_and_adam_here_is_refused(tmp_path: Path) -> None:
    model, optimizers = torch_run(4, embeddings=True, nesterov=False)
    path = polyckpt.save(tmp_path / "torch", model, optimizers, step=4)
    net = Net(0)
    before = nnx_weights(net)
    with pytest.raises(MismatchError, match=r"family of group .*muon.*adam for embed"):
        polyckpt.load(path, net, nnx_optimizer(net), accept=ACCEPTED)
    for one, other in zip(before, nnx_weights(net), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nesterov_momentum_of_adam_is_told_with_its_size(tmp_path: Path) -> None:
    """optax hands biases to Adam with Nesterov momentum where Muon has it, torch's users to plain Adam."""
    model, optimizers = torch_run(4, embeddings=False)
    path = polyckpt.save(tmp_path / "torch", model, optimizers, step=4)
    net = Net(0)
    optimizer = nnx_optimizer(net, nesterov=True)
    with pytest.raises(MismatchError, match=r"family of group .* adam, .*nadam, which differs \(.*of the way"):
        polyckpt.load(path, net, optimizer, accept=ACCEPTED)
    polyckpt.load(path, net, optimizer, accept={*ACCEPTED, "family"})


def test_a_scale_that_cannot_be_had_is_refused_or_set_up(tmp_path: Path) -> None:
    _, _, path = nnx_run(tmp_path, 4, consistent_rms=0.5)
    model, optimizers = torch_run(1, embeddings=False, nesterov=False, seed=1)
    restored = polyckpt.load(path, model, optimizers, accept=ACCEPTED)
    group = optimizers[0].param_groups[0]
    # torch knows but 0.2: the rest is the learning rate's, and the decay's in return.
    assert group["adjust_lr_fn"] == "match_rms_adamw"
    assert group["lr"] == pytest.approx(RATE * 0.5 / 0.2) and group["weight_decay"] == pytest.approx(0.1 * 0.2 / 0.5)
    assert "scale" in str(restored.report)


def test_a_parameter_of_two_optimizers_is_refused(tmp_path: Path) -> None:
    model = TorchNet()
    both = [torch.optim.SGD(model.parameters()), torch.optim.SGD(model.first.parameters())]
    with pytest.raises(polyckpt.PolyckptError, match=r"optimizers 0 and 1: both have first\.weight"):
        polyckpt.save(tmp_path / "run", model, both)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("saved, live", [(2, 1), (1, 2)])
def test_one_optimizer_is_not_several(saved: int, live: int, tmp_path: Path) -> None:
    model, optimizers = torch_run(2, embeddings=False)
    pick = {1: optimizers[0], 2: optimizers}
    path = polyckpt.save(tmp_path / "run", model, pick[saved])
    with pytest.raises(MismatchError, match=r"class"):
        polyckpt.load(path, model, pick[live])


def test_without_a_step_a_correction_by_it_is_refused(tmp_path: Path) -> None:
    model, optimizers = torch_run(3, embeddings=False, nesterov=False)
    frozen = [each.requires_grad_(False) for name, each in model.named_parameters() if "weight" not in name or "embed" in name]
    assert frozen
    path = polyckpt.save(tmp_path / "torch", model, optimizers[0])
    net = Net(0)
    with pytest.raises(MismatchError, match=r"step.*pass step= to save"):
        polyckpt.load(path, net, nnx_optimizer(net), accept={*ACCEPTED, "slots"})


def test_parts_of_a_matrix_do_not_go_on_as_the_whole(tmp_path: Path) -> None:
    """torch packs the gates of an LSTM into one matrix, whose directions are not those of each gate."""
    torch.manual_seed(0)
    model = torch.nn.LSTM(5, 4)
    chosen, others = ([each for each in model.parameters() if each.ndim == axes] for axes in (2, 1))
    optimizers = [torch.optim.Muon(chosen, lr=RATE, nesterov=False), torch.optim.AdamW(others, lr=RATE_BESIDE)]
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(3, 2, 5))[0].pow(2).sum().backward()
        for each in optimizers:
            each.step()
    path = polyckpt.save(tmp_path / "torch", model, optimizers, step=2)
    net = nnx.LSTMCell(5, 4, rngs=nnx.Rngs(0))
    tx = optax.contrib.muon(RATE, adam_learning_rate=RATE_BESIDE, nesterov=False, weight_decay=0.1, adam_weight_decay=0.01)
    accepted = {*ACCEPTED, "scale", "slots"}
    with pytest.raises(MismatchError, match=r"folded.*kernel.*another number of parameters for the same"):
        polyckpt.load(path, net, nnx.Optimizer(net, tx, wrt=nnx.Param), accept=accepted)


def test_matrices_with_their_outputs_first_are_not_described_as_if_last(tmp_path: Path) -> None:
    turned = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    dims = lambda params: jax.tree.map(lambda leaf: turned if leaf.ndim == 2 else None, params)  # noqa: E731
    _, _, path = nnx_run(tmp_path, 2, muon_weight_dimension_numbers=dims)
    assert not any("rms_rate" in group.hyperparameters for group in polyckpt.inspect(path).manifest.optimizer.groups)
    model, optimizers = torch_run(1, embeddings=True, nesterov=False)
    with pytest.raises(MismatchError, match="family"):
        polyckpt.load(path, model, optimizers, accept=ACCEPTED)


def test_a_factor_that_torch_has_no_key_for_is_computed_with_saved_and_resumed(tmp_path: Path) -> None:
    net, optimizer, path = nnx_run(tmp_path, 4, consistent_rms=0.5)
    before = nnx_weights(net)
    train_nnx(net, optimizer, range(4, 9))
    model, optimizers = torch_run(1, embeddings=False, nesterov=False, seed=1)
    polyckpt.load(path, model, optimizers, accept=ACCEPTED, continuation="exact")
    second = polyckpt.save(tmp_path / "torch", model, optimizers, step=4)
    other, fresh = torch_run(1, embeddings=False, nesterov=False, seed=2)
    polyckpt.load(second, other, fresh)
    train_torch(other, fresh, range(4, 9))
    way = max(np.abs(one - two).max() for one, two in zip(nnx_weights(net), before, strict=True))
    apart = max(np.abs(one - two).max() for one, two in zip(nnx_weights(net), torch_weights(other), strict=True))
    assert apart <= 1e-5 * way


def test_a_number_of_iterations_stays_one(tmp_path: Path) -> None:
    _, _, path = nnx_run(tmp_path, 2, ns_steps=3)
    model, optimizers = torch_run(1, embeddings=False, nesterov=False, seed=1)
    polyckpt.load(path, model, optimizers, accept=ACCEPTED)
    assert repr(optimizers[0].param_groups[0]["ns_steps"]) == "3"
    train_torch(model, optimizers, range(2))
