"""What has not changed since the checkpoint before is linked: few bytes are written, and none is ever taken for another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt import CheckpointManager, KeepLast
from tests.sealing import edit, run_python

Tree = dict[str, np.ndarray]


def tree(seed: int = 0) -> Tree:
    random = np.random.default_rng(seed)
    frozen = {f"frozen.{index}": random.standard_normal((50, 37 + index)).astype("float32") for index in range(8)}
    return {**frozen, "adapter": random.standard_normal((5, 37)).astype("float32"), "count": np.array([0])}


def step(model: Tree) -> Tree:
    return {**model, "adapter": model["adapter"] + 1, "count": model["count"] + 1}


def manager(path: Path, **more: object) -> CheckpointManager:
    return CheckpointManager(path / "run", link_unchanged=True, **{"keep_last": 2, **more})  # type: ignore[arg-type]


def written(path: Path) -> int:
    """The bytes that a checkpoint shares with no other."""
    return sum(each.stat().st_size for each in path.iterdir() if each.stat().st_nlink == 1)


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    models = [tree()]
    with manager(tmp_path) as ckpts:
        for number in range(1, 5):
            models.append(step(models[-1]))
            ckpts.save(models[-1], step=number)
    third, fourth = sorted((tmp_path / "run").glob("step-*"))
    assert (third / "unchanged-1.safetensors").stat().st_ino == (fourth / "unchanged-1.safetensors").stat().st_ino
    weights = sum(array.nbytes for array in models[4].values())
    assert (fourth / "weights.safetensors").stat().st_size < 0.06 * weights
    for path, expected in ((fourth, models[4]), (third, models[3])):
        opened = polyckpt.inspect(path)
        opened.verify()
        assert list(opened.weights) == list(expected)
        restored = polyckpt.load(path, tree(1)).model
        assert all(np.array_equal(restored[name], array) for name, array in expected.items())


@pytest.mark.parametrize("background", [False, True])
def test_a_new_process_links_what_the_last_one_wrote(background: bool, tmp_path: Path) -> None:
    with manager(tmp_path, async_save=background) as ckpts:
        ckpts.save(step(tree()), step=1)
    with manager(tmp_path, async_save=background) as ckpts:
        start = ckpts.restore(tree(1))
        ckpts.save(step(start.model), step=2)
    assert written(tmp_path / "run" / "step-00000002") < 0.3 * written_whole(tmp_path)
    assert polyckpt.load(tmp_path / "run" / "last", tree(1)).model["count"] == 2


def written_whole(path: Path) -> int:
    return sum(each.stat().st_size for each in polyckpt.save(path / "whole", tree()).iterdir())


def test_one_bit_is_a_change(tmp_path: Path) -> None:
    model = tree()
    with manager(tmp_path, keep_last=None) as ckpts:
        ckpts.save(model, step=1)
        for number, name in enumerate(("frozen.0", "frozen.7", "count"), 2):
            changed = {key: array.copy() for key, array in model.items()}
            changed[name].reshape(-1).view(np.uint8)[-1] ^= 1
            ckpts.save(changed, step=number)
            restored = polyckpt.load(tmp_path / "run" / "last", tree(1)).model
            assert all(np.array_equal(restored[key], array) for key, array in changed.items())
            model = changed


def test_a_tensor_of_another_type_or_shape_is_written(tmp_path: Path) -> None:
    zeros = {"a": np.zeros((40, 50), np.float32), "b": np.zeros(2000, np.int32), "c": np.zeros((50, 40), np.float32)}
    others = {"a": np.zeros((50, 40), np.float32), "b": np.zeros(2000, np.float32), "c": np.zeros((50, 40), np.float32)}
    with manager(tmp_path) as ckpts:
        ckpts.save(zeros, step=1)
        ckpts.save(others, step=2)
    restored = polyckpt.load(tmp_path / "run" / "last", others).model
    assert {name: (array.dtype, array.shape) for name, array in restored.items()} == {
        name: (array.dtype, array.shape) for name, array in others.items()
    }


def test_a_file_that_is_out_of_date_for_the_most_part_is_not_kept(tmp_path: Path) -> None:
    model = tree()
    with manager(tmp_path) as ckpts:
        ckpts.save(model, step=1)
        model = {name: array if name in ("frozen.0", "frozen.1") else array + 1 for name, array in model.items()}
        ckpts.save(model, step=2)
    tensors = polyckpt.inspect(tmp_path / "run" / "step-00000002").manifest.tensors["weights"].values()
    assert {chunk.file for tensor in tensors for chunk in tensor.chunks} == {"weights.safetensors"}


def test_damage_is_not_handed_on(tmp_path: Path) -> None:
    model = tree()
    with manager(tmp_path) as ckpts:
        ckpts.save(model, step=1)
        file = tmp_path / "run" / "step-00000001" / "weights.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        ckpts.save(step(model), step=2)
    polyckpt.inspect(tmp_path / "run" / "step-00000002").verify()
    assert polyckpt.load(tmp_path / "run" / "last", tree(1)).model["count"] == 1


def test_a_checkpoint_before_that_cannot_be_opened_is_no_obstacle(tmp_path: Path) -> None:
    with manager(tmp_path) as ckpts:
        ckpts.save(tree(), step=1)
        (tmp_path / "run" / "step-00000001" / "weights.safetensors").write_bytes(b"gone")
        ckpts.save(step(tree()), step=2)
    polyckpt.inspect(tmp_path / "run" / "step-00000002").verify()


@pytest.mark.parametrize("change", [{"dtype": "float4_new"}, {"chunks": "absent"}])
def test_one_that_a_reader_refuses_in_part_is_no_obstacle(change: dict[str, str], tmp_path: Path) -> None:
    def spoil(raw: dict[str, Any]) -> None:
        tensor = raw["tensors"]["weights"]["adapter"]
        if "dtype" in change:
            tensor.update(change)  # of a later version
        else:
            tensor["chunks"][0]["key"] = change["chunks"]

    model = tree()
    with manager(tmp_path) as ckpts:
        ckpts.save(model, step=1)
        edit(tmp_path / "run" / "step-00000001", spoil)
        ckpts.save(model, step=2)
    polyckpt.inspect(tmp_path / "run" / "step-00000002").verify()
    assert (tmp_path / "run" / "step-00000002" / "unchanged-1.safetensors").exists()
    restored = polyckpt.load(tmp_path / "run" / "step-00000002", tree(1)).model
    assert all(np.array_equal(restored[name], array) for name, array in model.items())


def test_without_links_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with manager(tmp_path) as ckpts:
        ckpts.save(tree(), step=1)
        ckpts.save(step(tree()), step=2)
    assert sorted(each.name for each in (tmp_path / "run" / "step-00000002").iterdir()) == sorted(
        each.name for each in (tmp_path / "run" / "step-00000001").iterdir()
    )
    polyckpt.inspect(tmp_path / "run" / "step-00000002").verify()


def test_what_was_linked_outlives_the_checkpoint_that_it_came_from(tmp_path: Path) -> None:
    model = tree()
    with CheckpointManager(tmp_path / "run", keep_last=1, keep=[KeepLast(1)], link_unchanged=True) as ckpts:
        for number in range(1, 4):
            model = step(model)
            ckpts.save(model, step=number)
    (only,) = (tmp_path / "run").glob("step-*")
    code = """
import sys, polyckpt
opened = polyckpt.inspect(sys.argv[1])
opened.verify()
print(int(opened.weights["count"][0]), float(opened.weights["frozen.3"].sum()))
"""
    done = run_python(code, only)
    assert done.stdout.split() == ["3", str(float(tree()["frozen.3"].sum()))], done.stderr
