"""What CheckpointManager promises, where it is looked at, dropped, forked, interrupted, copied and misused."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
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
from polyckpt import CheckpointManager, Every
from polyckpt.errors import CorruptError, PolicyError, PolyckptError, StorageError
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


# Going back.


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


# What lies in the directory.


def test_a_link_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "favourite").mkdir()
    (tmp_path / "best").symlink_to("favourite")
    finished(tmp_path, 2, 1)
    assert os.readlink(tmp_path / "best") == "favourite"


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


@pytest.mark.parametrize("saved_at", ["yesterday", "", "2020-13-01T00:00:00+00:00"])
@pytest.mark.filterwarnings("ignore:skipped a damaged checkpoint")
def test_a_checkpoint_that_was_saved_at_no_time_is_a_damaged_one(tmp_path: Path, saved_at: str) -> None:
    finished(tmp_path, 2, 1)
    edit(tmp_path / "step-00000020", lambda raw: raw.update(saved_at_utc=saved_at))
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        assert ckpts.restore(params()).epoch == 1


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
