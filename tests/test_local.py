from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt import checkpoint as checkpoint_module
from polyckpt.errors import CheckpointExistsError, StorageError
from polyckpt.storage import local
from polyckpt.storage.tensor_file import TensorFileReader
from tests.sealing import REPOSITORY, run_python, save_small

# Interrupted saves


def survey(directory: Path, action: str, flags: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.interrupted", str(directory / "s"), action, flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    last = findings.pop()
    assert (last["status"], last["target"], last["there"]) == (0, 2.0, ["earlier", "target"])
    assert len(findings) >= 20, "the steps were not seen"
    return findings


@pytest.mark.parametrize("flags", ["", "overwrite", "overwrite,plain"])
def test_a_kill_at_any_step_leaves_every_checkpoint_whole(flags: str, tmp_path: Path) -> None:
    findings = survey(tmp_path, "kill", flags)
    before = 1.0 if flags else "NotACheckpointError"
    outcomes = [finding["target"] for finding in findings]
    assert outcomes == sorted(outcomes, key=lambda found: found == 2.0)  # the old one up to some step, the new one from it on
    for finding in findings:
        assert finding["status"] == -9
        assert finding["target"] in (before, 2.0)
        assert finding["earlier"] == 1.0
        assert len(finding["there"]) <= 3  # at most one leftover
        assert (finding["next"], finding["there_next"]) == (3.0, ["earlier", "target"])
    assert {before, 2.0} == set(outcomes)
    assert any(name.startswith(".polyckpt-tmp-") for finding in findings for name in finding["there"])


@pytest.mark.parametrize(
    ("action", "flags"), [("ENOSPC", ""), ("ENOSPC", "overwrite"), ("EIO", "overwrite"), ("EIO", "overwrite,plain")]
)
def test_a_failing_disk_leaves_every_checkpoint_whole_and_no_junk(action: str, flags: str, tmp_path: Path) -> None:
    before = 1.0 if flags else "NotACheckpointError"
    there = ["earlier", "target"] if flags else ["earlier"]
    findings = survey(tmp_path, action, flags)
    for finding in findings:
        assert finding["status"] == 3
        assert finding["earlier"] == 1.0
        if finding["target"] == 2.0:  # the sync of the parent failed, after the commit
            assert set(finding["there"]) - {".target.polyckpt-replaced"} == {"earlier", "target"}
        elif "plain" in flags and finding["there"] != there:
            # Even the way back was refused: the old one stands under its other name, where it is found.
            assert (finding["target"], finding["there"]) == (before, [".target.polyckpt-replaced", "earlier"])
        else:
            assert (finding["target"], finding["there"]) == (before, there)
        assert (finding["next"], finding["there_next"]) == (3.0, ["earlier", "target"])


def test_a_failed_last_rename_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_small(tmp_path / "c", 1.0)
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if Path(target) == path and ".polyckpt-tmp-" in str(source) and not path.exists():
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(local, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match="broken"):
        save_small(path, 2.0, overwrite=True)
    assert os.listdir(tmp_path) == ["c"]
    assert (polyckpt.inspect(path).weights["w"] == 1).all()


LIMITED = """
import errno, resource, sys, numpy as np, polyckpt
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    polyckpt.save(sys.argv[1], {"w": np.ones(100_000), "v": np.ones(100_000)}, overwrite=True)
except polyckpt.StorageError as error:
    sys.exit(7 if error.errno == errno.EFBIG else 8)
"""


@pytest.mark.parametrize("limit", [0, 1, 100, 4096, 800_100, 1_600_000])
def test_a_real_limit_of_the_system(limit: int, tmp_path: Path) -> None:
    path = save_small(tmp_path / "c", 1.0)
    done = run_python(LIMITED, path, limit)
    assert done.returncode == 7, done.stderr
    assert os.listdir(tmp_path) == ["c"]
    polyckpt.inspect(path).verify()
    assert run_python(LIMITED, path, 1 << 30).returncode == 0
    assert polyckpt.inspect(path).weights["w"].shape == (100_000,)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a tmpfs of 1 MiB; where mounting is not permitted /dev/full gives the same error to the write."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode == 0
    if not mounted:
        with pytest.raises(StorageError) as caught:
            local_write_to_full()
        assert caught.value.errno == errno.ENOSPC
        return
    try:
        path = save_small(disk / "c", 1.0)
        with pytest.raises(StorageError, match="No space left") as caught:
            polyckpt.save(path, {"w": np.ones(1 << 20)}, overwrite=True)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(StorageError, match="No space left"):
            polyckpt.save(disk / "d", {"w": np.ones(1 << 20)})
        assert os.listdir(disk) == ["c"]
        assert (polyckpt.inspect(path).weights["w"] == 1).all()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def local_write_to_full() -> None:
    try:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        raise StorageError(error.errno, str(error)) from error


# Neighbours

HOLD = """
import sys, threading, numpy as np
from polyckpt.storage import local
from pathlib import Path
with local.replacing(Path(sys.argv[1]), overwrite=False) as directory:
    local.write_file(directory / "manifest.json", b"{}")
    print(directory, flush=True)
    sys.stdin.readline()
"""


def test_a_living_neighbours_directory_stays_and_a_dead_ones_goes(tmp_path: Path) -> None:
    children = []
    for name in "ab":
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        children.append((child, Path(child.stdout.readline().strip())))
    (living, living_directory), (dead, dead_directory) = children
    dead.kill()
    dead.wait()
    assert dead_directory.exists()
    save_small(tmp_path / "c")
    assert not dead_directory.exists()
    assert living_directory.exists()
    living.communicate("go\n")
    assert living.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]


def test_leftovers_that_are_no_directories_do_no_harm(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / ".polyckpt-tmp-link").symlink_to(elsewhere)
    (runs / ".polyckpt-tmp-file").write_text("x")
    os.mkfifo(runs / ".polyckpt-tmp-fifo")
    save_small(runs / "c")
    assert (elsewhere / "precious").read_text() == "x"


@pytest.mark.parametrize("overwrite", [False, True])
def test_concurrent_saves_to_one_target(overwrite: bool, tmp_path: Path) -> None:
    outcomes: list[Any] = []

    def work(value: int) -> None:
        try:
            outcomes.append(polyckpt.save(tmp_path / "c", {"w": np.full(1000, float(value))}, overwrite=overwrite))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [outcome for outcome in outcomes if isinstance(outcome, CheckpointExistsError)]
    assert len(refused) == (0 if overwrite else 7), outcomes
    assert len(outcomes) - len(refused) == (8 if overwrite else 1)
    assert os.listdir(tmp_path) == ["c"]
    assert len(np.unique(polyckpt.inspect(tmp_path / "c").weights["w"])) == 1


def test_a_reader_sees_one_checkpoint_while_others_replace_it(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "c", {"w": np.full(9, 0.0)}, step=0)
    done = threading.Event()

    def write() -> None:
        for value in range(1, 60):
            polyckpt.save(path, {"w": np.full(9, float(value))}, step=value, overwrite=True)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while not done.is_set():
        checkpoint = polyckpt.inspect(path)
        seen.add(checkpoint.manifest.progress.step)
        assert set(checkpoint.weights["w"]) == {float(checkpoint.manifest.progress.step)}
    thread.join()
    assert len(seen) > 1


@pytest.mark.parametrize("shape", [9, 100])
def test_a_checkpoint_replaced_while_it_is_opened(shape: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is another one by then: of the same size, so that only the bytes tell, or of another."""
    path = polyckpt.save(tmp_path / "c", {"w": np.zeros(9)}, step=0)
    real, replaced = TensorFileReader, []

    def replace_first(*arguments: Any) -> TensorFileReader:
        if not replaced:
            replaced.append(polyckpt.save(path, {"w": np.ones(shape)}, step=1, overwrite=True))
        return real(*arguments)

    monkeypatch.setattr(checkpoint_module, "TensorFileReader", replace_first)
    checkpoint = polyckpt.inspect(path)
    assert checkpoint.manifest.progress.step == 1
    assert checkpoint.weights["w"].tolist() == [1] * shape


def test_everything_is_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def record_sync(descriptor: int) -> None:
        calls.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_rename(source: Any, target: Any) -> None:
        calls.append(("rename", os.path.basename(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    save_small(tmp_path / "made" / "c")
    temporary = next(name for kind, name in calls if name.startswith(".polyckpt-tmp-"))
    assert calls == [
        ("sync", tmp_path.name),  # of the parent that was made
        ("sync", "weights.safetensors"),
        ("sync", "optimizer.safetensors"),
        ("sync", "state.safetensors"),
        ("sync", "manifest.json"),
        ("sync", temporary),
        ("rename", "c"),
        ("sync", "made"),
    ]


def test_only_the_time_between_two_renames_needs_the_other_name(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c", 1.0)
    path.rename(tmp_path / ".c.polyckpt-replaced")
    assert (polyckpt.inspect(path).weights["w"] == 1).all()
    with pytest.raises(CheckpointExistsError):
        save_small(path, 2.0)
    assert os.listdir(tmp_path) == ["c"]


def test_a_save_blocks_for_no_lock(tmp_path: Path) -> None:
    """A leftover that another process keeps locked is left alone at once."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child.stdout.readline()
    started = time.monotonic()
    save_small(tmp_path / "c")
    assert child.poll() is None
    assert time.monotonic() - started < 30
    child.communicate("go\n")
