"""Train states, nnx objects, Equinox modules, and what depends on the process: 64 bits and devices."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import polyckpt
from polyckpt import UnsupportedError
from tests.adapters.jax_values import PARAMS, problems, round_trip, same
from tests.adapters.suite import check_description, run_python

# Other processes: 64 bits, several devices

_X64 = """
import sys, jax, jax.numpy as jnp, numpy as np, polyckpt
path, mode = sys.argv[1:]
if mode == "save":
    jax.config.update("jax_enable_x64", True)
    tree = {"w": jnp.arange(3.0) / 3, "n": jnp.arange(3), "f": jnp.ones(2, jnp.float32), "weak": jnp.full((2,), 0.1)}
    assert tree["w"].dtype == "float64" and tree["weak"].weak_type
    polyckpt.save(path, tree, extra={"x": jnp.ones(2)})
    restored = polyckpt.load(path, jax.eval_shape(lambda: tree))
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(restored.model)))
    assert restored.model["weak"].weak_type and restored.extra["x"].dtype == "float64"
else:
    template = {name: jax.ShapeDtypeStruct((3,), kind) for name, kind in {"w": "float64", "n": "int64"}.items()}
    template |= {"f": jnp.ones(2), "weak": jnp.ones(2)}
    try:
        polyckpt.load(path, template)
    except polyckpt.MismatchError as error:
        assert {problem.name: problem.kind for problem in error.problems} == dict.fromkeys(("w", "n", "weak"), "dtype"), error
        assert str(error).count("jax_enable_x64 is off") == 3, error
    else:
        raise SystemExit("float64 was truncated")
    path += "-extra"
    polyckpt.save(path, {"f": jnp.ones(1)}, extra={"x": 1})
"""

_EXTRA64 = """
import sys, jax.numpy as jnp, polyckpt
try:
    polyckpt.load(sys.argv[1], {"f": jnp.ones(2), "n": 0, "w": 0, "weak": 0}, strict=False)
except polyckpt.MismatchError as error:
    assert "x64" in str(error), error
else:
    raise SystemExit("a float64 extra was truncated")
"""


def test_64_bits_are_not_truncated_silently(tmp_path: Path) -> None:
    run_python("-c", _X64, str(tmp_path / "c"), "save")
    run_python("-c", _X64, str(tmp_path / "c"), "load")
    run_python("-c", _EXTRA64, str(tmp_path / "c"))


_WIDENED = """
import sys, jax, jax.numpy as jnp, polyckpt
path = polyckpt.save(sys.argv[1], {"w": jnp.ones(1)}, extra={"x": jnp.full((2,), 0.1)})
jax.config.update("jax_enable_x64", True)
restored = polyckpt.load(path, {"w": jnp.ones(1, "float32")})
assert restored.extra["x"].dtype == "float32" and restored.model["w"].dtype == "float32"
"""


def test_32_bits_are_not_widened(tmp_path: Path) -> None:
    run_python("-c", _WIDENED, str(tmp_path / "c"))


_SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np, polyckpt
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
devices = jax.devices()
assert len(devices) == 2
mesh = Mesh(np.array(devices), ("d",))
split, copied, second = NamedSharding(mesh, P("d")), NamedSharding(mesh, P()), SingleDeviceSharding(devices[1])
values = {name: np.random.randn(6, 5).astype(np.float32) for name in ("split", "copied", "second", "free", "abstract")}
places = {"split": split, "copied": copied, "second": second}
tree = {name: jax.device_put(value, places.get(name)) for name, value in values.items()}
tree["weak"] = jax.device_put(jnp.full((4,), 0.25), split)
tree["keys"] = jax.device_put(jax.random.split(jax.random.key(1), 4), split)
assert tree["weak"].weak_type and not tree["free"].committed
path = polyckpt.save(sys.argv[1], tree)
template = jax.tree.map(lambda leaf: leaf, tree)
template["abstract"] = jax.ShapeDtypeStruct((6, 5), jnp.float32, sharding=split)
restored = polyckpt.load(path, template).model
for name, leaf in tree.items():
    if name != "abstract":
        assert restored[name].sharding == leaf.sharding and restored[name].committed == leaf.committed, name
assert restored["abstract"].sharding == split and restored["weak"].weak_type
assert [shard.data.shape for shard in restored["split"].addressable_shards] == [(3, 5), (3, 5)]
for name, value in values.items():
    assert np.array_equal(restored[name], value), name
assert np.array_equal(jax.random.key_data(restored["keys"]), jax.random.key_data(tree["keys"]))

# Saved whole, loaded in halves, and the other way round; and nothing shares memory with the file.
template = {**template, "split": tree["free"], "free": tree["split"]}
again = polyckpt.load(path, template).model
with open(path / "weights.safetensors", "r+b") as file:
    size = file.seek(0, 2)
    file.seek(size - 900)
    file.write(bytes(900))
assert again["free"].sharding == split and not again["split"].committed
for name, value in values.items():
    assert np.array_equal(again[name], value) and np.array_equal(restored[name], value), name
"""


def test_arrays_return_to_the_sharding_of_the_template(tmp_path: Path) -> None:
    run_python("-c", _SHARDED, str(tmp_path / "c"), env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})


# Train states


def _train_state(seed: int, tx: Any) -> TrainState:
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(seed), (3, 2)), "bias": jnp.ones(2) * seed}}
    state = TrainState.create(apply_fn=jnp.matmul, params=params, tx=tx)
    return state.apply_gradients(grads=jax.tree.map(lambda leaf: leaf * 0.1, params))


def test_a_train_state_carries_its_optimizer(tmp_path: Path) -> None:
    tx = optax.adam(1e-2)
    saved, live = _train_state(1, tx), _train_state(2, tx).replace(step=9)
    path = polyckpt.save(tmp_path / "c", saved, epoch=4)
    restored = polyckpt.load(path, live)
    same(restored.model, saved)
    assert restored.epoch == 4 and restored.model.step == 1
    assert restored.optimizer is restored.model.opt_state
    checkpoint = polyckpt.inspect(path)
    assert set(checkpoint.weights) == {"params/dense/bias", "params/dense/kernel"}
    assert checkpoint.manifest.optimizer.step == 1
    assert set(checkpoint.manifest.optimizer.slots["0/mu"].tensors) == set(checkpoint.weights)
    same(polyckpt.load(path, jax.eval_shape(lambda: saved)).model.params, saved.params)


def test_the_optimizer_of_a_train_state_can_be_left_out(tmp_path: Path) -> None:
    tx = optax.adam(1e-2)
    saved, live = _train_state(1, tx), _train_state(2, tx).replace(step=9)
    path = polyckpt.save(tmp_path / "whole", saved)
    weights = polyckpt.save(tmp_path / "weights", saved, False)
    assert polyckpt.inspect(weights).manifest.optimizer is None
    for each in (path, weights):
        restored = polyckpt.load(each, live, False).model
        same(restored.params, saved.params)
        same(restored.opt_state, live.opt_state)
        assert restored.step == 9
    assert "(all of it; pass optimizer=False to load weights only)" in problems(weights, live)


def test_a_train_state_of_nnx(tmp_path: Path) -> None:
    class State(nnx.TrainState):
        counts: Any

    tx = optax.adam(1e-2)

    def build(seed: int) -> Any:
        graph, params = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(seed)))
        return State.create(graph, params=params, tx=tx, counts={"seen": jnp.ones(2) * seed})

    saved = build(1)
    path = polyckpt.save(tmp_path / "c", saved)
    same(polyckpt.load(path, build(2)).model, saved)
    assert set(polyckpt.inspect(path).weights) == {"params/kernel", "params/bias", "counts/seen"}


def test_boxed_parameters_of_linen(tmp_path: Path) -> None:
    dense = linen.Dense(3, kernel_init=linen.with_partitioning(linen.initializers.normal(), ("in", "out")))
    variables = flax.core.freeze(dense.init(jax.random.key(0), jnp.ones((1, 2))))
    restored = round_trip(tmp_path, variables, jax.eval_shape(lambda: variables))
    assert isinstance(restored, flax.core.FrozenDict) and restored["params"]["kernel"].names == ("in", "out")
    same(restored, variables)


def test_a_restored_run_is_neither_compiled_again_nor_refused_donation(tmp_path: Path) -> None:
    tx = optax.chain(optax.clip(1.0), optax.adamw(1e-2))

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.tree.map(jnp.sign, params), state, params)
        return optax.apply_updates(params, updates), state

    compiled, donating = jax.jit(step), jax.jit(step, donate_argnums=(0, 1))
    run = compiled(PARAMS, tx.init(PARAMS))
    run = compiled(*run)
    traced = compiled._cache_size()
    path = polyckpt.save(tmp_path / "c", *run)
    restored = polyckpt.load(path, PARAMS, jax.eval_shape(lambda: tx.init(PARAMS)))
    same(compiled(restored.model, restored.optimizer), compiled(*run))
    assert compiled._cache_size() == traced
    same(donating(restored.model, restored.optimizer), compiled(*run))


# nnx


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.Linear(3, 3, rngs=rngs)
        self.middle = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), jnp.tanh)
        self.decoder = self.encoder
        self.alone = nnx.Param({"a": jnp.ones(2), "b": (jnp.zeros(1),)})
        self.alias = self.alone
        self.buffer = nnx.data(jnp.arange(2.0))
        self.host = nnx.data(np.arange(2.0))


def test_shared_variables_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    saved, live = Tied(nnx.Rngs(1)), Tied(nnx.Rngs(2))
    saved.alone.set_value({"a": jnp.full(2, 7.0), "b": (jnp.full(1, 8.0),)})
    saved.buffer, saved.host = nnx.data(jnp.full(2, 9.0)), nnx.data(np.full(2, 5.0))
    path = polyckpt.save(tmp_path / "c", saved)
    checkpoint = polyckpt.inspect(path)
    check_description(checkpoint)
    assert set(checkpoint.weights) == {
        *(f"{layer}/{role}" for layer in ("decoder", "middle/layers/0") for role in ("kernel", "bias")),
        "alias/a",
        "alias/b/0",
        "buffer",
        "host",
    }
    kinds = {layer.path: layer.kind for layer in checkpoint.manifest.model.layers}
    assert kinds["middle/layers/1"] == "dropout" and "linear" in kinds.values()
    assert checkpoint.manifest.model.order == "definition"
    kernel, alone = live.encoder.kernel, live.alone
    assert polyckpt.load(path, live).model is live
    assert live.encoder.kernel is kernel is live.decoder.kernel and live.alias is alone
    assert np.array_equal(kernel.get_value(), saved.encoder.kernel.get_value())
    assert float(alone.get_value()["b"][0][0]) == 8 and live.buffer[0] == 9
    assert type(live.host) is np.ndarray and live.host[0] == 5


def _rng_count(model: Tied) -> int:
    return int(model.middle.layers[1].rngs.count.get_value())


def test_random_states_of_a_module_come_back_only_with_the_rng(tmp_path: Path) -> None:
    saved = Tied(nnx.Rngs(1))
    for _ in range(3):
        saved.middle(jnp.ones((2, 3)))
    path = polyckpt.save(tmp_path / "c", saved)
    live = Tied(nnx.Rngs(2))
    polyckpt.load(path, live)
    assert _rng_count(live) == 0
    polyckpt.load(path, live, rng=True)
    assert _rng_count(live) == 3
    same(live.middle(jnp.ones((2, 3))), saved.middle(jnp.ones((2, 3))))


def test_nothing_is_written_where_something_does_not_fit(tmp_path: Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    path = polyckpt.save(tmp_path / "c", model, nnx.Optimizer(model, optax.adam(1.0), wrt=nnx.Param))
    live = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    before = jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(nnx.state(live)))
    optimizer = nnx.Optimizer(live, optax.sgd(1.0), wrt=nnx.Param)
    assert set(problems(path, live, optimizer).values()) == {"unexpected"}
    same(nnx.to_pure_dict(nnx.state(live)), before)


def test_an_abstract_module_is_filled_random_states_too(tmp_path: Path) -> None:
    class Plain(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear, self.dropout = nnx.Linear(2, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    saved = Plain(nnx.Rngs(1))
    path = polyckpt.save(tmp_path / "c", saved)
    live = polyckpt.load(path, nnx.eval_shape(lambda: Plain(nnx.Rngs(2)))).model
    same(nnx.to_pure_dict(nnx.state(live)), nnx.to_pure_dict(nnx.state(saved)))
    assert live.dropout(live.linear(jnp.ones((1, 2)))).shape == (1, 3)


def test_an_abstract_bare_array_in_a_module_is_refused(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", Tied(nnx.Rngs(1)))
    with pytest.raises(UnsupportedError, match="buffer: flax cannot put an array into an abstract module"):
        polyckpt.load(path, nnx.eval_shape(lambda: Tied(nnx.Rngs(2))))


def test_an_optimizer_that_holds_its_model_does_not_store_it_again(tmp_path: Path) -> None:
    def build(seed: int) -> Any:
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
        return model, nnx.ModelAndOptimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    (model, optimizer), (live, other) = build(1), build(2)
    optimizer.update(nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model))
    path = polyckpt.save(tmp_path / "c", model, optimizer)
    assert {name.partition("/")[0] for name in polyckpt.inspect(path).optimizer} == {"0"}
    polyckpt.load(path, live, other)
    same(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(optimizer)))
    assert polyckpt.inspect(path).manifest.optimizer.step == 1 == int(other.step.get_value())


def test_a_load_that_fails_halfway_leaves_nnx_objects_as_they_were(tmp_path: Path) -> None:
    class Refusing:
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

        def load_state_dict(self, state: Any) -> None:
            if state["a"] == 1:
                raise ValueError("no")

    model, live = nnx.Linear(2, 3, rngs=nnx.Rngs(1)), nnx.Linear(2, 3, rngs=nnx.Rngs(2))
    path = polyckpt.save(tmp_path / "c", model, extra={"module": model, "refusing": Refusing()})
    before = jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(nnx.state(live)))
    refusing = Refusing()
    refusing.state_dict = lambda: {"a": 2}  # type: ignore[method-assign]
    with pytest.raises(polyckpt.MismatchError, match="refused"):
        polyckpt.load(path, nnx.Linear(2, 3, rngs=nnx.Rngs(3)), extra={"module": live, "refusing": refusing})
    same(nnx.to_pure_dict(nnx.state(live)), before)


_PROCESSES = """
import sys, jax, jax.numpy as jnp, numpy as np, polyckpt
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), P("d"))
whole = np.arange(8.0, dtype=np.float32)
array = jax.make_array_from_callback((8,), sharding, lambda index: whole[index])
assert not array.is_fully_addressable
for call in (
    lambda: polyckpt.save(sys.argv[1], {"layer": {"w": array}}),
    lambda: polyckpt.load(polyckpt.save(sys.argv[1], {"layer": {"w": jnp.ones(8)}}), {"layer": {"w": array}}),
):
    try:
        call()
    except polyckpt.UnsupportedError as error:
        assert "layer/w: float32[8] lies on devices of several processes" in str(error), error
    else:
        raise SystemExit("half an array was accepted")
"""


def test_arrays_of_several_processes_are_refused_by_name(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: run_python("-c", _PROCESSES, str(tmp_path / f"c{rank}"), address, str(rank)), range(2)))


def test_modules_inside_containers(tmp_path: Path) -> None:
    def build(seed: int) -> Any:
        return {"net": nnx.Linear(2, 3, rngs=nnx.Rngs(seed)), "ema": jnp.ones(2) * seed}

    saved, live = build(1), build(2)
    path = polyckpt.save(tmp_path / "c", saved)
    check_description(polyckpt.inspect(path))
    restored = polyckpt.load(path, live).model
    assert restored["net"] is live["net"] and float(restored["ema"][0]) == 1
    assert np.array_equal(live["net"].kernel.get_value(), saved["net"].kernel.get_value())


# Equinox


def test_stacked_and_functional_leaves_of_equinox(tmp_path: Path) -> None:
    def build(seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed), 3)
        return eqx.nn.Sequential(
            [eqx.filter_vmap(lambda key: eqx.nn.Linear(2, 5, key=key))(keys), eqx.nn.Lambda(jax.nn.relu), eqx.nn.LayerNorm(5)]
        )

    path = polyckpt.save(tmp_path / "c", build(1))
    assert bool(eqx.tree_equal(polyckpt.load(path, build(2)).model, build(1)))
    assert bool(eqx.tree_equal(polyckpt.load(path, eqx.filter_eval_shape(build, 2)).model, build(1)))
    checkpoint = polyckpt.inspect(path)
    check_description(checkpoint)
    assert [layer.kind for layer in checkpoint.manifest.model.layers] == ["custom", "layer_norm"]
