"""What torch users run into beside a plain resume."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import polyckpt
from polyckpt import MismatchError, UnsupportedError


def net(seed: int = 0, wide: int = 7) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, wide), nn.BatchNorm1d(wide), nn.Tanh(), nn.Linear(wide, 3))


def trained(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.randn(4, 5)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {key: value.detach().numpy().tobytes() for key, value in model.state_dict().items()}


def test_a_wrapped_model_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    plain = net()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(plain)
        path = polyckpt.save(tmp_path / "ddp", torch.compile(parallel, backend="eager"), trained(plain))
        assert set(polyckpt.inspect(path).weights) == set(plain.state_dict())
        other = net(1)
        polyckpt.load(path, other, torch.optim.AdamW(other.parameters()))
        assert bits(other) == bits(plain)
        back = nn.parallel.DistributedDataParallel(net(2))
        polyckpt.load(path, back)
        assert bits(back.module) == bits(plain)
    finally:
        torch.distributed.destroy_process_group()


def test_a_parameter_called_like_a_wrapper_keeps_its_name(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 3)
            self._orig_mod = nn.Linear(3, 2)
            self.register_parameter("__metadata__", nn.Parameter(torch.rand(3)))

    model = Odd()
    path = polyckpt.save(tmp_path / "odd", model)
    assert set(polyckpt.inspect(path).weights) == set(model.state_dict())
    other = Odd()
    polyckpt.load(path, other)
    assert bits(other) == bits(model)


def test_a_mismatch_names_every_entry_and_writes_nothing(tmp_path: Path) -> None:
    model = net()
    path = polyckpt.save(tmp_path / "c", model, trained(model))
    other = net(1, wide=6)
    other.append(nn.Linear(3, 2))
    other[3].to(torch.float64)
    optimizer = torch.optim.AdamW(other.parameters())
    before, rng = bits(other), torch.get_rng_state()
    with pytest.raises(MismatchError) as caught:
        polyckpt.load(path, other, optimizer)
    found = {(problem.kind, problem.section, problem.name) for problem in caught.value.problems}
    assert {("shape", "weights", "0.weight"), ("shape", "weights", "1.running_mean"), ("missing", "weights", "4.bias")} <= found
    assert {("dtype", "weights", "3.bias"), ("missing", "optimizer", "4.weight"), ("shape", "optimizer", "0.weight")} <= found
    assert "float32[7, 5]" in str(caught.value) and "float32[6, 5]" in str(caught.value)
    assert bits(other) == before and not optimizer.state and torch.equal(torch.get_rng_state(), rng)


def test_not_strict_loads_what_fits_and_reports_the_rest(tmp_path: Path) -> None:
    model = net()
    path = polyckpt.save(tmp_path / "c", model, trained(model, lr=0.5))
    other = net(1)
    other[3] = nn.Linear(7, 4)
    optimizer = torch.optim.AdamW(other.parameters())
    restored = polyckpt.load(path, other, optimizer, strict=False)
    assert bits(other)["0.weight"] == bits(model)["0.weight"]
    assert {problem.name for problem in restored.skipped} == {"3.weight", "3.bias"}
    assert set(optimizer.state) == set(list(other.parameters())[:4])
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert step(other, optimizer) > 0


def test_load_of_a_model_alone_loads_weights_only(tmp_path: Path) -> None:
    model = net()
    path = polyckpt.save(tmp_path / "c", model, trained(model), epoch=4)
    torch.manual_seed(9)
    random.seed(9)
    states = torch.get_rng_state(), random.getstate()
    restored = polyckpt.load(path, net(1).train())
    torch.manual_seed(9)
    assert restored.epoch == 4 and restored.optimizer is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_optimizer_state_goes_by_name_not_by_position(tmp_path: Path) -> None:
    model = net()
    optimizer = trained(model)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    other = net(1)
    reverse = torch.optim.AdamW(list(other.parameters())[::-1])
    polyckpt.load(path, other, reverse)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], reverse.state[theirs]["exp_avg"])


def test_a_parameter_without_state_is_restored_as_having_none(tmp_path: Path) -> None:
    model = net()
    path = polyckpt.save(tmp_path / "c", model, torch.optim.AdamW(model.parameters()))
    other = net(1)
    optimizer = trained(other)
    polyckpt.load(path, other, optimizer)
    assert not any(optimizer.state.values())


def test_another_class_of_optimizer_or_scheduler_is_refused(tmp_path: Path) -> None:
    model = net()
    optimizer = trained(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    path = polyckpt.save(tmp_path / "c", model, optimizer, scheduler=scheduler)
    other = net(1)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(MismatchError, match=r"AdamW.*\n?.*SGD"):
        polyckpt.load(path, other, sgd)
    adam = torch.optim.AdamW(other.parameters())
    with pytest.raises(MismatchError, match="StepLR"):
        polyckpt.load(path, other, adam, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(adam, 3))
    two = torch.optim.AdamW([{"params": other[0].parameters()}, {"params": other[3].parameters()}])
    with pytest.raises(MismatchError, match="parameter groups"):
        polyckpt.load(path, other, two)


def test_a_refusal_of_foreign_code_leaves_all_as_it_was(tmp_path: Path) -> None:
    model = net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    generator = torch.Generator().manual_seed(3)
    path = polyckpt.save(tmp_path / "c", model, trained(model), extra={"generator": generator, "scaler": scaler})
    other, live = net(1), torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(other.parameters())
    before, state = bits(other), live.get_state()
    with pytest.raises(MismatchError, match="GradScaler"):
        polyckpt.load(path, other, optimizer, extra={"generator": live, "scaler": torch.amp.GradScaler("cpu")})
    assert bits(other) == before and torch.equal(live.get_state(), state) and not optimizer.state


def test_a_tensor_learning_rate_keeps_its_identity(tmp_path: Path) -> None:
    model = net()
    path = polyckpt.save(tmp_path / "c", model, trained(model, lr=torch.tensor(0.25)))
    rate = torch.tensor(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    assert polyckpt.load(path, model, optimizer).lr == 0.25
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.25


def test_restored_slots_are_independent_of_file_and_source(tmp_path: Path) -> None:
    model = net()
    optimizer = trained(model)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    other = net(1)
    second = torch.optim.AdamW(other.parameters())
    polyckpt.load(path, other, second)
    step(other, second)
    polyckpt.inspect(path).verify()
    assert not torch.equal(optimizer.state[model[0].weight]["exp_avg"], second.state[other[0].weight]["exp_avg"])
    # A second load is not affected by what the first one did to its tensors.
    third = net(2)
    polyckpt.load(path, third)
    assert bits(third) == bits(model)


def test_ties_are_stored_once_and_a_tie_that_values_contradict_is_refused(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
            if tied:
                self.b.weight = self.a.weight

    tied, untied = Pair(True), Pair(False)
    path = polyckpt.save(tmp_path / "tied", tied)
    assert polyckpt.inspect(path).manifest.model.aliases == {"b.weight": "a.weight"}
    assert "b.weight" not in polyckpt.inspect(path).manifest.tensors["weights"]
    polyckpt.load(path, untied)
    assert torch.equal(untied.b.weight, tied.a.weight)
    other = polyckpt.save(tmp_path / "untied", Pair(False))
    before = bits(tied)
    with pytest.raises(MismatchError, match=r"one tensor with a\.weight"):
        polyckpt.load(other, tied)
    assert bits(tied) == before


def test_extra_state_of_modules(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        seen: Any = 0

        def get_extra_state(self) -> Any:
            return self.seen

        def set_extra_state(self, state: Any) -> None:
            self.seen = state

    model, other = nn.Sequential(Stateful(2, 3)), nn.Sequential(Stateful(2, 3))
    model[0].seen = {"count": 3, "ids": (1, 2), 5: torch.arange(3)}
    path = polyckpt.save(tmp_path / "c", model)
    polyckpt.load(path, other)
    assert other[0].seen["ids"] == (1, 2) and torch.equal(other[0].seen[5], torch.arange(3))
    model[0].seen = object()
    with pytest.raises(UnsupportedError, match="_extra_state"):
        polyckpt.save(tmp_path / "d", model)
    assert not (tmp_path / "d").exists()


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def _with_buffer(tensor: torch.Tensor) -> nn.Module:
    model = net()
    model.register_buffer("odd", tensor)
    return model


@pytest.mark.parametrize(
    "make, reason",
    [
        (_lazy, "lazy"),
        (lambda: nn.Linear(2, 3, device="meta"), "meta"),
        (lambda: _with_buffer(torch.eye(3).to_sparse()), "sparse"),
        (lambda: _with_buffer(torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8)), "quantized"),
        (lambda: _with_buffer(torch.zeros(3, dtype=torch.complex32)), "complex32"),
        (lambda: _with_buffer(torch.nested.nested_tensor([torch.rand(2), torch.rand(3)])), "nested"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path, make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"(weight|odd).*{reason}"):
        polyckpt.save(tmp_path / "c", make())
    assert list(tmp_path.iterdir()) == []


def test_a_meta_model_is_refused_on_load(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", nn.Linear(2, 3))
    with pytest.raises(UnsupportedError, match="meta"):
        polyckpt.load(path, nn.Linear(2, 3, device="meta"))


def test_state_dicts_and_lists_of_tensors_are_models_too(tmp_path: Path) -> None:
    model = net()
    path = polyckpt.save(tmp_path / "dict", model.state_dict())
    other = net(1)
    polyckpt.load(path, other)
    assert bits(other) == bits(model)
    raw = [torch.randn(3, 2, requires_grad=True), {"b": torch.randn(4)}]
    path = polyckpt.save(tmp_path / "list", raw, torch.optim.SGD([raw[0]], lr=0.1))
    fresh = [torch.zeros(3, 2, requires_grad=True), {"b": torch.zeros(4)}]
    polyckpt.load(path, fresh, torch.optim.SGD([fresh[0]], lr=0.2))
    assert torch.equal(fresh[0], raw[0]) and torch.equal(fresh[1]["b"], raw[1]["b"])


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int16", "bool", "complex128", "uint64"]
)
def test_every_bit_of_every_type_comes_back(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    raw = np.random.randint(0, 2 if dtype == "bool" else 256, (5, 3, kind.itemsize), np.uint8)
    tensor = torch.from_numpy(raw).view(kind).squeeze(-1)
    path = polyckpt.save(tmp_path / "c", {"odd": tensor.T, "scalar": tensor[0, 0], "empty": tensor[:0]})
    live = {"odd": torch.zeros(3, 5, dtype=kind), "scalar": torch.zeros((), dtype=kind), "empty": torch.zeros(0, 3, dtype=kind)}
    polyckpt.load(path, live)
    assert live["odd"].T.contiguous().view(torch.uint8).numpy().tobytes() == raw.tobytes()
    assert live["scalar"].reshape(1).view(torch.uint8).numpy().tobytes() == raw[0, 0].tobytes()
    assert polyckpt.inspect(path).weights["odd"].shape == (3, 5)


def test_the_weights_file_loads_with_other_tools(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = net()
    path = polyckpt.save(tmp_path / "c", model)
    assert net(1).load_state_dict(load_file(path / "weights.safetensors"))
    assert {key: value.numpy().tobytes() for key, value in load_file(path / "weights.safetensors").items()} == bits(model)


def test_a_conjugate_view_is_stored_by_value(tmp_path: Path) -> None:
    values = torch.randn(3, dtype=torch.complex64)
    path = polyckpt.save(tmp_path / "c", {"plain": values, "conj": values.conj()})
    assert np.array_equal(polyckpt.inspect(path).weights["conj"], values.numpy().conj())


def test_only_what_torch_itself_computes_is_described_as_such(tmp_path: Path) -> None:
    class Twice(nn.LSTMCell):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)[0] * 2

    class Renamed(nn.Conv1d):
        """The same computation under another name."""

    class Momentumless(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            pass

    model = nn.Sequential(Twice(2, 3), Renamed(3, 2, 1), nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)))
    found = polyckpt.inspect(polyckpt.save(tmp_path / "c", model, Momentumless(model.parameters(), lr=0.1))).manifest
    kinds = {layer.path: layer.kind for layer in found.model.layers}
    assert (kinds["0"], kinds["1"], kinds["2"]) == ("custom", "conv", "custom")
    assert found.optimizer is not None and found.optimizer.family == "custom"


@pytest.mark.parametrize("name, options", [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})])
def test_slots_are_laid_out_as_their_parameters(tmp_path: Path, name: str, options: Any) -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # The fused kernels walk parameter, gradient and slots as one flat memory each.
        return model, getattr(torch.optim, name)(model.parameters(), lr=0.01, fused=True, **options)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.linspace(0, 1, 384).view(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    model, optimizer = make(0)
    train(model, optimizer)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    other, second = make(1)
    polyckpt.load(path, other, second)
    train(model, optimizer)
    train(other, second)
    assert bits(other) == bits(model)


def test_tensors_in_extra_keep_their_memory_layout(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 4, 5)
    extra = {
        "image": image.contiguous(memory_format=torch.channels_last),
        "turned": image.permute(3, 0, 2, 1),
        "gaps": image[:, :, ::2],
        "repeated": image[:, :1].expand(2, 3, 4, 5),
        "empty": image[:0],
    }
    model = nn.Linear(1, 1)
    restored = polyckpt.load(polyckpt.save(tmp_path / "c", model, extra=extra), model).extra
    assert all(torch.equal(value, extra[name]) for name, value in restored.items())
    assert [restored[name].stride() for name in ("image", "turned")] == [extra[name].stride() for name in ("image", "turned")]
    assert all(restored[name].is_contiguous() for name in ("gaps", "repeated", "empty"))


class Nested(torch.optim.Optimizer):
    """Keeps nested state in types other than that of its parameters."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, **options})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("history", deque(maxlen=3)).append(parameter.grad.double() / 3)
                state.setdefault("factors", {"left": (torch.rand(2, dtype=torch.float64), torch.arange(3))})


def test_nested_optimizer_state_keeps_its_types(tmp_path: Path) -> None:
    model = nn.Linear(5, 3)
    optimizer = Nested(model.parameters())
    step(model, optimizer)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    second = Nested(model.parameters())
    polyckpt.load(path, model, second)
    for parameter in model.parameters():
        mine, theirs = optimizer.state[parameter], second.state[parameter]
        assert torch.equal(mine["history"][0], theirs["history"][0]) and theirs["history"][0].dtype == torch.float64
        assert theirs["factors"]["left"][0].dtype == torch.float64 and theirs["factors"]["left"][1].dtype == torch.int64
        assert theirs["history"].maxlen == 3


@pytest.mark.parametrize("value", [[1, 2], torch.tensor([1, 2]), "many", None])
def test_odd_steps_and_rates_are_no_numbers_and_come_back(tmp_path: Path, value: Any) -> None:
    model = nn.Linear(5, 3)
    optimizer = Nested(model.parameters(), lr=value)
    step(model, optimizer)
    for state in optimizer.state.values():
        state["step"] = value
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    described = polyckpt.inspect(path).manifest
    assert described.learning_rate is None and described.optimizer and described.optimizer.step is None
    second = Nested(model.parameters())
    polyckpt.load(path, model, second)
    assert str(second.param_groups[0]["lr"]) == str(value) == str(second.state[model.bias]["step"])


def test_a_rate_of_numpy(tmp_path: Path) -> None:
    model = net()
    optimizer = trained(model, lr=np.float32(0.25))
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    described = polyckpt.inspect(path).manifest.optimizer
    assert described and described.groups[0].hyperparameters["learning_rate"] == 0.25
    assert polyckpt.load(path, model, optimizer).lr == 0.25


def test_parameter_names_of_a_group_stay_those_of_its_parameters(tmp_path: Path) -> None:
    model = net()
    path = polyckpt.save(tmp_path / "c", model, torch.optim.AdamW(model.named_parameters()))
    reverse = torch.optim.AdamW(list(model.named_parameters())[::-1])
    names = list(reverse.param_groups[0]["param_names"])
    polyckpt.load(path, model, reverse)
    assert reverse.param_groups[0]["param_names"] == names


class Refusing(nn.Linear):
    """Has code of its own that fails in the middle of a load."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        rest[-1].append("not today")


def test_a_refusal_by_a_module_leaves_all_as_it_was(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(*net(seed), Refusing(3, 3))
        return model, trained(model, lr=torch.tensor(0.5 + seed))

    model, optimizer = make(0)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    other, second = make(1)
    before, slots = bits(other), [value.clone() for state in second.state.values() for value in state.values()]
    with pytest.raises(MismatchError, match=r"weights.*\n?.*not today"):
        polyckpt.load(path, other, second)
    assert bits(other) == before and second.param_groups[0]["lr"] == 1.5
    assert all(map(torch.equal, slots, [value for state in second.state.values() for value in state.values()]))
    step(other, second)


def test_inference_mode(tmp_path: Path) -> None:
    model = net()
    optimizer = trained(model)
    with torch.inference_mode():
        path = polyckpt.save(tmp_path / "c", model, optimizer)
        restored = polyckpt.load(path, model, optimizer)
        frozen = net()
    assert restored.optimizer is optimizer
    step(model, optimizer)
    with pytest.raises(UnsupportedError, match="inference"):
        polyckpt.load(path, frozen)


def test_parameters_of_the_optimizer_that_are_not_in_the_model(tmp_path: Path) -> None:
    model, sigma = net(), nn.Parameter(torch.tensor([0.5]))
    optimizer = torch.optim.SGD([*model.parameters(), sigma], lr=0.1)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    other = nn.Parameter(torch.tensor([0.25]))
    polyckpt.load(path, model, torch.optim.SGD([*model.parameters(), other], lr=0.1))
    assert other == 0.5
    typed = nn.Parameter(torch.tensor([0.25], dtype=torch.float64))
    with pytest.raises(MismatchError, match="float64"):
        polyckpt.load(path, model, torch.optim.SGD([*model.parameters(), typed], lr=0.1))


def test_a_scripted_module(tmp_path: Path) -> None:
    model, other = torch.jit.script(net()), torch.jit.script(net(1))
    path = polyckpt.save(tmp_path / "c", model, trained(model))
    polyckpt.load(path, other, trained(other))
    assert bits(other) == bits(model)


def test_a_recurrent_layer_with_further_tensors_is_custom(tmp_path: Path) -> None:
    model = nn.LSTM(3, 4)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model, "weight_hh_l0")
    described = polyckpt.inspect(polyckpt.save(tmp_path / "c", model)).manifest.model.layers
    assert [layer.kind for layer in described] == ["custom"]
    assert {role.tensor for layer in described for role in layer.roles.values()} == set(model.state_dict())


def test_a_dict_of_modules_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="ModuleDict"):
        polyckpt.save(tmp_path / "c", {"generator": nn.Linear(1, 1), "critic": nn.Linear(1, 1)})
