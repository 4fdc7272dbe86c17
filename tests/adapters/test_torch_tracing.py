"""Tracing torch modules: what layers make, what is flattened into a linear one, and that nothing changes."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from polyckpt import UnsupportedError
from polyckpt.adapters.torch import TorchAdapter
from polyckpt.dtypes import lookup
from tests.adapters.traced import traced_by, values

traced = functools.partial(traced_by, TorchAdapter())


def reference(model: nn.Module, *arguments: np.ndarray) -> np.ndarray:
    model.eval()
    with torch.no_grad():
        found = model(*map(torch.from_numpy, arguments)).numpy()
    model.train()
    return found


class Net(nn.Module):
    """Layers that run in another order than they are made in, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 5))
        self.norm = nn.BatchNorm1d(4)
        self.shared = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.norm(self.shared(self.shared(x))) * y))


def test_layers_are_told_in_the_order_in_which_they_end() -> None:
    model = Net()
    x, y = values(7, 4), values(7, 4)
    expected = reference(model, x, y)
    (output,), log = traced(model, x, y)
    assert np.array_equal(output, expected) and output.dtype == np.float32
    assert log.paths == ["shared", "shared", "norm", "inner.0", "inner.1", "head"]
    assert set(log.paths) == {layer.path for layer in TorchAdapter().capture_model(model).layers}
    once = reference(model.shared, x)
    assert np.array_equal(log.outputs[0][1], once)
    assert np.array_equal(log.outputs[1][1], reference(model.shared, once))
    assert np.array_equal(log.outputs[-1][1], expected)
    assert not log.shapes


class Stateful(nn.Module):
    """It counts its calls, keeps a memory that is not trained, replaces a buffer, and draws from every random state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.memory = nn.Parameter(torch.ones(2), requires_grad=False)
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.memory.mul_(2)
        x = self.norm(self.linear(x)) + torch.rand(2) + random.random() + float(np.random.rand())
        self.last = x[0]
        if self.fails:
            raise RuntimeError("no such thing")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_everything_is_as_before(fails: bool) -> None:
    model = Stateful()
    model.fails = fails
    model.norm.eval()
    state = {key: (value, value.detach().clone()) for key, value in model.state_dict(keep_vars=True).items()}
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    flags = [module.training for module in model.modules()]
    if fails:
        with pytest.raises(UnsupportedError, match="RuntimeError: no such thing") as caught:
            traced(model, values(4, 3))
        assert isinstance(caught.value.__cause__, RuntimeError)
    else:
        assert traced(model, values(4, 3))[1].paths == ["linear", "norm", ""]
    assert [module.training for module in model.modules()] == flags == [True, True, False]
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is value and torch.equal(value, copy) for key, (value, copy) in state.items())
    assert torch.equal(torch.get_rng_state(), random_states[0]) and random.getstate() == random_states[1]
    assert np.array_equal(np.random.get_state()[1], random_states[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_trace_between_forward_and_backward() -> None:
    model = Net()
    loss = model(torch.from_numpy(values(7, 4)), torch.ones(7, 4)).square().sum()
    traced(model, values(7, 4), values(7, 4))
    loss.backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.abs().sum() > 0


def test_neither_train_nor_eval_is_called() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("merges its weights")

    model = nn.Sequential(nn.Linear(3, 4), Merging(4, 2))
    assert traced(model, values(2, 3))[1].paths == ["0", "1"]


class Flattened(nn.Module):
    """A convolution whose output gets to a linear layer in the way that `between` says."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.between = between
        self.linear = nn.Linear(3 * 4 * 5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.between(self.conv(x)))


def _added(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(len(x), -1)
    flat += 1
    return flat + torch.flatten(x * 2, 1)


@pytest.mark.parametrize(
    "between",
    [
        nn.Flatten(),
        nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Identity(), nn.GELU()),
        lambda x: x.view(x.size(0), -1),
        lambda x: functional.relu(x.reshape(-1, 60)) * 2 - 1,
        lambda x: 1 - (torch.flatten(x, start_dim=1) / 3).clamp(min=0).to(torch.float64).float().contiguous(),
        lambda x: functional.dropout(x.flatten(1).reshape(-1, 60), 0.5, training=False).tanh_(),
        _added,
    ],
)
def test_what_is_flattened_into_a_linear_layer(between: Any) -> None:
    model = Flattened(between)
    x = values(7, 2, 5, 6)
    expected = reference(model, x)
    (output,), log = traced(model, x)
    assert log.shapes == {"linear": (3, 4, 5)}
    assert np.array_equal(output, expected)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.flatten(1).flip(1),
        lambda x: x.flatten(1).sort(dim=1).values,
        lambda x: x.flatten(1).cumsum(1),
        lambda x: x.flatten(1).softmax(1),
        lambda x: x.flatten(1) + torch.arange(60.0).expand(len(x), 60),
        lambda x: x.flatten(1) + x.permute(0, 2, 3, 1).flatten(1),
        lambda x: x.mean((2, 3)).repeat(1, 20),
        lambda x: torch.stack([x.reshape(-1, 60)] * 2, 1)[:, 0],
    ],
)
def test_what_moves_or_mixes_features_is_not_called_flattened(between: Any) -> None:
    assert traced(Flattened(between), values(7, 2, 5, 6))[1].shapes == {}


def test_features_of_a_sequence_are_not_flattened() -> None:
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.reshape(-1, 6)).view(len(x), -1, 2)

    assert traced(Each(), values(3, 4, 6))[1].shapes == {}


def test_wrapped_and_compiled_models_have_the_paths_of_the_plain_one() -> None:
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = values(5, 3, 4)
    expected = reference(inner, x)
    compiled = torch.compile(inner, backend="eager")
    compiled(torch.from_numpy(x))
    for model, path in [(compiled, "1"), (nn.Sequential(compiled), "0.1"), (nn.DataParallel(inner), "1")]:
        (output,), log = traced(model, x)
        assert np.array_equal(output, expected)
        assert log.paths == [path] == [layer.path for layer in TorchAdapter().capture_model(model).layers]
        assert log.shapes == {path: (3, 4)}


def test_a_recurrent_layer_gives_what_its_last_depth_made() -> None:
    x = values(2, 5, 3)
    for depths, directions, paths in [(1, 1, ["l0"]), (2, 1, ["l1"]), (2, 2, ["l1", "l1_reverse"])]:
        model = nn.LSTM(3, 4, depths, batch_first=True, bidirectional=directions == 2)
        outputs, log = traced(model, x)
        assert log.paths == paths and len(outputs) == 3
        assert np.array_equal(np.concatenate([made for _, made in log.outputs], -1), outputs[0])


def test_trees_of_arguments_and_outputs() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 3, dtype=torch.bfloat16)

        def forward(self, batch: Any, scale: float) -> Any:
            rows = self.embedding(batch["tokens"][0])
            ordered = OrderedDict(z=batch["tokens"][0], a=None)
            return {"z": rows, "a": (rows.double() * scale, [batch["other"]])}, ordered

    model = Tree()
    tokens = np.array([[3, 1, 10]], np.int32)
    other = np.array([0.5])
    outputs, log = traced(model, {"tokens": [tokens], "other": other}, 3.0)
    rows = model.embedding.weight.detach().float().numpy()[tokens]
    # The keys of a dict sorted, those of an OrderedDict not; what torch alone has as float32.
    assert [output.dtype.name for output in outputs] == ["float64", "float32", "float32", "int32"]
    assert np.array_equal(outputs[0], rows.astype(np.float64) * 3) and np.array_equal(outputs[2], rows)
    assert np.array_equal(outputs[1], [0.5]) and np.array_equal(outputs[3], tokens)
    assert np.array_equal(log.outputs[0][1], rows)


def test_a_batch_is_copied() -> None:
    class Writing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.zero_()

    x = values(2, 3)
    assert not traced(Writing(), x)[0][0].any() and x.all()


@pytest.mark.parametrize("given", ["float64", "float32", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16])
def test_floating_inputs_take_the_type_of_the_parameters(given: str, own: torch.dtype) -> None:
    x = values(4, 3).astype(lookup(given, "").numpy)
    model = nn.Linear(3, 2, dtype=own)
    (output,), _ = traced(model, x)
    expected = model(torch.from_numpy(x.astype(np.float64)).to(own)).detach()
    assert np.array_equal(output, (expected if own == torch.float64 else expected.float()).numpy())


@pytest.mark.parametrize("given", ["int64", "int32", "uint8", "int4", "bool"])
def test_integers_stay_integers(given: str) -> None:
    tokens = np.array([[1, 0, 1]]).astype(lookup(given, "").numpy)
    (output,), _ = traced(nn.Identity(), tokens)
    assert output.dtype.kind == tokens.dtype.kind or (given == "int4" and output.dtype == np.int32)
    assert np.array_equal(output.astype(int), [[1, 0, 1]])
    (output,), _ = traced(nn.Identity(), np.array([2**40], ">i8"))
    assert output.dtype == np.int64 and output == 2**40


def test_what_cannot_be_called_needs_a_function() -> None:
    weights = {"kernel": torch.from_numpy(values(3, 2))}
    x = values(4, 3)
    with pytest.raises(UnsupportedError, match="pass apply="):
        traced(weights, x)
    outputs, log = traced(weights, x, apply=lambda model, batch: batch @ model["kernel"])
    assert np.allclose(outputs[0], x @ values(3, 2)) and not log.outputs
    with pytest.raises(UnsupportedError, match=r"model: it cannot be run on the batch: RuntimeError: .*4x7"):
        traced(nn.Linear(3, 2), values(4, 7))
    lazy = nn.LazyLinear(2)
    (output,), _ = traced(lazy, x)
    assert lazy.weight.shape == (2, 3) and np.allclose(output, x @ lazy.weight.detach().numpy().T + lazy.bias.detach().numpy())


def test_apply_says_how_the_model_is_called() -> None:
    model = Net()
    (output,), log = traced(model, {"x": values(7, 4)}, apply=lambda net, batch: net(batch["x"], y=batch["x"]))
    assert np.array_equal(output, reference(model, values(7, 4), values(7, 4))) and "head" in log.paths


def test_a_scripted_module_tells_its_outputs_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    x = values(5, 3)
    scripted = torch.jit.script(model)
    (output,), log = traced(scripted, x)
    assert not log.outputs and scripted.training and scripted[1].training
    assert np.allclose(output, reference(model, x), atol=1e-6)
