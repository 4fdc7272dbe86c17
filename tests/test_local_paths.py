from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt.errors import CheckpointExistsError, NotACheckpointError, StorageError
from tests.sealing import run_python, save_small

# What may stand at the target


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    checkpoint = save_small(tmp_path / "real")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(checkpoint)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("mine")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "my site", "format": "polyckpt"}')
    os.mkfifo(tmp_path / "fifo")
    for name, said in (
        ("file", "a file"),
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("photos", "no checkpoint"),
        ("web", "no checkpoint"),
        ("fifo", "a file"),
    ):
        with pytest.raises(CheckpointExistsError, match=said):
            save_small(tmp_path / name, overwrite=True)
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        save_small(checkpoint)
    assert (tmp_path / "photos" / "1.jpg").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "fifo", "file", "link", "photos", "real", "web"]


def test_a_damaged_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c", 1.0)
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:200])
    save_small(path, 2.0, overwrite=True)
    polyckpt.inspect(path).verify()


def test_an_empty_directory_becomes_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    save_small(tmp_path / "c")
    polyckpt.inspect(tmp_path / "c").verify()


def test_parents_are_created_and_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = save_small(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(old)
    for directory in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


@pytest.mark.parametrize("parent", ["file", "file/deeper"])
def test_a_file_as_parent_is_a_storage_error(parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="not a directory"):
        save_small(tmp_path / parent / "c")


UNPRIVILEGED = """
import os, sys, tempfile, numpy as np, polyckpt
with tempfile.TemporaryDirectory() as warm:  # imports everything while the files of Python can still be read
    polyckpt.inspect(polyckpt.save(warm + "/c", {"w": np.ones(1)})).verify()
os.setgid(65534); os.setuid(65534)
action = {"save": lambda p: polyckpt.save(p, {"w": np.ones(1)}, overwrite=True), "load": polyckpt.inspect}[sys.argv[2]]
try:
    action(sys.argv[1])
except polyckpt.StorageError as error:
    print(error)
    sys.exit(7)
"""


def test_no_permission_is_a_storage_error(tmp_path: Path) -> None:
    assert os.getuid() != 0 or os.access(tmp_path, os.W_OK)
    base = tmp_path
    while base != base.parent:  # the directories of pytest are closed to others
        if base.owner() == tmp_path.owner() and len(base.parts) > 2:
            base.chmod(0o755)
        base = base.parent
    closed = save_small(tmp_path / "closed")
    code = UNPRIVILEGED if os.getuid() == 0 else UNPRIVILEGED.replace("os.setgid(65534); os.setuid(65534)", "")
    for path, mode, action in (
        (tmp_path / "new", 0o555, "save"),
        (closed, 0o555, "save"),
        (closed, 0o000, "load"),
    ):
        (tmp_path if action == "save" else closed).chmod(mode)
        done = run_python(code, path, action)
        (tmp_path if action == "save" else closed).chmod(0o755)
        assert done.returncode == 7, done.stderr
        assert "Permission denied" in done.stdout
        assert str(path) in done.stdout
    (closed / "weights.safetensors").chmod(0)
    done = run_python(code, closed, "load")
    assert done.returncode == 7, done.stderr
    (closed / "weights.safetensors").chmod(0o644)
    assert os.listdir(tmp_path) == ["closed"]
    polyckpt.inspect(closed).verify()


# Paths


def test_paths_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    monkeypatch.chdir(tmp_path)
    for given, there in (
        ("plain", "plain"),
        ("slash/", "slash"),
        ("./dot/./x", "dot/x"),
        (Path("object"), "object"),
        ("~", "~"),  # literally, as open() takes it
        ("link/../beside", "real/beside"),  # as the system resolves it
        ("made/../up", "up"),
        ("*[?]", "*[?]"),
        ("real/deep/../deep2", "real/deep2"),
        ("é \n", "é \n"),
    ):
        returned = save_small(given)
        assert returned.is_absolute()
        assert (tmp_path / there / "manifest.json").is_file()
        polyckpt.inspect(given).verify()
        polyckpt.inspect(returned).verify()


@pytest.mark.parametrize("given", [".", "", "./", "../c"])
def test_the_working_directory_is_never_replaced(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    with pytest.raises(CheckpointExistsError, match="the working directory"):
        save_small(given, overwrite=True)
    assert os.listdir(tmp_path / "c") == []


def test_the_working_directory_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(save_small(tmp_path / "c"))
    checkpoint = polyckpt.inspect(".")
    monkeypatch.chdir(tmp_path)
    checkpoint.verify()


def test_a_change_of_directory_during_a_save_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")

    class Moves:
        def state_dict(self) -> dict[str, int]:
            os.chdir(tmp_path / "b")
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    polyckpt.save("c", {"w": np.ones(1)}, extra={"m": Moves()})
    assert (tmp_path / "a" / "c" / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["nul\0l", "x" * 300])
def test_impossible_names_are_storage_errors(name: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        save_small(tmp_path / name)
    with pytest.raises(StorageError):
        polyckpt.inspect(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_what_is_there_instead_is_said(tmp_path: Path) -> None:
    for name in ("step-1", "step-2"):
        save_small(tmp_path / name)
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path, "it holds the checkpoints step-1, step-2"),
        (tmp_path / "nothing", "no such file"),
        (tmp_path / "file", "neither a checkpoint of polyckpt nor one of"),
    ):
        with pytest.raises(NotACheckpointError, match=said):
            polyckpt.inspect(path)


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    code = (
        "import os, sys, polyckpt, numpy as np\n"
        "os.mkdir('x'); os.chdir('x'); os.rmdir('../x')\n"
        "for action in (polyckpt.inspect, lambda p: polyckpt.save(p, {'w': np.ones(1)})):\n"
        "    try: action('c')\n"
        "    except polyckpt.StorageError as error: print(error)\n"
        f"polyckpt.save({str(tmp_path / 'c')!r}, {{'w': np.ones(1)}})"
    )
    done = run_python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("working directory of this process is gone") == 2
