"""A load writes into the memory that live slots and weights have already, and only once nothing can fail any more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import polyckpt
from polyckpt.errors import MismatchError


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(70, 300), torch.nn.Linear(300, 40))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 70)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def slots(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_slots_stay_where_they_lie(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    other, into = trained(1)
    places = [slot.data_ptr() for slot in slots(into)]
    polyckpt.load(path, other, into)
    assert [slot.data_ptr() for slot in slots(into)] == places
    assert same(slots(into), slots(optimizer)) and same(list(other.parameters()), list(model.parameters()))


def test_slots_that_share_memory_come_apart(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    other, into = trained(1)
    first, second = (into.state[other[index].weight] for index in (0, 1))
    first["exp_avg_sq"] = first["exp_avg"]
    second["exp_avg"] = second["exp_avg_sq"].t().contiguous().t()
    into.state[other[0].bias]["exp_avg"] = other[0].bias.detach()
    polyckpt.load(path, other, into)
    assert same(slots(into), slots(optimizer)) and same(list(other.parameters()), list(model.parameters()))
    assert into.state[other[1].weight]["exp_avg"].stride() == other[1].weight.stride()


def test_a_model_that_fails_at_last_leaves_the_slots_as_they_were(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    other, into = trained(1)

    def fail(*_: object) -> None:
        raise RuntimeError("not today")

    other[1].register_load_state_dict_post_hook(fail)
    before, weights = copies(slots(into)), copies(list(other.parameters()))
    with pytest.raises(MismatchError, match="not today"):
        polyckpt.load(path, other, into)
    assert same(slots(into), before) and same(list(other.parameters()), weights)


def test_a_slot_of_another_type_is_made_anew(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    other, into = trained(1)
    into.state[other[0].weight]["exp_avg"] = into.state[other[0].weight]["exp_avg"].double()
    polyckpt.load(path, other, into)
    assert same(slots(into), slots(optimizer)) and {slot.dtype for slot in slots(into)} == {torch.float32}
