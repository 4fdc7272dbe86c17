"""Weights and slots written by Orbax inside of a checkpoint: as exact as our own files, sealed, and Orbax reads them alone."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import polyckpt
from polyckpt import CheckpointManager
from polyckpt.errors import CorruptError, UnsupportedError
from tests.formats.jax_runs import on_eight_devices, same, state, trained
from tests.sealing import run_python


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    before = trained(state(0), 3)
    path = polyckpt.save(tmp_path / "run", before, step=3, store="orbax")
    assert sorted(each.name for each in path.iterdir()) == ["arrays", "manifest.json", "state.safetensors"]
    after = polyckpt.load(path, state(1)).model
    assert same(before, after) and same(trained(before, 2), trained(after, 2))
    opened = polyckpt.inspect(path)
    opened.verify()
    assert np.array_equal(opened.weights["params/Dense_0/kernel"], before.params["Dense_0"]["kernel"])


def test_orbax_restores_the_item_without_us(tmp_path: Path) -> None:
    before = trained(state(0), 1)
    path = polyckpt.save(tmp_path / "run", before, step=1, store="orbax")
    np.save(tmp_path / "kernel.npy", before.params["Dense_1"]["kernel"])
    code = """
import sys
sys.modules["polyckpt"] = None
import numpy as np, orbax.checkpoint as ocp
restored = ocp.StandardCheckpointer().restore(sys.argv[1])
assert np.array_equal(restored["weights"]["params"]["Dense_1"]["kernel"], np.load(sys.argv[2]))
assert "optimizer" in restored
"""
    done = run_python(code, path / "arrays", tmp_path / "kernel.npy")
    assert done.returncode == 0, done.stderr


def test_reading_needs_neither_jax_nor_orbax(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "run", state(0), step=1, store="orbax")
    code = """
import sys
for name in ("jax", "orbax", "flax", "torch", "keras", "tensorflow"):
    sys.modules[name] = None
import polyckpt
opened = polyckpt.inspect(sys.argv[1])
opened.verify()
assert opened.weights["params/Dense_0/kernel"].shape == (5, 7)
assert len(opened.optimizer), opened
assert opened.manifest.optimizer.family == "adam", opened.manifest.optimizer.family
"""
    done = run_python(code, path)
    assert done.returncode == 0, done.stderr


def test_a_torch_module_takes_it_over(tmp_path: Path) -> None:
    before = trained(state(0), 3)
    path = polyckpt.save(tmp_path / "run", before, step=3, store="orbax")
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-4)
    polyckpt.load(path, model, optimizer)
    x = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")
    ours = model(torch.tensor(x)).detach().numpy()
    assert np.allclose(ours, before.apply_fn({"params": before.params}, x), atol=1e-6)
    moment = optimizer.state[model[0].weight]["exp_avg"].numpy()
    assert np.array_equal(moment.T, np.asarray(before.opt_state[0].mu["Dense_0"]["kernel"]))


def test_a_manager_keeps_the_best_and_goes_on(tmp_path: Path) -> None:
    one = state(0)
    with CheckpointManager(tmp_path / "run", monitor="loss", keep_last=1, store="orbax") as manager:
        for step, loss in enumerate([0.5, 0.2, 0.9], 1):
            one = trained(one, 1)
            manager.save(one, step=step, metrics={"loss": loss})
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == ["step-00000002", "step-00000003"]
    with CheckpointManager(tmp_path / "run", monitor="loss", keep_last=1, store="orbax", async_save=True) as manager:
        start = manager.restore(state(1))
        assert start.step == 3 and same(start.model, one)
        manager.save(trained(start.model, 1), step=4, metrics={"loss": 0.1})
    assert same(polyckpt.load(tmp_path / "run" / "best", state(1)).model, trained(one, 1))


@pytest.mark.parametrize("change", ["flip", "truncate", "remove"])
def test_no_byte_may_change(tmp_path: Path, change: str) -> None:
    """Whatever file of the item is damaged, verifying says so, and no wrong value is ever loaded."""
    one = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((40, 30)), jnp.float32), "b": jnp.zeros(3, jnp.bfloat16)}
    path = polyckpt.save(tmp_path / "run", one, store="orbax")
    files = [each for each in (path / "arrays").rglob("*") if each.is_file() and each.stat().st_size]
    assert len(files) > 3
    for file in files:
        data = file.read_bytes()
        middle = len(data) // 2
        if change == "remove":
            file.unlink()
        else:
            file.write_bytes(
                data[:middle] + bytes([data[middle] ^ 16]) * (change == "flip") + data[middle + (change == "flip") :]
            )
            if change == "truncate":
                file.write_bytes(data[:middle])
        with pytest.raises(CorruptError, match="arrays"):
            polyckpt.inspect(path).verify()
        live = {"w": jnp.ones((40, 30)), "b": jnp.ones(3, jnp.bfloat16)}
        try:
            loaded = polyckpt.load(path, live).model
        except CorruptError:
            pass
        else:
            assert change == "flip" and same(loaded, one)  # bytes that no array depends on
        file.write_bytes(data)
    polyckpt.inspect(path).verify()


def test_what_orbax_would_mix_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"a\.b"):
        polyckpt.save(tmp_path / "run", {"a": {"b": jnp.ones(2)}, "a.b": jnp.zeros(2)}, store="orbax")
    with pytest.raises(UnsupportedError, match="there are orbax"):
        polyckpt.save(tmp_path / "run", {"w": jnp.ones(2)}, store="zarr")
    assert not (tmp_path / "run").exists()


def test_every_type_and_shape_comes_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    dtypes = ["float32", "float16", "bfloat16", "int8", "uint8", "int32", "uint32", "bool", "complex64", "float8_e4m3fn"]
    tree = {name: jnp.asarray(random.standard_normal((3, 5)) * 9, jnp.float32).astype(name) for name in dtypes}
    tree |= {"scalar": jnp.float32(2.5), "empty": jnp.zeros((0, 4)), "key": jax.random.key(7), "numpy": np.arange(4.0)}
    path = polyckpt.save(tmp_path / "run", tree, store="orbax")
    blank = {name: jax.random.key(0) if name == "key" else jnp.zeros_like(value) for name, value in tree.items()}
    blank["numpy"] = np.zeros(4)
    loaded = polyckpt.load(path, blank).model
    assert jax.random.key_data(loaded.pop("key")).tolist() == jax.random.key_data(tree.pop("key")).tolist()
    assert same(loaded, tree)


def test_sharded_arrays_come_back_under_another_sharding(tmp_path: Path) -> None:
    code = """
path = polyckpt.save(sys.argv[1], tree, store="orbax")
loaded = polyckpt.load(path, template).model
assert loaded["w"].sharding == boxes and np.array_equal(loaded["w"], values) and loaded["b"].tolist() == [0, 1, 2, 3, 4]
abstract = {"w": jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=boxes), "b": jax.ShapeDtypeStruct((5,), jnp.int32)}
loaded = polyckpt.load(path, abstract).model
assert loaded["w"].sharding == boxes and np.array_equal(loaded["w"], values)
stored = polyckpt.inspect(path)
stored.verify()
assert np.array_equal(stored.weights["w"], values)
restored = ocp.StandardCheckpointer().restore(path / "arrays", {"weights": template})
assert restored["weights"]["w"].sharding == boxes and np.array_equal(restored["weights"]["w"], values)
"""
    on_eight_devices(code, tmp_path / "run")
