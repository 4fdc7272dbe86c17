"""What is saved: random values under every framework, and how to tell that they came back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch

from benchmarks.peers.measuring import require

LAYERS = 30
ADAPTED_SHARE = 0.05


def widths(parameters: int) -> list[int]:
    """The widths between LAYERS dense layers, no layer square, that have about `parameters` weights together."""
    relative = [(0.7, 1.1, 0.9, 1.3)[index % 4] for index in range(LAYERS + 1)]
    base = math.sqrt(parameters / sum(inputs * outputs for inputs, outputs in itertools.pairwise(relative)))
    return [round(base * each) for each in relative]


def require_equal(found: Mapping[str, Any], expected: Mapping[str, Any], who: str) -> None:
    """Raise where a value of `expected` is missing or differs: who does nothing must not win."""
    wrong = [name for name, value in expected.items() if name not in found or not np.array_equal(found[name], value)]
    require(not wrong, f"{who}: {len(wrong)} of {len(expected)} values came back wrong: {', '.join(wrong[:3])}")


class Adapted(torch.nn.Module):
    """A frozen dense layer and a low-rank correction that is trained: with its moments, ADAPTED_SHARE of all bytes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        rank = int(ADAPTED_SHARE / (1 - ADAPTED_SHARE) * inputs * outputs / (3 * (inputs + outputs)))
        self.base = torch.nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = torch.nn.Linear(inputs, max(1, rank), bias=False)
        self.up = torch.nn.Linear(max(1, rank), outputs, bias=False)


class TorchRun:
    """A torch model and its AdamW after one step."""

    def __init__(self, parameters: int, layer: type[torch.nn.Module] = torch.nn.Linear, device: str = "cpu") -> None:
        layers = [layer(inputs, outputs) for inputs, outputs in itertools.pairwise(widths(parameters))]
        self.device = device
        self.model = torch.nn.Sequential(*layers).to(device)
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self._trained:
            parameter.grad = torch.randn_like(parameter)
        self.optimizer = torch.optim.AdamW(self._trained)
        self.train()
        self._slots = {parameter: dict(self.optimizer.state[parameter]) for parameter in self._trained}
        self._kept = {name: tensor.clone() for name, tensor in self.tensors().items()}

    @property
    def size_bytes(self) -> int:
        """Of weights and slots."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    @property
    def frozen_bytes(self) -> int:
        """Of weights that are not trained."""
        return sum(parameter.nbytes for parameter in self.model.parameters() if not parameter.requires_grad)

    def train(self) -> None:
        """One step more."""
        self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The live weights and slots, "<slot>/<parameter>"."""
        parameters = dict(self.model.named_parameters())
        weights = {f"weights/{name}": parameter.detach() for name, parameter in parameters.items()}
        slots = {
            f"{slot}/{name}": tensor
            for name, parameter in parameters.items()
            for slot, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        return weights | slots

    def state(self) -> dict[str, Any]:
        """What torch's own functions save."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        """As training scripts do it."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def spoil(self) -> None:
        """Zeros everywhere."""
        for tensor in self.tensors().values():
            tensor.zero_()

    def check(self, who: str) -> None:
        """Raise where the live tensors are not those of the beginning."""
        found = self.tensors()
        wrong = [name for name, tensor in self._kept.items() if not torch.equal(found[name], tensor)]
        require(not wrong, f"{who}: {len(wrong)} of {len(found)} tensors came back wrong: {', '.join(wrong[:3])}")

    def reset(self) -> None:
        """The tensors of the beginning: torch's own load leaves others in the optimizer, and not all of them in memory."""
        for parameter, slots in self._slots.items():
            self.optimizer.state[parameter] = dict(slots)
        live = self.tensors()
        for name, tensor in self._kept.items():
            live[name].copy_(tensor)


class JaxRun:
    """Arrays as a JAX tree of two levels, and no state but that."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.tree: dict[str, dict[str, jax.Array]] = {}
        for name, array in arrays.items():
            group, _, rest = name.partition("/")
            self.tree.setdefault(group, {})[rest.replace(".", "_")] = jnp.array(array)

    @property
    def size_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in jax.tree.leaves(self.tree))

    def train(self) -> None:
        """New arrays in the place of the old ones."""
        self.tree = jax.block_until_ready(jax.tree.map(lambda array: array + 1, self.tree))

    def check(self, restored: Any, who: str) -> None:
        """Raise where `restored` is not this tree."""
        require_equal(_flat(restored), _flat(self.tree), who)


class KerasRun:
    """A Keras model, on JAX, and its Adam: as many weights as a TorchRun has."""

    def __init__(self, parameters: int) -> None:
        first, *others = widths(parameters)
        self.model = keras.Sequential([keras.Input((first,)), *(keras.layers.Dense(width) for width in others)])
        self.model.compile("adam", "mse")
        self.model.optimizer.build(self.model.trainable_variables)
        generator = np.random.default_rng(0)
        for variable in self._variables().values():
            variable.assign(generator.standard_normal(variable.shape, np.float32))
        self._kept = self._values()

    def ready(self) -> None:
        """Wait for what JAX does in the background."""
        jax.block_until_ready([variable.value for variable in self._variables().values()])

    def spoil(self) -> None:
        """Zeros everywhere."""
        for variable in self._variables().values():
            variable.assign(np.zeros(variable.shape, np.float32))

    def check(self, who: str) -> None:
        """Raise where the variables are not those of the beginning."""
        require_equal(self._values(), self._kept, who)

    def _variables(self) -> dict[str, Any]:
        every = [*self.model.variables, *self.model.optimizer.variables]
        return {variable.path: variable for variable in every if variable.ndim}

    def _values(self) -> dict[str, np.ndarray]:
        # Views: a variable that is assigned to gets a new array, the old one stays as it is.
        return {path: np.asarray(variable.value) for path, variable in self._variables().items()}


def small_arrays() -> dict[str, np.ndarray]:
    """40 arrays, 84 KB together."""
    generator, shapes = np.random.default_rng(0), [(35, 15), (525,), (21, 25), (3, 5, 35)]
    return {f"{'ab'[i % 2]}/{i}": generator.standard_normal(shapes[i % 4], np.float32) for i in range(40)}


def many_arrays(count: int) -> dict[str, np.ndarray]:
    """`count` arrays of 4 KB under the names that deep models have."""
    values = np.random.default_rng(0).standard_normal((count, 16, 64), np.float32)
    return {f"blocks.{i // 100}.experts.{i % 100}.weight": values[i] for i in range(count)}


def _flat(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
