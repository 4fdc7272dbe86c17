"""PyTorch through the shared suite."""

import pytest
import torch

from tests.adapters.cases.torch import CASES
from tests.adapters.suite import AdapterSuite


class TestTorch(AdapterSuite):
    cases = "tests.adapters.cases.torch"


@pytest.mark.parametrize("module, prefix", [(torch.optim, ""), (torch.optim.lr_scheduler, "scheduler-")])
def test_every_class_is_a_case(module: object, prefix: str) -> None:
    abstract = {"Optimizer", "LRScheduler"}
    base = torch.optim.Optimizer if module is torch.optim else torch.optim.lr_scheduler.LRScheduler
    names = {
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and not name.startswith("_") and name not in abstract
    }
    covered = {name.removeprefix(prefix).partition("-")[0] for name in CASES if name.startswith(prefix)}
    assert names and names <= covered, names - covered
