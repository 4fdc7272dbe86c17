"""CheckpointManager where something is wrong: disks, histories, other processes, hostile files, signals at a bad moment."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt import CheckpointManager, Every
from polyckpt.checksums import checksum
from polyckpt.errors import CorruptError, LockedError, MismatchError, RunError, StorageError
from polyckpt.snapshot import Snapshot
from tests.managed import epochs, finished, params, tell, value
from tests.sealing import edit, run_python


def sealed(body: str) -> bytes:
    """A line of a history, by anybody who can compute a checksum."""
    return body.encode() + b',"checksum":"' + checksum(body.encode()).encode() + b'"}\n'


# The history.


def test_a_damaged_line_in_the_middle_costs_that_line(tmp_path: Path) -> None:
    every = Every(epochs=3)
    finished(tmp_path, 9, 1, 8, 7, 2, 6, every=every, patience=5)
    path = tmp_path / "history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    position = next(number for number, line in enumerate(lines) if b'"sequence":2' in line)
    lines[position] = lines[position].replace(b'"loss":1', b'"loss":3')
    path.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match=rf"lines \[{position + 1}\] are damaged and left out"):
        ckpts = CheckpointManager(tmp_path, monitor="loss", every=every, patience=5)
        start = ckpts.restore(params())
    with ckpts:
        assert start.epoch == 6 and [record.epoch for record in ckpts.records] == [1, 3, 4, 5, 6]
        assert ckpts.best and ckpts.best.epoch == 5
        tell(ckpts, 5, 4, 3, first=7)
        assert epochs(ckpts)[-1] == 9
    with pytest.warns(UserWarning, match="damaged"):
        assert CheckpointManager(tmp_path, monitor="loss").checkpoints[-1].epoch == 9


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"\0" * 4096, b"\xff\xfe\n" * 50, b"[" * 5000 + b"\n", b'{"run":"x"}\n', sealed('{"run":5')], ids=len
)
@pytest.mark.filterwarnings("ignore:.*damaged and left out")
def test_a_history_of_garbage_is_as_none(tmp_path: Path, data: bytes) -> None:
    finished(tmp_path, 3, 1, 2, keep_last=1)
    (tmp_path / "history.jsonl").write_bytes(data)
    with CheckpointManager(tmp_path, monitor="loss", keep_last=1) as ckpts:
        assert ckpts.restore(params()).epoch == 3
        tell(ckpts, 4, first=4)
        assert epochs(ckpts) == [2, 3, 4] and ckpts.best and ckpts.best.epoch == 2
    again = CheckpointManager(tmp_path, monitor="loss", keep_last=1)
    assert again.restore(params()).epoch == 4 and [record.epoch for record in again.records] == [2, 3, 4]


def test_the_history_of_another_run_is_told_and_nothing_is_changed(tmp_path: Path) -> None:
    one, two = finished(tmp_path / "one", 1), finished(tmp_path / "two", 2, 3)
    shutil.copy(one / "history.jsonl", two / "history.jsonl")
    before = {path.name for path in two.iterdir()}
    ckpts = CheckpointManager(two, monitor="loss")
    for call in (lambda: ckpts.restore(params()), lambda: ckpts.best, lambda: tell(ckpts, 1, first=9)):
        with pytest.raises(RunError, match="step-00000010, step-00000020: of another run, and none of this one"):
            call()
    assert {path.name for path in two.iterdir()} == before
    assert len(CheckpointManager(one).records) == 1


def test_a_hostile_history_reaches_no_other_file(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", 2, 1)
    precious = polyckpt.save(tmp_path / "precious" / "step-00000001", params())
    with open(run / "history.jsonl", "ab") as file:
        for name in ("../precious/step-00000001", str(precious), "..", ".", "", "best", "\\u0000", ".polyckpt-lock"):
            file.write(sealed(f'{{"sequence":2,"time":0,"metrics":{{"loss":0.1}},"name":"{name}"'))
        file.write(sealed('{"sequence":99999999999999999999,"time":0,"epoch":-5,"metrics":{},"name":null'))
        file.write(sealed('{"sequence":-1,"time":-99999999999999,"metrics":{"loss":{"$float":"nan"}},"name":"x"'))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with CheckpointManager(run, monitor="loss", keep_last=1) as ckpts:
            assert ckpts.restore(params()).epoch == 2
            tell(ckpts, 0.5, 0.4, first=3)
            ckpts.delete()
    polyckpt.inspect(precious).verify()
    assert [path.name for path in tmp_path.iterdir() if path != run] == ["precious"]


@pytest.mark.parametrize("sequence", [0, -1, 1.5, "x", None, 2**63, 10**30])
def test_a_hostile_place_in_the_run_is_a_damaged_checkpoint_or_the_last(tmp_path: Path, sequence: Any) -> None:
    finished(tmp_path, 2, 1)
    edit(tmp_path / "step-00000020", lambda raw: raw["run"].update(sequence=sequence))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with CheckpointManager(tmp_path, monitor="loss") as ckpts:
            assert ckpts.restore(params()).epoch in (1, 2)
            tell(ckpts, 0.5, first=3)
        assert CheckpointManager(tmp_path, monitor="loss").restore(params()).epoch == 3


# What lies in the directory.


def test_leftovers_of_a_killed_process_go_as_the_next_begins(tmp_path: Path) -> None:
    finished(tmp_path, 1)
    (tmp_path / ".polyckpt-tmp-00").mkdir()
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".polyckpt-tmp-01")
    (tmp_path / ".polyckpt-tmp-02").symlink_to("step-00000010")
    (tmp_path / ".polyckpt-lock").write_text('{"pid": 1, "host": "gone"}')
    assert CheckpointManager(tmp_path).checkpoints
    assert len(list(tmp_path.glob(".polyckpt-tmp-*"))) == 3, "a reader removes nothing"
    with CheckpointManager(tmp_path) as ckpts:
        assert ckpts.restore(params()).epoch == 1
    assert not list(tmp_path.glob(".polyckpt-tmp-*")) and (tmp_path / "step-00000010").is_dir()


def test_a_checkpoint_that_was_moved_behind_a_link_is_not_deleted(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", 3, 2, 1, keep_last=None)
    (run / "step-00000010").rename(tmp_path / "archived")
    (run / "step-00000010").symlink_to(tmp_path / "archived")
    with CheckpointManager(run, monitor="loss", keep_last=1) as ckpts:
        tell(ckpts, 0.5, first=4)
        assert epochs(ckpts) == [4]
    polyckpt.inspect(tmp_path / "archived").verify()
    assert (run / "step-00000010").is_symlink()


def test_checkpoints_of_others_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    """Of polyckpt.save under any name, of another tool, and what only has the name of a checkpoint."""
    for name in ("step-00000001", "epoch-00000001", "mine", "epoch-1"):
        polyckpt.save(tmp_path / name, params(5), step=5)
    (tmp_path / "step-5" / "default").mkdir(parents=True)
    (tmp_path / "step-5" / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "step-00000008").write_text("a file")
    foreign = {path.name for path in tmp_path.iterdir()}
    with pytest.warns(UserWarning, match="a fresh start beside") as caught:
        ckpts = CheckpointManager(tmp_path, monitor="loss", keep_last=1)
        assert ckpts.restore(params()).checkpoint is None
    assert "mine" in str(caught[0].message) and "step-5" not in str(caught[0].message)
    with ckpts:
        for n in range(1, 10):
            ckpts.save(params(n), step=n, metrics={"loss": -n})
        assert [record.name for record in ckpts.checkpoints] == ["step-00000009"]
        ckpts.delete()
    assert {path.name for path in tmp_path.iterdir()} == foreign
    assert polyckpt.load(tmp_path / "mine", params()).step == 5


def test_a_checkpoint_that_does_not_fit_is_no_damaged_one(tmp_path: Path) -> None:
    finished(tmp_path, 2, 1)
    before = sorted(path.name for path in tmp_path.iterdir())
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        with pytest.raises(MismatchError, match="w"):
            ckpts.restore({"v": np.zeros(3)})
        assert sorted(path.name for path in tmp_path.iterdir()) == before and epochs(ckpts) == [1, 2]
        tell(ckpts, 3, first=3)


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_a_disk_that_cannot_read_one_checkpoint_gives_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    finished(tmp_path, 3, 2, 1)

    def broken(real: Any) -> Any:
        def call(file: Any, *arguments: Any, **keywords: Any) -> Any:
            if str(file).endswith(f"step-00000030/{name}"):
                raise OSError(errno.EIO, "Input/output error", str(file))
            return real(file, *arguments, **keywords)

        return call

    for module in (builtins, os):
        monkeypatch.setattr(module, "open", broken(module.open))
    with CheckpointManager(tmp_path, monitor="loss") as ckpts, pytest.warns(UserWarning, match="Input/output error"):
        assert value(ckpts.restore(params())) == 2
    assert (tmp_path / "corrupt-step-00000030").is_dir()


def test_damaged_checkpoints_are_skipped_one_after_the_other(tmp_path: Path) -> None:
    finished(tmp_path, 5, 4, 3, 2, 1, keep_last=None)
    for n in (2, 4, 5):
        os.truncate(tmp_path / f"step-000000{n}0" / "weights.safetensors", 50)
    with CheckpointManager(tmp_path, monitor="loss", keep_last=None) as ckpts:
        with pytest.warns(UserWarning, match="skipped a damaged checkpoint") as caught:
            assert value(ckpts.restore(params())) == 3
        assert len(caught) == 2, "the one below that was not tried"
        assert epochs(ckpts) == [1, 2, 3] and os.readlink(tmp_path / "best") == "step-00000030"
        with pytest.raises(CorruptError, match="step-00000020"):
            ckpts.restore(params(), step=20)
        tell(ckpts, 0.5, first=4)
    assert {path.name for path in tmp_path.glob("corrupt-*")} == {"corrupt-step-00000040", "corrupt-step-00000050"}


# Disks that are full, or may not be written to.


FULL = """
import resource, signal, sys, numpy as np, polyckpt
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
big, small = {"w": np.ones(40000)}, {"w": np.ones(10)}
with polyckpt.CheckpointManager(sys.argv[1], monitor="loss", async_save=True) as ckpts:
    ckpts.save(small, step=1, metrics={"loss": 3})
    ckpts.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    ckpts.save(big, step=2, metrics={"loss": 2})
    try:
        ckpts.wait()
    except polyckpt.StorageError as error:
        print("refused", [r.step for r in ckpts.checkpoints], ckpts.best.step, ckpts.best.name)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ckpts.save(big, step=3, metrics={"loss": 1})
"""


def test_a_background_save_that_the_system_refuses_leaves_no_junk(tmp_path: Path) -> None:
    done = run_python(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused [1] 2 None\n"
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-00000001", "step-00000003"]
    assert not list(tmp_path.glob(".polyckpt-tmp-*"))
    polyckpt.inspect(tmp_path / "best").verify()


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A directory that everybody can reach, for a process without privileges."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
    yield directory
    shutil.rmtree(directory)


def as_nobody(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setresuid(65534, 65534, 65534)
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_where_nothing_may_be_written_everything_can_be_read(nobody: Path) -> None:
    run = finished(nobody / "run", 2, 1, 3)
    run.chmod(0o555)

    def work() -> None:
        ckpts = CheckpointManager(run, monitor="loss", keep_last=1)
        with pytest.warns(UserWarning, match=r"read-only: .*cannot write .*\.polyckpt-lock: Permission denied"):
            assert value(ckpts.restore(params())) == 3
        assert value(ckpts.restore(params(), step="best")) == 2
        assert epochs(ckpts) == [1, 2, 3] and ckpts.best and ckpts.best.epoch == 2
        with pytest.raises(StorageError, match="Permission denied"):
            tell(ckpts, 1, first=4)

    assert as_nobody(work) == 0
    run.chmod(0o755)
    assert len(list(run.glob("step-*"))) == 3


# Several writers.


def test_of_many_that_begin_at_once_one_writes(tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()
    children = []
    for number in range(8):
        child = os.fork()
        if child == 0:
            outcome = b"?"
            try:
                os.close(go[1])
                os.read(go[0], 1)  # they all begin when it is closed
                ckpts = CheckpointManager(tmp_path)
                try:
                    ckpts.save(params(number), step=1)
                    outcome = b"w"
                except LockedError:
                    outcome = b"l"
            finally:
                os.write(ready[1], outcome)
                signal.alarm(60)
                signal.pause()
        children.append(child)
    try:
        os.close(go[1])
        outcomes = b"".join(os.read(ready[0], 1) for _ in children)
        assert sorted(outcomes) == sorted(b"wlllllll")
        with pytest.raises(LockedError, match="pid"):
            CheckpointManager(tmp_path).save(params(), step=2)
        assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for descriptor in (*ready, go[0]):
            os.close(descriptor)
    with CheckpointManager(tmp_path) as ckpts:
        ckpts.save(params(), step=2)


SAVE = "import sys, numpy as np, polyckpt; polyckpt.CheckpointManager(sys.argv[1]).save({'w': np.ones(3)}, step=9)"


def test_a_forked_child_that_closes_the_manager_frees_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpts:
        ckpts.save(params(), step=1)
        child = os.fork()
        if child == 0:
            ckpts.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        done = run_python(SAVE, tmp_path)
        assert done.returncode == 1 and f'"pid":{os.getpid()}' in done.stderr
        ckpts.save(params(), step=2)
    assert run_python(SAVE, tmp_path).returncode == 0


# Saving in the background, and being interrupted.


def test_memory_does_not_grow_from_save_to_save(tmp_path: Path) -> None:
    model = {name: np.zeros(100_000) for name in "abc"}
    size_bytes = 3 * 800_000
    with CheckpointManager(tmp_path, async_save=True, keep_last=1) as ckpts:
        tracemalloc.start()
        try:
            peaks = []
            for step in range(1, 31):
                tracemalloc.reset_peak()
                ckpts.save(model, step=step)
                peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert max(peaks) < 1.1 * size_bytes + 500_000, "there is more than one copy"
    assert max(peaks[5:]) < peaks[4] + 200_000, peaks


def test_a_save_interrupted_by_the_user_is_as_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path, monitor="loss") as ckpts:
        tell(ckpts, 2)
        with monkeypatch.context() as patch:

            def interrupted(*_: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(os, "rename", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tell(ckpts, 1, first=2)
        assert [(record.epoch, record.name) for record in ckpts.records] == [(1, "step-00000010"), (2, None)]
        assert epochs(ckpts) == [1] and ckpts.best and (ckpts.best.epoch, ckpts.best.name) == (2, None)
        tell(ckpts, 1.5, first=3)
        assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-00000010", "step-00000030"]


def test_a_signal_during_a_background_save_waits_for_it_and_saves_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), Snapshot.write

    def write(self: Snapshot, *arguments: Any, **keywords: Any) -> None:
        assert gate.wait(30)
        real(self, *arguments, **keywords)

    monkeypatch.setattr(Snapshot, "write", write)
    ckpts = CheckpointManager(tmp_path, async_save=True, every=Every(steps=5), preemption=[signal.SIGUSR1])
    try:
        ckpts.save(params(5), step=5)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ckpts.reached_preemption(6) and not list(tmp_path.glob("step-*"))
        threading.Timer(0.2, gate.set).start()
        with pytest.raises(SystemExit) as caught:
            ckpts.save(params(6), step=6)
        assert caught.value.code == 128 + signal.SIGUSR1
    finally:
        gate.set()
        ckpts.close()
    assert [value(polyckpt.load(tmp_path / f"step-0000000{step}", params())) for step in (5, 6)] == [5, 6]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


TWICE = """
import os, signal, sys, time, numpy as np, polyckpt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
ckpts = polyckpt.CheckpointManager(sys.argv[1], preemption=[signal.SIGTERM, signal.SIGINT])
print("ready", flush=True)
for _ in range(3000):
    time.sleep(0.01)
    if ckpts.reached_preemption():
        print("asked", flush=True)
        time.sleep(30)
"""


def test_a_second_interrupt_ends_a_process_that_does_not_come_to_save(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", TWICE, str(tmp_path)], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
