"""Runs of Flax that the tests save and go on with, and directories of Orbax that hold them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch
from flax import linen, nnx
from flax.training.train_state import TrainState

from tests.sealing import REPOSITORY

BATCH = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")


class Net(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.relu(linen.Dense(7)(x))
        return linen.Dense(3)(x)


def state(seed: int, tx: Any = None) -> TrainState:
    """A train state before its first step."""
    params = Net().init(jax.random.key(seed), jnp.ones((1, 5)))["params"]
    return TrainState.create(apply_fn=Net().apply, params=params, tx=tx or optax.adamw(1e-2))


def trained(one: TrainState, steps: int) -> TrainState:
    @jax.jit
    def step(one: TrainState, x: Any) -> TrainState:
        return one.apply_gradients(grads=jax.grad(lambda params: (one.apply_fn({"params": params}, x) ** 2).mean())(one.params))

    for _ in range(steps):
        one = step(one, jax.random.normal(jax.random.key(int(one.step)), (4, 5)))
    return one


def outputs(one: TrainState) -> np.ndarray:
    return np.asarray(one.apply_fn({"params": one.params}, BATCH))


def module(seed: int) -> tuple[nnx.Module, nnx.Optimizer]:
    """The like of it as objects, with a random state of its own."""
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(nnx.Linear(5, 7, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.Linear(7, 3, rngs=rngs))
    return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)


@nnx.jit
def _update(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
    optimizer.update(model, nnx.grad(lambda model: (model(BATCH) ** 2).mean())(model))


def train(model: nnx.Module, optimizer: nnx.Optimizer, steps: int) -> None:
    for _ in range(steps):
        _update(model, optimizer)


def torch_net() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The module and optimizer of torch that compute what Net and its optimizer do."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-4)


def same(one: Any, other: Any) -> bool:
    """Whether two trees have equal leaves, bit for bit, of equal types."""
    left, right = ([_raw(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other))
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True)
    )


def _raw(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The leaves of a tree of dicts by name."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join([prefix, *(key.key for key in path)]).lstrip("/"): np.asarray(leaf) for path, leaf in pairs}


def manager(path: Path, one: TrainState, losses: list[float], **options: Any) -> ocp.CheckpointManager:
    """A manager of Orbax with a step for each loss: ten, twenty, and so on."""
    made = ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**options))
    for index, loss in enumerate(losses, 1):
        metrics = {"loss": loss, "accuracy": 1 - loss}
        made.save(10 * index, args=ocp.args.StandardSave(one.replace(step=10 * index)), metrics=metrics)
    made.wait_until_finished()
    return made


def _pytree(**options: bool) -> Callable[[Path, TrainState], Path]:
    def save(path: Path, one: TrainState) -> Path:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path, {"params": one.params, "opt": one.opt_state})
        return path

    return save


def _managed(path: Path, one: TrainState) -> Path:
    manager(path, one, [0.5, 0.25], best_fn=lambda metrics: metrics["loss"]).close()
    return path / "20"


def _composite(path: Path, one: TrainState) -> Path:
    options = ocp.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=6)
    with ocp.CheckpointManager(path, options=options) as made:
        items = {"params": ocp.args.StandardSave(one.params), "opt": ocp.args.StandardSave(one.opt_state)}
        made.save(20, args=ocp.args.Composite(**items, data=ocp.args.JsonSave({"seen": 640})))
    return path / "ckpt_000020"


def _standard(path: Path, one: TrainState) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, one)
    return path


def _pair(path: Path, one: TrainState) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, (one.params, one.opt_state))
    return path


def _v1(path: Path, one: TrainState) -> Path:
    ocp.v1.save(path, {"params": one.params, "opt": one.opt_state})
    return path


def _v1_several(path: Path, one: TrainState) -> Path:
    ocp.v1.save_checkpointables(path, {"state": {"params": one.params, "opt": one.opt_state}, "data": {"seen": np.arange(3)}})
    return path


def _v1_training(path: Path, one: TrainState) -> Path:
    with ocp.v1.training.Checkpointer(path) as checkpointer:
        checkpointer.save(20, {"params": one.params, "opt": one.opt_state}, metrics={"loss": 0.25, "accuracy": 0.75})
    return path / "20"


DIRECTORIES: dict[str, tuple[Callable[[Path, TrainState], Path], str, str]] = {
    "manager": (_managed, "params", "opt_state"),
    "composite": (_composite, "params", "opt"),
    "standard": (_standard, "params", "opt_state"),
    "pair": (_pair, "0", "1"),
    "ocdbt zarr": (_pytree(use_ocdbt=True, use_zarr3=False), "params", "opt"),
    "ocdbt zarr3": (_pytree(use_ocdbt=True, use_zarr3=True), "params", "opt"),
    "files zarr": (_pytree(use_ocdbt=False, use_zarr3=False), "params", "opt"),
    "files zarr3": (_pytree(use_ocdbt=False, use_zarr3=True), "params", "opt"),
    "v1": (_v1, "params", "opt"),
    "v1 several": (_v1_several, "state/params", "state/opt"),
    "v1 training": (_v1_training, "params", "opt"),
}
"""How Orbax writes a run: a function, and where it then has the parameters and the state of the optimizer."""


def expected(one: TrainState, params: str, opt: str) -> dict[str, np.ndarray]:
    """The leaves of a run by the names that a checkpoint has for them."""
    adam = one.opt_state[0]
    slots = {f"{opt}/0/{name}": flat(getattr(adam, name), params) for name in ("mu", "nu")}
    within = {f"{slot}/{name}": value for slot, leaves in slots.items() for name, value in leaves.items()}
    return {**flat(one.params, params), **within, f"{opt}/0/count/": np.asarray(adam.count)}


def write_expected(path: Path, cases: dict[str, dict[str, np.ndarray]]) -> None:
    """Leaves as JSON, for a process that has no JAX."""
    told = {
        case: {name: [value.dtype.name, list(value.shape), value.tobytes().hex()] for name, value in leaves.items()}
        for case, leaves in cases.items()
    }
    path.write_text(json.dumps(told))


_SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp, polyckpt
from jax.sharding import NamedSharding, PartitionSpec as P
devices = np.array(jax.devices())
assert len(devices) == 8
rows = NamedSharding(jax.sharding.Mesh(devices.reshape(8), ("x",)), P("x", None))
boxes = NamedSharding(jax.sharding.Mesh(devices.reshape(2, 4), ("x", "y")), P("y", "x"))
values = np.random.default_rng(0).standard_normal((16, 24)).astype("float32")
tree = {"w": jax.device_put(values, rows), "b": jnp.arange(5)}
template = {"w": jax.device_put(jnp.zeros((16, 24)), boxes), "b": jnp.zeros(5, jnp.int32)}
"""


def on_eight_devices(code: str, path: Path) -> None:
    """Run `code` with `path` as its argument in a new process that has eight devices, and arrays sharded over them."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", _SHARDED + code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
