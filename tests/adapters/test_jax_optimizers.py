"""Whose weights the leaves of an optax state are of, and what JAX objects do as extras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import polyckpt
from polyckpt import UnsupportedError
from tests.adapters.jax_values import PARAMS, Pair, problems, same, zero
from tests.adapters.suite import check_description, run_python

# Optimizers


def _described(path: Path, tx: Any, params: Any, model: Any = None) -> Any:
    polyckpt.save(path / "c", params if model is None else model, tx.init(params))
    checkpoint = polyckpt.inspect(path / "c")
    check_description(checkpoint)
    return checkpoint.manifest.optimizer


@pytest.mark.parametrize(
    ("tx", "family", "meanings"),
    [
        (optax.adamw(1e-3), "custom", {"0/mu": "first_moment", "0/nu": "custom", "0/count": "step"}),
        (optax.amsgrad(1e-3), "adam", {"0/nu": "second_moment", "0/nu_max": "max_second_moment"}),
        (optax.lion(1e-3), "lion", {"0/mu": "first_moment"}),
        (optax.adagrad(1e-3), "adagrad", {"0/sum_of_squares": "squared_sum"}),
        (optax.adadelta(1e-3), "adadelta", {"1/e_g": "second_moment", "1/e_x": "squared_update"}),
        (optax.rmsprop(1e-3, momentum=0.9), "rmsprop", {"0/nu": "second_moment", "2/trace": "momentum"}),
        (optax.sgd(1e-3, 0.9), "custom", {"0/trace": "momentum"}),
        (optax.MultiSteps(optax.sgd(1e-3, 0.9), 2), "custom", {"acc_grads": "gradient_accumulator"}),
        (
            optax.adafactor(1e-3, min_dim_size_to_factor=2),
            "adafactor",
            {"0/v_row": "longest_axis_second_moment", "0/v_col": "next_axis_second_moment", "0/v": "second_moment"},
        ),
    ],
)
def test_slots_say_what_they_hold_and_of_which_weight(tmp_path: Path, tx: Any, family: str, meanings: dict[str, str]) -> None:
    described = _described(tmp_path, tx, PARAMS)
    assert described.family == family
    assert {slot: described.slots[slot].meaning for slot in meanings} == meanings
    for slot, meaning in meanings.items():
        assert set(described.slots[slot].tensors) == ({""} if meaning == "step" else {"a/w", "a/b", "s"}), slot


def test_the_parameters_are_found_where_they_are_in_the_model(tmp_path: Path) -> None:
    tx = optax.chain(optax.masked(optax.trace(0.9), {"a": True, "s": False}), optax.scale_by_adam())
    model = {"params": PARAMS, "batch_stats": {"a": {"mean": jnp.ones(3)}}, "ema": PARAMS}
    described = _described(tmp_path, tx, PARAMS, model)
    assert set(described.slots["1/mu"].tensors) == {"params/a/w", "params/a/b", "params/s"}
    assert set(described.slots["0/inner_state/trace"].tensors) == {"params/a/w", "params/a/b"}
    restored = polyckpt.load(tmp_path / "c", model, jax.eval_shape(lambda: tx.init(PARAMS)))
    same(restored.optimizer, tx.init(PARAMS))


def test_ambiguous_parameters_are_not_guessed(tmp_path: Path) -> None:
    described = _described(tmp_path, optax.adam(1e-3), PARAMS, {"generator": PARAMS, "critic": PARAMS})
    assert set(described.slots["0/mu"].tensors) == {"a/w", "a/b", "s"}


def test_injected_hyperparameters_are_described(tmp_path: Path) -> None:
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.25, b1=0.5, weight_decay=0.125)
    described = _described(tmp_path, tx, PARAMS)
    (group,) = described.groups
    assert set(group.parameters) == {"a/w", "a/b", "s"}
    assert group.hyperparameters.items() >= {"learning_rate": 0.25, "beta1": 0.5, "weight_decay": 0.125}.items()
    assert polyckpt.load(tmp_path / "c", PARAMS).lr == 0.25


def test_steps_that_disagree_are_not_one_step(tmp_path: Path) -> None:
    tx = optax.MultiSteps(optax.adam(1e-3), 2)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    assert polyckpt.inspect(polyckpt.save(tmp_path / "a", PARAMS, state)).manifest.optimizer.step == 1
    outside = (state, optax.ScaleByScheduleState(count=jnp.int32(3)))
    assert polyckpt.inspect(polyckpt.save(tmp_path / "b", PARAMS, outside)).manifest.optimizer.step is None


# Extras


def test_extras_come_back_plain_or_in_the_structure_of_the_live_object(tmp_path: Path) -> None:
    tx = optax.adam(1e-3)
    ema = eqx.nn.Linear(2, 3, key=jax.random.key(1))
    plain = {"ema": {"w": jnp.ones(3, jnp.bfloat16)}, "key": jax.random.key(7), "list": [1, (jnp.full((), 2.0), np.ones(2))]}
    metric = nnx.metrics.Average()
    metric.update(values=jnp.arange(4.0))
    extra = {"plain": plain, "state": tx.init(PARAMS), "ema": ema, "metric": metric, "key": jax.random.key(3)}
    path = polyckpt.save(tmp_path / "c", PARAMS, extra=extra)
    live = {
        "state": jax.eval_shape(lambda: tx.init(PARAMS)),
        "ema": eqx.nn.Linear(2, 3, key=jax.random.key(2)),
        "metric": nnx.metrics.Average(),
    }
    restored = polyckpt.load(path, PARAMS, extra=live).extra
    same(restored["plain"], plain)
    same(restored["state"], extra["state"])
    same(restored["key"], extra["key"])
    assert bool(eqx.tree_equal(restored["ema"], ema))
    assert restored["metric"] is live["metric"] and float(live["metric"].compute()) == 1.5
    wrong = {"state": jax.eval_shape(lambda: optax.sgd(1e-3, 0.9).init(PARAMS)), "metric": ema}
    assert {"metric", "extra metric"} & set(problems(path, PARAMS, extra=wrong))


def test_a_callable_pytree_can_be_an_extra_and_a_function_cannot(tmp_path: Path) -> None:
    @flax.struct.dataclass
    class Schedule:
        rate: Any

        def __call__(self, step: int) -> Any:
            return self.rate * step

    path = polyckpt.save(tmp_path / "c", PARAMS, extra={"schedule": Schedule(jnp.full((), 3.0))})
    restored = polyckpt.load(path, PARAMS, extra={"schedule": Schedule(jnp.zeros(()))}).extra["schedule"]
    assert isinstance(restored, Schedule) and float(restored(2)) == 6
    with pytest.raises(UnsupportedError, match="schedule"):
        polyckpt.save(tmp_path / "d", PARAMS, extra={"schedule": optax.cosine_decay_schedule(1.0, 2)})


def test_random_trees_with_random_keys(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    alphabet = ["a", "/", "~", ".", "~1", "", " ", "0", "é", "$tensor", "__metadata__", "value", "w/b", "#"]

    def leaf() -> Any:
        shape = tuple(random.integers(0, 4, random.integers(0, 3)))
        array = random.standard_normal(shape).astype(random.choice(["float32", "int32", "float16"]))
        return [jnp.asarray(array), array, 3, 0.1, "text", None, True, jnp.full(shape, 0.1)][random.integers(8)]

    def tree(depth: int) -> Any:
        if depth == 0:
            return leaf()
        children = [tree(int(random.integers(depth))) for _ in range(random.integers(1, 5))]
        keys = random.choice(len(alphabet), len(children), replace=False)
        named = {alphabet[key]: child for key, child in zip(keys, children, strict=True)}
        return [named, children, tuple(children), Pair(children, named)][random.integers(4)]

    for index in range(40):
        value = {"tree": tree(4), "w": jnp.ones(1)}
        path = polyckpt.save(tmp_path / str(index), value, value, extra={"x": value})
        template = jax.tree.map(zero, value)
        restored = polyckpt.load(path, template, template, extra={"x": template})
        for each in (restored.model, restored.optimizer, restored.extra["x"]):
            same(each, value)


def test_nothing_of_a_framework_that_is_not_used_is_imported() -> None:
    code = (
        "import sys, tempfile, jax.numpy as jnp, polyckpt\n"
        "path = polyckpt.save(tempfile.mkdtemp() + '/c', {'w': jnp.ones(2)}, {'m': jnp.ones(2)})\n"
        "polyckpt.load(path, {'w': jnp.zeros(2)}, {'m': jnp.zeros(2)})\n"
        "assert not {'flax', 'optax', 'equinox', 'haiku', 'torch', 'keras'} & set(sys.modules)\n"
    )
    run_python("-c", code)
