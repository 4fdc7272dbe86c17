"""Directories that Orbax itself wrote are opened, loaded, converted, listed and written as if they were ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from flax.training import checkpoints

import polyckpt
from polyckpt.errors import CheckpointExistsError, MismatchError, NotACheckpointError, UnsupportedError
from tests.cli.test_commands import cells, run
from tests.formats import jax_runs
from tests.formats.jax_runs import DIRECTORIES, Net, module, same, state, train, trained
from tests.sealing import run_python

RUN = trained(state(0), 20)
"""What most directories hold."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run as Orbax writes it in each way."""
    root = tmp_path_factory.mktemp("orbax")
    return {name: save(root / name.replace(" ", "_"), RUN) for name, (save, _, _) in DIRECTORIES.items()}


@pytest.fixture(scope="module")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manager's directory with the three best of five steps."""
    root = tmp_path_factory.mktemp("managed") / "run"
    options = {"max_to_keep": 3, "best_fn": lambda metrics: metrics["loss"], "best_mode": "min"}
    jax_runs.manager(root, RUN, [0.9, 0.3, 0.5, 0.7, 0.6], **options).close()
    return root


def test_every_leaf_is_read_with_tensorstore_alone(directories: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        str(directories[name]): jax_runs.expected(RUN, params, opt)
        | ({"data/seen": np.arange(3)} if name == "v1 several" else {})
        for name, (_, params, opt) in DIRECTORIES.items()
    }
    jax_runs.write_expected(tmp_path / "expected.json", cases)
    code = """
import json, sys
for name in ("jax", "flax", "optax", "orbax", "torch", "keras", "tensorflow"):
    sys.modules[name] = None
import polyckpt
for path, leaves in json.load(open(sys.argv[1])).items():
    opened = polyckpt.open(path)
    stored = {**opened.weights.stored, **opened.optimizer.stored}
    assert stored.keys() == leaves.keys(), (path, stored.keys() ^ leaves.keys())
    for name, (dtype, shape, data) in leaves.items():
        found = stored[name]
        assert (found.dtype, list(found.shape), found.raw().tobytes().hex()) == (dtype, shape, data), (path, name)
    meanings = sorted(slot.meaning for slot in opened.manifest.optimizer.slots.values())
    assert meanings == ["custom", "first_moment", "step"], (path, meanings)
    assert opened.manifest.progress.step == 20, path
    assert any("adam from nadam" in line for line in opened.left_out), path
    assert any("JsonCheckpointHandler" in line for line in opened.left_out) == ("composite" in path), opened.left_out
"""
    done = run_python(code, tmp_path / "expected.json")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_bare_state_is_filled_and_training_goes_on(directories: dict[str, Path], name: str) -> None:
    blank = state(1)
    loaded = polyckpt.load(directories[name], blank.params, blank.opt_state, tx=blank.tx)
    assert same((loaded.model, loaded.optimizer), (RUN.params, RUN.opt_state))
    assert loaded.step == 20
    if name in ("manager", "v1 training"):
        assert loaded.metrics == {"loss": 0.25, "accuracy": 0.75}
    after = blank.replace(params=loaded.model, opt_state=loaded.optimizer, step=loaded.step)
    assert same(trained(RUN, 2).params, trained(after, 2).params)
    assert same(polyckpt.load(directories[name], blank.params).model, RUN.params)


def test_a_train_state_is_as_orbax_restores_it(managed: Path) -> None:
    loaded = polyckpt.load(managed / "30", state(1))
    with ocp.CheckpointManager(managed) as manager:
        theirs = manager.restore(30, args=ocp.args.StandardRestore(state(2)))
        assert loaded.metrics == manager.metrics(30)
    assert same(loaded.model, theirs) and loaded.model.step == 30
    assert same(trained(loaded.model, 2), trained(theirs, 2))


def test_a_template_without_values_is_filled(managed: Path) -> None:
    abstract = jax.eval_shape(lambda: state(1))
    loaded = polyckpt.load(managed / "30", abstract).model
    assert same((loaded.params, loaded.opt_state), (RUN.params, RUN.opt_state)) and loaded.step == 30


@pytest.mark.parametrize("together", [False, True], ids=["two items", "one item"])
def test_objects_of_nnx_are_filled_and_go_on(tmp_path: Path, together: bool) -> None:
    model, optimizer = module(0)
    train(model, optimizer, 3)
    if together:
        path = tmp_path / "both"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, nnx.state((model, optimizer)))
    else:
        path = tmp_path / "run" / "3"
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            items = {name: ocp.args.StandardSave(nnx.state(each)) for name, each in (("net", model), ("adam", optimizer))}
            manager.save(3, args=ocp.args.Composite(**items))
    other, its = module(1)
    loaded = polyckpt.load(path, other, its)
    assert loaded.step == 3 and loaded.model is other
    assert same(nnx.state((other, its)), nnx.state((model, optimizer)))  # the random state of the dropout too
    train(model, optimizer, 2)
    train(other, its, 2)
    assert same(nnx.state((other, its)), nnx.state((model, optimizer)))
    alone = module(2)[0]
    polyckpt.load(path, alone)
    assert not same(nnx.state(alone, nnx.Param), nnx.state(module(2)[0], nnx.Param))


def values(filled: bool) -> dict[str, Any]:
    return {
        "key": jax.random.key(5 if filled else 0),
        "keys": jax.random.split(jax.random.key(3 if filled else 1, impl="rbg"), 2),
        "bfloat16": jnp.arange(6).reshape(3, 2).astype(jnp.bfloat16) * filled,
        "scalar": jnp.float32(2.5 * filled),
        "numpy": np.float32(7 * filled),
        "integer": 3 * filled,
        "number": 2.5 * filled,
        "flag": filled,
        "text": "of the run" if filled else "",
        "none": None,
        "nothing": {},
        "mlp/~/linear": {"w": jnp.ones((2, 3)) * filled},
    }


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "item", values(True))
    loaded = polyckpt.load(tmp_path / "item", values(False)).model
    assert {name: type(value) for name, value in loaded.items()} == {name: type(value) for name, value in values(True).items()}
    assert loaded.pop("text") == "of the run"
    assert same(loaded, {name: value for name, value in values(True).items() if name != "text"})
    opened = polyckpt.open(tmp_path / "item")
    assert "text: 'of the run', which is no array" in opened.left_out
    assert opened.weights["bfloat16"].tobytes() == np.asarray(values(True)["bfloat16"]).tobytes()
    with pytest.raises(MismatchError, match=r"integer: checkpoint has int64.*, live object has 1.5"):
        polyckpt.load(tmp_path / "item", values(False) | {"integer": 1.5})
    with pytest.raises(MismatchError, match="more"):
        polyckpt.load(tmp_path / "item", values(False) | {"more": "text"})


def test_arrays_over_eight_devices_come_back_whole_and_sharded(tmp_path: Path) -> None:
    code = """
for name, zarr3 in (("zarr", False), ("zarr3", True)):
    path = f"{sys.argv[1]}/{name}"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=zarr3)) as checkpointer:
        checkpointer.save(path, tree)
    assert np.array_equal(polyckpt.open(path).weights["w"], values)
    loaded = polyckpt.load(path, template).model
    assert loaded["w"].sharding == boxes and np.array_equal(loaded["w"], values) and loaded["b"].tolist() == [0, 1, 2, 3, 4]
"""
    jax_runs.on_eight_devices(code, tmp_path)


OPTIMIZERS = {
    "momentum": (lambda: optax.sgd(0.1, momentum=0.9), ["momentum"]),
    "plain": (lambda: optax.sgd(0.1), None),
    "adagrad": (lambda: optax.adagrad(0.1), ["squared_sum"]),
    "schedule": (lambda: optax.adam(optax.linear_schedule(0.1, 0.01, 50)), ["custom", "first_moment", "step", "step"]),
    "amsgrad": (lambda: optax.amsgrad(0.1), ["custom", "custom", "first_moment", "step"]),
    "accumulating": (
        lambda: optax.MultiSteps(optax.adam(0.1), 2),
        ["custom", "custom", "custom", "custom", "first_moment", "step"],
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_optax_are_told_from_weights(tmp_path: Path, name: str) -> None:
    make, meanings = OPTIMIZERS[name]
    one = trained(state(0, make()), 4)
    jax_runs.manager(tmp_path / "run", one, [0.5]).close()
    opened = polyckpt.open(tmp_path / "run" / "10")
    assert sorted(opened.weights) == sorted(jax_runs.flat(one.params, "params"))
    if meanings is None:
        assert opened.manifest.optimizer is None
    else:
        slots = opened.manifest.optimizer.slots
        assert sorted(slot.meaning for slot in slots.values()) == meanings
    loaded = polyckpt.load(tmp_path / "run" / "10", state(1, make())).model
    loaded = loaded.replace(step=one.step)
    assert same(loaded, one) and same(trained(loaded, 2), trained(one, 2))


def test_weights_named_as_fields_of_optax_are_weights(tmp_path: Path) -> None:
    heads = {"encoder": {"mu": {"kernel": jnp.ones((5, 3))}, "logvar": {"kernel": jnp.ones((5, 3)) * 2}}}
    params = {**heads, "decoder": {"out": {"kernel": jnp.ones((5, 3)) * 3}}}
    opt_state = optax.adam(0.1).init(params)
    for name, tree in (("all", {"params": params, "opt": opt_state}), ("alone", params)):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, tree)
    opened = polyckpt.open(tmp_path / "all")
    assert sorted(opened.weights) == sorted(jax_runs.flat(params, "params")) and len(opened.optimizer) == 7
    assert sorted(polyckpt.open(tmp_path / "alone").weights) == sorted(jax_runs.flat(params))
    blank = jax.tree.map(jnp.zeros_like, params)
    assert same(polyckpt.load(tmp_path / "all", blank).model, params)


def test_what_does_not_fit_is_named(directories: dict[str, Path]) -> None:
    params = Net().init(jax.random.key(0), jnp.ones((1, 6)))["params"]
    with pytest.raises(MismatchError) as raised:
        polyckpt.load(directories["v1"], params)
    assert [(each.kind, each.name, each.stored, each.live) for each in raised.value.problems] == [
        ("shape", "Dense_0/kernel", "float32[5, 7]", "float32[6, 7]")
    ]
    with pytest.raises(MismatchError, match="Dense_0/kernel"):
        polyckpt.open(directories["v1"], like=params)
    with pytest.raises(MismatchError, match=r"no 0/trace/Dense_0/bias.* unlike the live one"):
        polyckpt.load(directories["manager"], state(1, optax.sgd(0.1, momentum=0.9)))
    assert polyckpt.load(directories["manager"], state(1, optax.sgd(0.1)).params).step == 20


def test_which_of_two_models_is_meant_is_not_guessed(tmp_path: Path) -> None:
    both = {"params": RUN.params, "average": jax.tree.map(lambda leaf: leaf * 2, RUN.params)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "item", both)
    with pytest.raises(UnsupportedError, match="'average', 'params' alike"):
        polyckpt.load(tmp_path / "item", state(1).params)
    assert same(polyckpt.load(tmp_path / "item", jax.tree.map(jnp.zeros_like, both)).model, both)


def test_a_torch_module_takes_it_over(directories: dict[str, Path]) -> None:
    model, optimizer = jax_runs.torch_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError, match="pass like= a live model"):
        polyckpt.load(directories["manager"], model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = polyckpt.load(directories["manager"], model, optimizer, like=state(1))
    assert loaded.step == 20 and optimizer.state[model[0].weight]["step"] == 20
    assert np.allclose(model(torch.tensor(jax_runs.BATCH)).detach().numpy(), jax_runs.outputs(RUN), atol=1e-6)
    for at, name in ((0, "Dense_0"), (2, "Dense_1")):
        moment = optimizer.state[model[at].weight]["exp_avg_sq"].numpy()
        assert np.array_equal(moment.T, np.asarray(RUN.opt_state[0].nu[name]["kernel"]))
    optimizer.zero_grad()
    x = jax.random.normal(jax.random.key(20), (4, 5))
    model(torch.tensor(np.asarray(x))).square().mean().backward()
    optimizer.step()
    after = jax_runs.outputs(trained(RUN.replace(step=20), 1))
    assert np.allclose(model(torch.tensor(jax_runs.BATCH)).detach().numpy(), after, atol=1e-6)


def test_a_keras_model_takes_it_over(directories: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "expected.npz", batch=jax_runs.BATCH, outputs=jax_runs.outputs(RUN))
    code = """
import os, sys
os.environ["KERAS_BACKEND"] = "jax"
import keras, numpy as np, polyckpt
from tests.formats.jax_runs import state
dense = keras.layers.Dense
model = keras.Sequential([keras.Input((5,)), dense(7, activation="relu"), dense(3)])
model.compile(keras.optimizers.AdamW(0.01, weight_decay=1e-4), "mse")
loaded = polyckpt.load(sys.argv[1], model, like=state(1), continuation="exact")
expected = np.load(sys.argv[2])
assert np.allclose(model(expected["batch"]), expected["outputs"], atol=1e-6)
assert loaded.step == 20 and int(model.optimizer.iterations) == 20
"""
    done = run_python(code, directories["v1 training"], tmp_path / "expected.npz")
    assert done.returncode == 0, done.stderr


def test_a_managers_directory_opens_its_newest_step(managed: Path) -> None:
    opened = polyckpt.open(managed)
    assert opened.path == managed / "50" and opened.manifest.progress.step == 50
    assert dict(opened.manifest.metrics) == {"loss": 0.6, "accuracy": 0.4}
    loaded = polyckpt.load(managed, state(1))
    assert loaded.step == 50 and loaded.checkpoint.path == managed / "50"
    assert same(loaded.model.params, RUN.params)


def test_the_newest_is_the_greatest_step_however_it_is_named(tmp_path: Path) -> None:
    options = ocp.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=4)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        for step in (9, 10, 100):
            manager.save(step, args=ocp.args.StandardSave({"w": jnp.full((3, 2), step)}))
    assert polyckpt.open(tmp_path / "run").path.name == "ckpt_0100"
    shutil.copytree(tmp_path / "run" / "ckpt_0100", tmp_path / "run" / "ckpt_0200.orbax-checkpoint-tmp-7")
    assert polyckpt.open(tmp_path / "run").manifest.progress.step == 100
    with ocp.CheckpointManager(tmp_path / "run") as manager:  # a second run in the same directory
        manager.save(300, args=ocp.args.StandardSave({"w": jnp.zeros((3, 2))}))
    with pytest.raises(NotACheckpointError):
        polyckpt.open(tmp_path / "run")
    with ocp.v1.training.Checkpointer(tmp_path / "v1") as checkpointer:
        for step in (9, 10):
            checkpointer.save(step, {"w": jnp.full((3, 2), step)})
    assert polyckpt.open(tmp_path / "v1").manifest.progress.step == 10


def test_what_flax_training_saved_opens_as_a_run(tmp_path: Path) -> None:
    assert flax.config.flax_use_orbax_checkpointing
    for step in (9, 10):
        checkpoints.save_checkpoint(str(tmp_path / "run"), {"w": jnp.full((3, 2), step)}, step, keep=3)
    opened = polyckpt.open(tmp_path / "run")
    assert opened.path.name == "checkpoint_10" and opened.manifest.progress.step == 10
    assert opened.weights["w"].tolist() == [[10] * 2] * 3


def test_a_number_in_a_name_is_no_step_where_no_manager_gave_it(tmp_path: Path) -> None:
    tree = {"w": jnp.ones((3, 2))}
    ocp.v1.save(tmp_path / "resnet_50", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "resnet_101", tree)
    assert [polyckpt.open(tmp_path / name).manifest.progress.step for name in ("resnet_50", "resnet_101")] == [None, None]
    with pytest.raises(NotACheckpointError):
        polyckpt.open(tmp_path)


def test_the_command_line_lists_what_the_manager_lists(managed: Path, tmp_path: Path) -> None:
    with ocp.CheckpointManager(
        managed, options=ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min")
    ) as manager:
        steps, best = manager.all_steps(), manager.best_step()
        told = json.loads(run("ls", managed, "--json", "--monitor", "loss").stdout)
        assert [each["step"] for each in told] == sorted(steps)
        assert [each["metrics"] for each in told] == [manager.metrics(step) for step in sorted(steps)]
    assert [each["step"] for each in told if "best" in each["marks"]] == [best]
    assert told[-1]["marks"] == ["last"]
    assert run("best", managed, "--monitor", "loss").stdout.strip() == str(managed / str(best))
    lines = run("verify", managed).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", str(managed / str(step))] for step in sorted(steps)]
    assert next(row for row in cells(run("plot", managed).stdout) if row[0] == "loss")[-3:-1] == ["0.3", "0.6"]
    assert run("plot", managed, tmp_path / "loss.png").stdout.strip() == str(tmp_path / "loss.png")
    assert cells(run("show", managed).stdout)[0] == [str(managed / "50")]
    assert "nothing of it is deleted" in run("prune", managed, code=2).stderr


def test_the_command_line_shows_a_damaged_step(managed: Path, tmp_path: Path) -> None:
    root = shutil.copytree(managed, tmp_path / "run")
    (root / "50" / "default" / "_METADATA").unlink()
    told = {each["name"]: each["marks"] for each in json.loads(run("ls", root, "--json").stdout)}
    assert told.keys() == {"20", "30", "50"} and told["50"] == ["damaged"]
    lines = run("verify", root, code=1).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "DAMAGED"]
    assert f"The step before it is {root / '30'}" in lines[-1]
    assert f"The step before it is {root / '30'}" in run("show", root, code=2).stderr


def test_orbax_restores_what_is_exported(directories: dict[str, Path], tmp_path: Path) -> None:
    tree = {**values(True), "text": None}
    path = polyckpt.save(tmp_path / "ours", tree)
    polyckpt.export(path, tmp_path / "weights", to="orbax")
    polyckpt.export(directories["composite"], tmp_path / "live", state(1), to="orbax")
    polyckpt.export(directories["composite"], tmp_path / "pair", state(1).params, state(1).opt_state, to="orbax")
    model, optimizer = jax_runs.torch_net()
    polyckpt.load(directories["manager"], model, optimizer, like=state(1))
    torch_path = polyckpt.save(tmp_path / "torch", model, optimizer, step=20)
    options = {"accept": {"names and order"}}
    polyckpt.export(torch_path, tmp_path / "converted", state(1), to="orbax", **options)
    written = {"params": jax_runs.flat(RUN.params), "mu": jax_runs.flat(RUN.opt_state[0].mu)}
    jax_runs.write_expected(tmp_path / "expected.json", {**written, "bf": {"w": np.asarray(tree["bfloat16"])}})
    code = """
import json, sys
sys.modules["polyckpt"] = None
import numpy as np, orbax.checkpoint as ocp
here = sys.argv[1]
expected = json.load(open(f"{here}/expected.json"))
def restored(name):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(f"{here}/{name}")
def check(case, tree):
    for name, (dtype, shape, data) in expected[case].items():
        value = tree
        for segment in name.split("/"):
            value = value[segment]
        value = np.asarray(value)
        assert (value.dtype.name, list(value.shape), value.tobytes().hex()) == (dtype, shape, data), (case, name)
check("bf", {"w": restored("weights")["bfloat16"]})
for name in ("live", "converted"):
    found = restored(name)
    check("params", found["params"])
    check("mu", found["opt_state"][0]["mu"])
    assert int(found["step"]) == int(found["opt_state"][0]["count"]) == 20, found["step"]
found = restored("pair")
check("params", found["model"])
check("mu", found["optimizer"][0]["mu"])
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert same(polyckpt.load(tmp_path / "live", state(2)).model.params, RUN.params)


def test_an_export_does_not_replace_a_whole_run(managed: Path, tmp_path: Path) -> None:
    root = shutil.copytree(managed, tmp_path / "run")
    with pytest.raises(CheckpointExistsError, match="several"):
        polyckpt.export(root / "20", root, to="orbax", overwrite=True)
    assert sorted(each.name for each in root.iterdir()) == ["20", "30", "50"]
