"""The tiny runs behind the golden checkpoints: ``python -m tests.golden.runs save|check FRAMEWORK PATH``.

`save` trains one step, saves, and writes the digests of all arrays beside the checkpoint's files. `check` builds the same
objects with other values, loads, and compares digests. These definitions are frozen: a golden checkpoint must go on loading
into them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import polyckpt


@dataclass(frozen=True)
class Golden:
    """One step of training, the two calls, and every array of the run by name."""

    step: Callable[[], None]
    save: Callable[[Path], Any]
    load: Callable[[Path], Any]
    arrays: Callable[[], dict[str, Any]]


def numpy(seed: int) -> Golden:
    rng = np.random.default_rng(seed)
    model = {"w": rng.random((3, 2)), "b": [rng.random(2).astype("float16")]}
    run = {"model": model, "slots": {"m": rng.random((3, 2)), "t": seed}}
    metrics = {"loss": float("nan")}

    def load(path: Path) -> None:
        restored = polyckpt.load(path, run["model"], run["slots"], extra={"rng": rng})
        run.update(model=restored.model, slots=restored.optimizer)

    return Golden(
        step=lambda: None,
        save=lambda path: polyckpt.save(path, run["model"], run["slots"], epoch=1, metrics=metrics, extra={"rng": rng}),
        load=load,
        arrays=lambda: {
            "w": run["model"]["w"],
            "b": run["model"]["b"][0],
            "m": run["slots"]["m"],
            "t": run["slots"]["t"],
            "rng": rng.bit_generator.state["state"]["state"] % 2**63,
        },
    )


def run(seed: int) -> Golden:
    """A manager's directory; its arrays are those of the best, which is not the last."""
    state = {"w": np.random.default_rng(seed).random((3, 2))}

    def save(path: Path) -> None:
        with polyckpt.CheckpointManager(path, monitor="loss", keep_last=1) as ckpts:
            for epoch, (loss, shift) in enumerate([(0.5, 1), (0.25, 0), (float("nan"), 2)], 1):
                ckpts.save({"w": state["w"] + shift}, epoch=epoch, step=10 * epoch, metrics={"loss": loss})

    def load(path: Path) -> None:
        ckpts = polyckpt.CheckpointManager(path, monitor="loss")
        assert [(record.epoch, record.step) for record in ckpts.checkpoints] == [(2, 20), (3, 30)]
        assert [record.name for record in ckpts.records] == ["step-00000010", "step-00000020", "step-00000030"]
        assert polyckpt.inspect(path / "last").manifest.progress.epoch == 3
        state.update(ckpts.restore_best(state).model)

    return Golden(step=lambda: None, save=save, load=load, arrays=lambda: state)


def torch(seed: int) -> Golden:
    import torch

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)

    def step() -> None:
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        scheduler.step()

    def arrays() -> dict[str, Any]:
        slots = [tensor for state in optimizer.state_dict()["state"].values() for tensor in state.values()]
        return {
            **{key: value.numpy() for key, value in model.state_dict().items()},
            **{f"slot {index}": tensor.numpy() for index, tensor in enumerate(slots)},
            "lr": optimizer.param_groups[0]["lr"],
            "last_epoch": scheduler.last_epoch,
            "rng": torch.get_rng_state().numpy(),
        }

    return Golden(
        step=step,
        save=lambda path: polyckpt.save(path, model, optimizer, scheduler=scheduler, epoch=1, metrics={"loss": 0.5}),
        load=lambda path: polyckpt.load(path, model, optimizer, scheduler=scheduler),
        arrays=arrays,
    )


def keras(seed: int) -> Golden:
    import keras

    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(keras.optimizers.Adam(0.1 * seed), "mse")

    def arrays() -> dict[str, Any]:
        variables = [*model.variables, *model.optimizer.variables]
        return {f"variable {index}": keras.ops.convert_to_numpy(variable) for index, variable in enumerate(variables)}

    return Golden(
        step=lambda: model.train_on_batch(np.random.rand(4, 3), np.random.rand(4, 2)),
        save=lambda path: polyckpt.save(path, model, epoch=1, metrics={"loss": 0.5}),
        load=lambda path: polyckpt.load(path, model),
        arrays=arrays,
    )


def nnx(seed: int) -> Golden:
    import jax
    import optax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.dropout(self.linear(x))

    model = Net(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(1e-1), wrt=nnx.Param)

    def step() -> None:
        gradients = nnx.grad(lambda model: (model(jax.numpy.ones((4, 3))) ** 2).mean())(model)
        optimizer.update(model, gradients)

    return Golden(
        step=step,
        save=lambda path: polyckpt.save(path, model, optimizer, epoch=1, metrics={"loss": 0.5}),
        load=lambda path: polyckpt.load(path, model, optimizer),
        arrays=lambda: _leaves((nnx.state(model), nnx.state(optimizer))),
    )


def _functional(init: Callable[[Any], Any], apply: Callable[[Any, Any], Any], seed: int) -> Golden:
    import jax
    import optax

    tx = optax.adam(1e-1)
    params = init(jax.random.key(seed))
    run = {"params": params, "opt_state": tx.init(params), "key": jax.random.key(seed)}

    def step() -> None:
        gradients = jax.grad(lambda params: (apply(params, jax.numpy.ones((4, 3))) ** 2).mean())(run["params"])
        updates, run["opt_state"] = tx.update(gradients, run["opt_state"])
        run["params"] = optax.apply_updates(run["params"], updates)

    def load(path: Path) -> None:
        restored = polyckpt.load(path, run["params"], run["opt_state"])
        run.update(params=restored.model, opt_state=restored.optimizer, key=restored.extra["key"])

    return Golden(
        step=step,
        save=lambda path: polyckpt.save(path, run["params"], run["opt_state"], epoch=1, lr=0.1, extra={"key": run["key"]}),
        load=load,
        arrays=lambda: _leaves(run),
    )


def linen(seed: int) -> Golden:
    import jax
    from flax import linen

    model = linen.Dense(2)
    return _functional(lambda key: model.init(key, jax.numpy.ones((4, 3))), model.apply, seed)


def equinox(seed: int) -> Golden:
    import equinox
    import jax

    return _functional(lambda key: equinox.nn.Linear(3, 2, key=key), lambda model, x: jax.vmap(model)(x), seed)


def haiku(seed: int) -> Golden:
    import haiku
    import jax

    model = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([2])(x)))
    return _functional(lambda key: model.init(key, jax.numpy.ones((4, 3))), model.apply, seed)


def _leaves(tree: Any) -> dict[str, Any]:
    import jax

    def host(leaf: Any) -> Any:
        return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(host(leaf)) for path, leaf in leaves if hasattr(leaf, "dtype")}


def digests(golden: Golden) -> dict[str, str]:
    """The bits of every array of a run."""
    arrays = {name: np.asarray(value) for name, value in golden.arrays().items()}
    return {name: f"{a.dtype}{list(a.shape)} {hashlib.sha256(a.tobytes()).hexdigest()[:16]}" for name, a in arrays.items()}


def main(mode: str, framework: str, path: Path) -> None:
    golden: Golden = globals()[framework](1 if mode == "save" else 2)
    golden.step()
    if mode == "save":
        golden.save(path)
        (path / "expected.json").write_text(json.dumps(digests(golden), indent=1))
        return
    expected = json.loads((path / "expected.json").read_text())
    assert digests(golden) != expected, "the run held the golden values before it was loaded"
    golden.load(path)
    assert digests(golden) == expected


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
