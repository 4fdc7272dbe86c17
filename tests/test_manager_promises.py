"""What CheckpointManager promises, where it is looked at, dropped, forked, interrupted, copied and misused."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt import CheckpointManager, Every, manager
from polyckpt.errors import CorruptError, PolicyError, PolyckptError, RunError, StorageError, UnsupportedError
from polyckpt.snapshot import Snapshot
from tests.managed import epochs, finished, params, tell, value
from tests.sealing import edit, run_python


def listing(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".polyckpt-lock"}


# Looking changes nothing.


def test_a_restore_deletes_nothing_however_the_manager_was_made(tmp_path: Path) -> None:
    """A script that evaluates gives the directory and no policies."""
    before = listing(finished(tmp_path, 1, 2, 3, 4, 5, 6, keep_best=2))
    assert before >= {"best", "step-00000010", "step-00000020"}
    with CheckpointManager(tmp_path) as ckpts:
        assert value(ckpts.restore(params())) == 6
    assert listing(tmp_path) == before
    assert value(polyckpt.load(tmp_path / "best", params())) == 1


@pytest.mark.parametrize("step", ["best", 30])
@pytest.mark.filterwarnings("ignore:.*is not on disk")
def test_a_look_at_the_best_forgets_nothing_that_was_measured(tmp_path: Path, step: Any) -> None:
    with CheckpointManager(tmp_path, monitor="loss", every=Every(epochs=3), patience=2) as ckpts:
        tell(ckpts, 3, 2, 1, 0.5, 0.6, 0.7)
        ckpts.restore(params(), step=60)
        tell(ckpts, 0.4, 0.8, first=7)
        before = (ckpts.best, ckpts.records, ckpts.should_stop)
        assert before[0] and before[0].epoch == 7
        ckpts.restore(params(), step=step)
        assert (ckpts.best, ckpts.records, ckpts.should_stop) == before


def test_what_was_resumed_from_stays_while_others_are_looked_at(tmp_path: Path) -> None:
    finished(tmp_path, 3, 2, 1, keep_last=1)
    with CheckpointManager(tmp_path, monitor="loss", keep_last=1) as ckpts:
        assert ckpts.restore(params()).epoch == 3
        tell(ckpts, 0.5, 0.6, first=4)
        ckpts.restore_best(params())
        gc.collect()  # nobody holds a checkpoint open
        tell(ckpts, 0.7, first=6)
        assert epochs(ckpts) == [3, 4, 6]


def test_what_was_resumed_from_stays_where_a_metric_is_nan(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None) as ckpts:
        tell(ckpts, 3, 2, 1, acc=float("nan"))
    with CheckpointManager(tmp_path, monitor="loss", keep_best=0, keep_last=1) as ckpts:
        ckpts.restore(params(), step=20)
        gc.collect()
        tell(ckpts, 5, 6, first=3)
        assert epochs(ckpts) == [2, 4]


def test_a_best_that_is_replaced_while_it_is_opened_gives_way_to_the_new_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, raced = manager.api.load, []
    with CheckpointManager(tmp_path, monitor="loss", keep_last=2) as writer:
        tell(writer, 1, 3, 3, 2)

        def load(*arguments: Any, **keywords: Any) -> Any:
            if not raced:
                raced.append(tell(writer, 0.5, first=5))
            return real(*arguments, **keywords)

        monkeypatch.setattr(manager.api, "load", load)
        assert value(CheckpointManager(tmp_path, monitor="loss").restore(params(), step="best")) == 5


# Going back.


def test_a_save_that_is_refused_has_set_nothing_aside(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None) as ckpts:
        tell(ckpts, 3, 2, 1)
        ckpts.restore(params(), step=10)
        before = listing(tmp_path)
        with pytest.raises(UnsupportedError):
            ckpts.save(params(), epoch=2, step=15, metrics={"loss": 2}, extra={"function": print})
        assert listing(tmp_path) == before


def test_a_call_that_notes_nothing_has_set_nothing_aside(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep_last=None, every=Every(steps=10)) as ckpts:
        tell(ckpts, 3, 2, 1)
        ckpts.restore(params(), step=10)
        before = listing(tmp_path)
        assert ckpts.save(params(), step=15) is None
        assert listing(tmp_path) == before
        assert ckpts.save(params(7), step=20, metrics={})
    assert listing(tmp_path) == before - {"step-00000030"} | {"abandoned-step-00000020", "abandoned-step-00000030"}
    assert value(polyckpt.load(tmp_path / "last", params())) == 7


def test_links_are_whole_as_soon_as_a_run_has_gone_back(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None, every=Every(steps=10)) as ckpts:
        tell(ckpts, 3, 2, 1)
        ckpts.restore(params(), step=10)
        assert ckpts.save(params(), epoch=1, step=11, metrics={"loss": 5}) is None
        for link in ("last", "best"):
            assert value(polyckpt.load(tmp_path / link, params())) in (1, 3), link


# Signals, and managers that nobody closes.


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for each, handler in handlers.items():
        signal.signal(each, handler)


def test_a_dropped_manager_does_not_leave_the_process_deaf(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ckpts = CheckpointManager(tmp_path, preemption=True)
    assert signal.getsignal(signal.SIGTERM) != before
    del ckpts
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) == before


def test_managers_that_are_closed_in_any_order_leave_no_handler(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    first = CheckpointManager(tmp_path / "a", preemption=[signal.SIGUSR1])
    second = CheckpointManager(tmp_path / "b", preemption=[signal.SIGUSR1])
    first.close()
    second.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_signal_that_cannot_be_handled_is_refused_and_leaves_no_handler(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PolyckptError, match="SIGKILL"):
        CheckpointManager(tmp_path, preemption=[signal.SIGTERM, signal.SIGKILL])
    assert signal.getsignal(signal.SIGTERM) == before


def test_workers_that_were_forked_can_still_be_ended(tmp_path: Path) -> None:
    """As data loaders and pools do it: with SIGTERM."""
    with CheckpointManager(tmp_path, preemption=True):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
        worker.start()
        time.sleep(0.2)
        worker.terminate()
        worker.join(3)
        ended = worker.exitcode
        worker.kill()
        worker.join()
    assert ended == -signal.SIGTERM


def test_a_preempted_run_is_saved_although_a_save_before_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise StorageError(errno.EIO, "a disk that was away for a moment")

    ckpts = CheckpointManager(tmp_path, async_save=True, preemption=[signal.SIGUSR1])
    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "write", refused)
        ckpts.save(params(1), step=1)
        ckpts._background._thread.join()  # type: ignore[union-attr]
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises((SystemExit, StorageError)):
        ckpts.save(params(2), step=2)
    assert value(polyckpt.load(tmp_path / "last", params())) == 2


UNSEEN = """
import gc, sys, numpy as np, polyckpt
from polyckpt.snapshot import Snapshot
def write(self, *arguments, **keywords):
    raise polyckpt.StorageError(28, "disk full")
Snapshot.write = write
def main():
    ckpts = polyckpt.CheckpointManager(sys.argv[1], async_save=True)
    ckpts.save({"w": np.zeros(1000)}, step=1)
    ckpts._background._thread.join()
main()
gc.collect()
"""


def test_the_error_of_a_manager_that_is_gone_is_printed_too(tmp_path: Path) -> None:
    assert "disk full" in run_python(UNSEEN, tmp_path).stderr


def test_an_interrupted_wait_does_not_make_a_checkpoint_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda *a, **k: (gate.wait(30), write(*a, **k)))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with CheckpointManager(tmp_path, monitor="loss", async_save=True) as ckpts:
        tell(ckpts, 1)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(threading.Thread, "join", interrupted)
            ckpts.wait()
        gate.set()
        ckpts.wait()
        assert [record.name for record in ckpts.records] == ["step-00000010"] == [each.name for each in ckpts.checkpoints]
        assert ckpts.best and ckpts.best.name == "step-00000010"


# The lock.


def test_a_copy_of_the_directory_made_by_the_writer_does_not_free_it(tmp_path: Path) -> None:
    """Reading the lock's file, as a backup or an upload of artifacts does, must not give up the lock."""
    code = "import sys, numpy as np, polyckpt; polyckpt.CheckpointManager(sys.argv[1]).save({'w': np.ones(3)}, step=99)"
    with CheckpointManager(tmp_path / "run", monitor="loss") as ckpts:
        tell(ckpts, 2)
        shutil.copytree(tmp_path / "run", tmp_path / "backup", symlinks=True)
        assert "LockedError" in run_python(code, tmp_path / "run").stderr


FORKING = """
import os, sys, time, numpy as np, polyckpt
ckpts = polyckpt.CheckpointManager(sys.argv[1])
ckpts.save({"w": np.ones(3)}, step=1)
if os.fork() == 0:
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    time.sleep(20)
os._exit(0)
"""


def test_a_forked_worker_that_outlives_the_writer_locks_nobody_out(tmp_path: Path) -> None:
    run_python(FORKING, tmp_path)
    with CheckpointManager(tmp_path) as ckpts:
        ckpts.save(params(), step=2)


# What lies in the directory.


def test_a_link_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "favourite").mkdir()
    (tmp_path / "best").symlink_to("favourite")
    finished(tmp_path, 2, 1)
    assert os.readlink(tmp_path / "best") == "favourite"


@pytest.mark.filterwarnings("ignore")
def test_a_directory_without_anything_of_polyckpt_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000005" / "default").mkdir(parents=True)
    (tmp_path / "step-00000005" / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "step-00000006").mkdir()
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        assert ckpts.restore(params()).checkpoint is None
        tell(ckpts, 2, 1)
    assert listing(tmp_path) >= {"step-00000005", "step-00000006"}


@pytest.mark.filterwarnings("ignore")
def test_a_foreign_checkpoint_of_a_later_version_stops_no_run(tmp_path: Path) -> None:
    finished(tmp_path, 2, 1)
    edit(polyckpt.save(tmp_path / "step-00000077", params()), lambda raw: raw.update(version="2.0"))
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        assert ckpts.restore(params()).epoch == 2


@pytest.mark.filterwarnings("ignore:.*damaged and left out")
def test_a_users_copy_stays_where_the_historys_first_line_is_damaged(tmp_path: Path) -> None:
    finished(tmp_path, 3, 2, 1, keep_last=None)
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000011")  # a name that no manager gave
    data = bytearray((tmp_path / "history.jsonl").read_bytes())
    data[10] ^= 1
    (tmp_path / "history.jsonl").write_bytes(data)
    with CheckpointManager(tmp_path, monitor="loss", keep_last=1) as ckpts:
        ckpts.restore(params())
        tell(ckpts, 0.5, first=4)
    assert (tmp_path / "step-00000011").is_dir()


def test_a_run_whose_checkpoints_are_all_gone_does_not_begin_anew_unnoticed(tmp_path: Path) -> None:
    finished(tmp_path, 2, 1)
    for path in tmp_path.glob("step-*"):
        shutil.rmtree(path)
    ckpts = CheckpointManager(tmp_path, monitor="loss")
    with pytest.warns(UserWarning, match="fresh start"):
        ckpts.restore(params())
    ckpts.close()


@pytest.mark.parametrize("saved_at", ["yesterday", "", "2020-13-01T00:00:00+00:00"])
@pytest.mark.filterwarnings("ignore:skipped a damaged checkpoint")
def test_a_checkpoint_that_was_saved_at_no_time_is_a_damaged_one(tmp_path: Path, saved_at: str) -> None:
    finished(tmp_path, 2, 1)
    edit(tmp_path / "step-00000020", lambda raw: raw.update(saved_at_utc=saved_at))
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        assert ckpts.restore(params()).epoch == 1


def test_a_failed_save_has_no_name_in_the_next_process_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        tell(ckpts, 2)
        with monkeypatch.context() as patch, pytest.raises(StorageError):
            patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            tell(ckpts, 1, first=2)
        tell(ckpts, 1.5, first=3)
        told = [(record.epoch, record.name) for record in ckpts.records]
    assert [(record.epoch, record.name) for record in CheckpointManager(tmp_path, monitor="loss").records] == told


def test_what_is_saved_again_after_a_failure_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path, monitor="loss", patience=2) as ckpts:
        tell(ckpts, 1)
        with monkeypatch.context() as patch, pytest.raises(StorageError):
            patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            tell(ckpts, 2, first=2)
        tell(ckpts, 2, first=2)
        assert not ckpts.should_stop and [record.epoch for record in ckpts.records] == [1, 2] == epochs(ckpts)
        told = ckpts.records
    with CheckpointManager(tmp_path, monitor="loss", patience=2) as ckpts:
        assert ckpts.records == told
        tell(ckpts, 3, first=3)
        assert ckpts.should_stop


def test_a_history_whose_first_line_is_damaged_names_the_run_again(tmp_path: Path) -> None:
    finished(tmp_path, 2, 1)
    path = tmp_path / "history.jsonl"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.warns(UserWarning, match=r"lines \[1\] are damaged"), CheckpointManager(tmp_path, monitor="loss") as ckpts:
        tell(ckpts, 0.5, first=3)
    for checkpoint in tmp_path.glob("step-*"):
        shutil.rmtree(checkpoint)
    stranger = finished(tmp_path / "other", 3, 2, 1) / "step-00000030"
    stranger.rename(tmp_path / "step-00000030")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(RunError, match="another run"),
        CheckpointManager(tmp_path, monitor="loss") as ckpts,
    ):
        ckpts.restore(params())


# Errors are polyckpt's own.


@pytest.mark.parametrize("where", ["file/run", "file"])
def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    ckpts = CheckpointManager(tmp_path / where)
    with pytest.raises(StorageError, match="file"):
        ckpts.save(params(), epoch=1)
    with warnings.catch_warnings(), pytest.raises(StorageError, match="file"):
        warnings.simplefilter("ignore")
        ckpts.restore(params())


def test_a_history_that_cannot_be_synced_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".jsonl"):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        tell(ckpts, 2)
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageError, match="Input/output error"):
            tell(ckpts, 1, first=2)
        assert epochs(ckpts) == [1]


@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_does_not_keep_a_run_from_being_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path, 2, 1)

    def write(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        assert ckpts.restore(params()).epoch == 2


@pytest.mark.parametrize(
    "options",
    [{"keep": "abc"}, {"keep": [3]}, {"keep": polyckpt.KeepEvery}, {"every": 5}, {"every": Every}, {"early_stopping": 3}],
    ids=repr,
)
def test_options_that_are_no_policies_are_refused_at_once(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises((PolicyError, TypeError)):
        CheckpointManager(tmp_path, monitor="loss", **options)


def test_a_step_may_be_a_number_of_numpy(tmp_path: Path) -> None:
    finished(tmp_path, 2, 1)
    ckpts = CheckpointManager(tmp_path, monitor="loss")
    assert ckpts.restore(params(), step=np.int64(10)).step == 10
    with pytest.raises(CorruptError):
        (tmp_path / "step-00000010" / "weights.safetensors").write_bytes(b"")
        ckpts.restore(params(), step=np.int64(10))
