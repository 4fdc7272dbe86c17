"""CheckpointManager as a user, a careless user and a damaged disk meet it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt import CheckpointManager, manager
from polyckpt.errors import CorruptError, LockedError, PolicyError, RunError, StorageError, UnsupportedError
from tests.managed import epochs, params, value


def saved(directory: Path, *losses: float | None, **options: Any) -> CheckpointManager:
    """A manager that was told of one epoch for each loss; the model of epoch n is full of n."""
    ckpts = CheckpointManager(directory, **{"monitor": "loss", **options})
    for epoch, loss in enumerate(losses, 1):
        ckpts.save(params(epoch), epoch=epoch, step=10 * epoch, metrics=None if loss is None else {"loss": loss})
    return ckpts


def damage(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# Restoring.


def test_a_fresh_start_gives_back_what_was_given(tmp_path: Path) -> None:
    model, slots, extra = params(7), params(8), {"note": 1}
    start = CheckpointManager(tmp_path / "run").restore(model, slots, extra=extra)
    assert (start.epoch, start.step, start.batch, start.metrics, start.checkpoint) == (0, 0, None, {}, None)
    assert start.model is model and start.optimizer is slots and start.extra == extra


def test_selectors(tmp_path: Path) -> None:
    with saved(tmp_path, 3, 1, 2, keep_last=None) as ckpts:
        assert value(ckpts.restore(params())) == 3
        assert value(ckpts.restore(params(), step="last")) == 3
        assert value(ckpts.restore(params(), step="best")) == 2
        assert value(ckpts.restore(params(), step=10)) == 1
        assert value(ckpts.restore_best(params())) == 2
        with pytest.raises(RunError, match=r"no checkpoint of step 15; there are \[10, 20, 30\]"):
            ckpts.restore(params(), step=15)
        with pytest.raises(RunError, match="'last', 'best' or a number"):
            ckpts.restore(params(), step="newest")  # type: ignore[arg-type]
    assert value(polyckpt.load(tmp_path / "best", params())) == 2
    assert value(polyckpt.load(tmp_path / "last", params())) == 3
    assert os.readlink(tmp_path / "best") == "step-00000020"


def test_epochs_name_what_has_no_step(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        path = ckpts.save(params(1), epoch=1, metrics={"loss": 1.0})
        assert path == tmp_path / "epoch-00000001"
        assert value(ckpts.restore(params(), step=1)) == 1
        with pytest.raises(RunError, match="pass epoch= or step="):
            ckpts.save(params(1))


def test_without_a_best_the_error_says_why(tmp_path: Path) -> None:
    with saved(tmp_path / "a", float("nan"), None) as ckpts, pytest.raises(RunError, match=r"finite 'loss'.*there are: loss"):
        ckpts.restore_best(params())
    with saved(tmp_path / "b", monitor=None) as ckpts, pytest.raises(RunError, match="make the manager with monitor="):
        ckpts.restore_best(params())


# What is kept.


def test_the_best_the_last_and_every_so_many_are_kept(tmp_path: Path) -> None:
    more = [polyckpt.BestBy("acc"), polyckpt.KeepEvery(epochs=4)]
    with CheckpointManager(tmp_path, monitor="loss", keep_best=2, keep_last=1, keep=more) as ckpts:
        for epoch, (loss, acc) in enumerate([(9, 5), (2, 1), (1, 1), (8, 2), (3, 3), (7, 4), (6, 1)], 1):
            ckpts.save(params(epoch), epoch=epoch, metrics={"loss": loss, "acc": acc})
        assert epochs(ckpts) == [1, 2, 3, 4, 7]
        assert sorted(path.name for path in tmp_path.glob("epoch-*")) == [f"epoch-{n:08d}" for n in (1, 2, 3, 4, 7)]


def test_the_best_is_known_when_it_is_gone(tmp_path: Path) -> None:
    ckpts = saved(tmp_path, 1, 3, 2, keep_best=0, keep_last=1, every=polyckpt.Every(epochs=2) | polyckpt.OnImprovement(1.5))
    best = ckpts.best
    assert best is not None and (best.epoch, best.name) == (1, None)
    assert epochs(ckpts) == [2]
    with pytest.warns(UserWarning, match="the best of the run, epoch 1 step 10, is not on disk"):
        assert value(ckpts.restore_best(params())) == 2
    ckpts.close()
    again = CheckpointManager(tmp_path, monitor="loss").best
    assert again == best


def test_what_was_resumed_from_and_what_is_read_stay(tmp_path: Path) -> None:
    saved(tmp_path, 3, 2, 1, keep_last=1).close()
    with CheckpointManager(tmp_path, monitor="loss", keep_last=1) as ckpts:
        ckpts.restore(params())
        for epoch in (4, 5):
            ckpts.save(params(epoch), epoch=epoch, step=10 * epoch, metrics={"loss": 0.5 / epoch})
        assert epochs(ckpts) == [3, 5]
        reader = polyckpt.inspect(tmp_path / "last")
        ckpts.save(params(6), epoch=6, step=60, metrics={"loss": 0.01})
        assert epochs(ckpts) == [3, 5, 6]
        assert reader.weights["w"][0, 0] == 5
        del reader
        ckpts.save(params(7), epoch=7, step=70, metrics={"loss": 0.001})
        assert epochs(ckpts) == [3, 7]


def test_another_process_that_reads_keeps_it_from_deletion(tmp_path: Path) -> None:
    with saved(tmp_path, 1, keep_best=0, keep_last=1) as ckpts:
        code = "import sys, polyckpt; c = polyckpt.inspect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", code, str(tmp_path / "last")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stdout.readline() == "open\n"
            ckpts.save(params(2), epoch=2, step=20, metrics={"loss": 2})
            assert epochs(ckpts) == [1, 2]
        ckpts.save(params(3), epoch=3, step=30, metrics={"loss": 3})
        assert epochs(ckpts) == [3]


def test_nothing_foreign_is_touched(tmp_path: Path) -> None:
    polyckpt.save(tmp_path / "step-00000005", params(5), step=5)
    (tmp_path / "step-00000006" / "items").mkdir(parents=True)
    (tmp_path / "best").write_text("a file of the user")
    (tmp_path / "notes.txt").write_text("x")
    with saved(tmp_path, 3, 2, 1, keep_last=1) as ckpts:
        shutil.copytree(tmp_path / "step-00000030", tmp_path / "mine")
        shutil.copytree(tmp_path / "step-00000030", tmp_path / "step-00000099")
        ckpts.save(params(4), epoch=4, step=40, metrics={"loss": 0.5})
        assert epochs(ckpts) == [4]
    with CheckpointManager(tmp_path, monitor="loss", keep_last=1) as ckpts:
        assert value(ckpts.restore(params())) == 4
        ckpts.save(params(5), epoch=5, step=50, metrics={"loss": 0.1})
    there = {path.name for path in tmp_path.iterdir()}
    assert there >= {"step-00000005", "step-00000006", "mine", "step-00000099", "notes.txt", "best"}
    assert (tmp_path / "best").read_text() == "a file of the user"
    assert polyckpt.inspect(tmp_path / "step-00000005").manifest.run is None


def test_the_new_one_is_whole_before_an_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = manager.RunDirectory.delete

    def delete(self: Any, name: str) -> bool:
        seen.append((name, polyckpt.inspect(tmp_path / "last").manifest.progress.epoch))
        polyckpt.inspect(tmp_path / "last").verify()
        return real(self, name)

    monkeypatch.setattr(manager.RunDirectory, "delete", delete)
    saved(tmp_path, 3, 2, 1, keep_last=1)
    assert seen == [("step-00000010", 2), ("step-00000020", 3)]


# Going back, repeating.


def test_steps_that_go_back_are_refused_without_a_restore(tmp_path: Path) -> None:
    with saved(tmp_path, 3, 2) as ckpts:
        with pytest.raises(RunError, match="epoch 1 step 10 cannot follow epoch 2 step 20"):
            ckpts.save(params(9), epoch=1, step=10, metrics={"loss": 1})
        assert epochs(ckpts) == [1, 2]
        ckpts.save(params(9), epoch=2, step=20, metrics={"loss": 1})
        assert [record.name for record in ckpts.checkpoints] == ["step-00000010", "step-00000020", "step-00000020-2"]
        assert value(ckpts.restore(params(), step=20)) == 9


def test_a_run_that_went_back_leaves_the_other_branch_aside(tmp_path: Path) -> None:
    with saved(tmp_path, 5, 4, 1, 2, keep_last=None) as ckpts:
        ckpts.restore(params(), step=20)
        ckpts.save(params(33), epoch=3, step=30, metrics={"loss": 3})
        assert epochs(ckpts) == [1, 2, 3] and (ckpts.best or ckpts.checkpoints[0]).epoch == 3
    names = {path.name for path in tmp_path.glob("*step-*")}
    assert names == {f"step-000000{n}0" for n in (1, 2, 3)} | {f"abandoned-step-000000{n}0" for n in (3, 4)}
    again = CheckpointManager(tmp_path, monitor="loss")
    assert value(again.restore(params())) == 33
    assert [record.metrics["loss"] for record in again.records] == [5, 4, 3]
    assert value(polyckpt.load(tmp_path / "abandoned-step-00000030", params())) == 3


def test_the_best_taken_for_a_while_is_no_way_back(tmp_path: Path) -> None:
    with saved(tmp_path, 3, 1, 2) as ckpts:
        ckpts.restore_best(params())
        ckpts.save(params(4), epoch=4, step=40, metrics={"loss": 4})
        assert epochs(ckpts) == [2, 3, 4] and not list(tmp_path.glob("abandoned-*"))


# Metrics.


@pytest.mark.parametrize("bad", [np.ones(2), "0.5", None, [0.5], {}, 1j, np.array([1.0, 2.0])], ids=repr)
def test_a_metric_that_is_no_number_is_named(tmp_path: Path, bad: Any) -> None:
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        with pytest.raises(UnsupportedError, match="metrics\\['loss'\\]"):
            ckpts.save(params(), epoch=1, metrics={"loss": bad})
        assert ckpts.checkpoints == () == ckpts.records


def test_numbers_of_every_library_are_metrics(tmp_path: Path) -> None:
    import torch

    with CheckpointManager(tmp_path, monitor="loss", keep_last=None) as ckpts:
        for epoch, loss in enumerate([np.float32(0.5), np.array(0.25), torch.tensor(0.125), 1, True], 1):
            ckpts.save(params(), epoch=epoch, metrics={"loss": loss})
        assert [record.metrics["loss"] for record in ckpts.records] == [0.5, 0.25, 0.125, 1, 1]


def test_a_misspelt_monitor_is_told(tmp_path: Path) -> None:
    ckpts = CheckpointManager(tmp_path, monitor="val_los", mode="min")
    with pytest.raises(
        PolicyError, match=r"metrics lack 'val_los' \(did you mean 'val_loss'\?\); there are: val_loss, val_acc"
    ):
        ckpts.save(params(), epoch=1, metrics={"val_loss": 1, "val_acc": 0})
    assert not ckpts.checkpoints
    ckpts.close()
    with CheckpointManager(tmp_path, monitor="val_los", mode="min", missing="warn") as ckpts:
        with pytest.warns(UserWarning, match="metrics lack 'val_los'"):
            assert ckpts.save(params(), epoch=1, metrics={"val_loss": 1})
        with pytest.warns(UserWarning, match="epoch 2 came without metrics, so it is no candidate by val_los"):
            ckpts.save(params(), epoch=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ckpts.save(params(), epoch=3)
    with pytest.raises(PolicyError, match="missing='ignore'"):
        CheckpointManager(tmp_path, missing="ignore")  # type: ignore[arg-type]


def test_the_direction_taken_from_a_name_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "polyckpt"):
        CheckpointManager(tmp_path, monitor="val_acc")
    assert "val_acc: more of it is better" in caplog.text
    with pytest.raises(PolicyError, match="'quality' is better cannot be told"):
        CheckpointManager(tmp_path, monitor="quality")


def test_patience_counts_what_was_not_saved_too(tmp_path: Path) -> None:
    every = polyckpt.Every(epochs=3)
    with CheckpointManager(tmp_path, monitor="loss", every=every, patience=2, keep_last=1) as ckpts:
        stops = []
        for epoch, loss in enumerate([1, 0.5, 0.6, 0.7], 1):
            ckpts.save(params(epoch), epoch=epoch, metrics={"loss": loss})
            stops.append(ckpts.should_stop)
        assert stops == [False, False, False, True] and epochs(ckpts) == [3]
    # The fourth epoch came after the last checkpoint: it is done again, and stops again.
    with CheckpointManager(tmp_path, monitor="loss", every=every, patience=2) as ckpts:
        assert ckpts.restore(params()).epoch == 3 and not ckpts.should_stop
        ckpts.save(params(4), epoch=4, metrics={"loss": 0.7})
        assert ckpts.should_stop


def test_a_forced_save_is_made_whatever_the_policy(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, every=polyckpt.Every(epochs=100)) as ckpts:
        assert ckpts.save(params(), epoch=1) is None
        assert ckpts.save(params(), epoch=2, force=True) == tmp_path / "epoch-00000002"


# Damage.


FILES: dict[str, Callable[[Path], None]] = {
    "a bit of a tensor": lambda path: damage(path / "weights.safetensors"),
    "a bit of the manifest": lambda path: damage(path / "manifest.json", 200),
    "the end of a file": lambda path: os.truncate(path / "weights.safetensors", 10),
    "the end of the manifest": lambda path: os.truncate(path / "manifest.json", 100),
    "a file": lambda path: (path / "weights.safetensors").unlink(),
    "the manifest": lambda path: (path / "manifest.json").unlink(),
}


@pytest.mark.parametrize("what", FILES)
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_taken(tmp_path: Path, what: str) -> None:
    saved(tmp_path, 3, 2, 1).close()
    FILES[what](tmp_path / "step-00000030")
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        with pytest.warns(
            UserWarning, match=r"skipped a damaged checkpoint, kept aside as corrupt-step-00000030: .*step-00000030"
        ):
            assert value(ckpts.restore(params())) == 2
        assert epochs(ckpts) == [1, 2] and (tmp_path / "corrupt-step-00000030").is_dir()
        ckpts.save(params(3), epoch=3, step=30, metrics={"loss": 0.5})
        assert epochs(ckpts) == [2, 3] or epochs(ckpts) == [1, 2, 3]
        assert [record.metrics["loss"] for record in ckpts.records] == [3, 2, 0.5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value(CheckpointManager(tmp_path, monitor="loss").restore(params())) == 3


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep_best=2).close()
    damage(tmp_path / "step-00000010" / "weights.safetensors")
    ckpts = CheckpointManager(tmp_path, monitor="loss")
    with pytest.warns(UserWarning, match="left where it is"):
        assert value(ckpts.restore(params(), step="best")) == 2
    with pytest.raises(CorruptError):
        ckpts.restore(params(), step=10)


def test_nothing_begins_anew_where_all_is_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 2, 1).close()
    for path in tmp_path.glob("step-*"):
        damage(path / "weights.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())
    for _ in range(2):
        with pytest.raises(CorruptError, match="must not begin anew unnoticed"), CheckpointManager(tmp_path) as ckpts:
            ckpts.restore(params())
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_lost_history_costs_only_the_deleted(tmp_path: Path) -> None:
    saved(tmp_path, 1, 5, 4, 6, keep_last=1, keep_best=1).close()
    (tmp_path / "history.jsonl").unlink()
    with CheckpointManager(tmp_path, monitor="loss", keep_last=1) as ckpts:
        assert value(ckpts.restore(params())) == 4
        assert [record.epoch for record in ckpts.records] == [1, 4] and ckpts.best and ckpts.best.epoch == 1
        ckpts.save(params(5), epoch=5, step=50, metrics={"loss": 7})
        assert epochs(ckpts) == [1, 4, 5]
    assert [record.epoch for record in CheckpointManager(tmp_path, monitor="loss").records] == [1, 4, 5]


def test_another_runs_checkpoints_are_left_alone(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1).close()
    saved(tmp_path / "b", 5, 4).close()
    shutil.copytree(tmp_path / "a" / "step-00000010", tmp_path / "b" / "step-00000500")
    with CheckpointManager(tmp_path / "b", monitor="loss", keep_last=1) as ckpts:
        with pytest.warns(UserWarning, match="step-00000500: of another run; left alone"):
            assert value(ckpts.restore(params())) == 2
        ckpts.save(params(3), epoch=3, step=30, metrics={"loss": 0.1})
    assert (tmp_path / "b" / "step-00000500" / "manifest.json").exists()
    for path in (tmp_path / "b").glob("step-000000*"):
        shutil.rmtree(path)
    with pytest.raises(RunError, match="of another run, and none of this one"):
        CheckpointManager(tmp_path / "b").restore(params())


def test_a_fresh_start_beside_checkpoints_of_nobody_warns(tmp_path: Path) -> None:
    polyckpt.save(tmp_path / "mine", params(5), step=5)
    with pytest.warns(UserWarning, match="a fresh start beside mine, which no manager wrote"):
        assert CheckpointManager(tmp_path).restore(params()).epoch == 0


# Two of them.


def test_the_second_writer_is_told_and_may_read(tmp_path: Path) -> None:
    first = saved(tmp_path, 2, 1)
    second = CheckpointManager(tmp_path, monitor="loss")
    assert epochs(second) == [1, 2] and second.best and second.best.epoch == 2
    with pytest.warns(UserWarning, match="read-only: .*another CheckpointManager of this process"):
        assert value(second.restore(params())) == 2
    with pytest.raises(LockedError, match="another CheckpointManager of this process"):
        second.save(params(3), epoch=3, step=30, metrics={"loss": 1})
    first.save(params(3), epoch=3, step=30, metrics={"loss": 0.5})
    assert epochs(second) == [1, 2, 3], "a reader sees what the writer does"
    del first  # as in a notebook, without close()
    second.save(params(4), epoch=4, step=40, metrics={"loss": 0.1})
    second.close()


def test_a_reader_takes_the_next_where_one_is_deleted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, real = saved(tmp_path, 1, keep_best=0, keep_last=1), manager.api.load

    def load(path: Path, **options: Any) -> polyckpt.Restored:
        if writer.checkpoints[-1].epoch == 1:
            writer.save(params(2), epoch=2, step=20, metrics={"loss": 2})
        return real(path, **options)

    monkeypatch.setattr(manager.api, "load", load)
    assert value(CheckpointManager(tmp_path, monitor="loss").restore_best(params())) == 2


def test_counts_of_any_library_name_a_checkpoint(tmp_path: Path) -> None:
    import jax.numpy as jnp
    import torch

    with CheckpointManager(tmp_path, keep_last=None) as ckpts:
        for step in (np.int64(1), torch.tensor(2), jnp.array(3)):
            ckpts.save(params(), step=step, epoch=0)
        assert [record.name for record in ckpts.checkpoints] == [f"step-0000000{n}" for n in (1, 2, 3)]


HOLD = """
import sys, numpy as np, polyckpt
ckpts = polyckpt.CheckpointManager(sys.argv[1])
ckpts.save({"w": np.zeros((3, 2))}, epoch=1)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_writer_in_another_process_is_named_until_it_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        ckpts = CheckpointManager(tmp_path)
        with pytest.raises(LockedError, match=rf'"pid":{process.pid},"host":"{os.uname().nodename}"'):
            ckpts.save(params(), epoch=2)
        assert ckpts.checkpoints
        process.kill()
        process.wait()
    assert ckpts.save(params(), epoch=2)
    ckpts.close()


def test_a_forked_child_is_not_the_writer(tmp_path: Path) -> None:
    with saved(tmp_path, 1) as ckpts:
        child = os.fork()
        if child == 0:
            try:
                ckpts.save(params(2), epoch=2, step=20, metrics={"loss": 1})
            except LockedError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        ckpts.save(params(2), epoch=2, step=20, metrics={"loss": 1})


# Deleting a run.


def test_a_deleted_run_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    with saved(tmp_path / "run", 1, 2) as ckpts:
        ckpts.delete()
        assert not (tmp_path / "run").exists()
    with saved(tmp_path / "run", 1, 2) as ckpts:
        (tmp_path / "run" / "notes.txt").write_text("x")
        ckpts.delete()
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
        ckpts.save(params(1), epoch=1, metrics={"loss": 1})
        assert epochs(ckpts) == [1]


def test_a_failing_save_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with saved(tmp_path, 2, 1) as ckpts:
        with pytest.raises(UnsupportedError):
            ckpts.save(params(3), epoch=3, step=30, metrics={"loss": 0}, extra={"f": print})
        assert len(ckpts.records) == 2
        real = os.rename
        monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
        with pytest.raises(StorageError, match="disk full"):
            ckpts.save(params(3), epoch=3, step=30, metrics={"loss": 0.5})
        monkeypatch.setattr(os, "rename", real)
        assert epochs(ckpts) == [1, 2] and ckpts.best and (ckpts.best.epoch, ckpts.best.name) == (3, None)
        ckpts.save(params(4), epoch=4, step=40, metrics={"loss": 0.7})
        assert epochs(ckpts) == [1, 2, 4] or epochs(ckpts) == [2, 4]
