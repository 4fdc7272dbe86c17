"""Many processes and threads save, read and prune in one directory: no load is torn, and one writes at a time or is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polyckpt import CheckpointManager
from polyckpt.errors import RunError
from tests.managed import epochs, finished, params, tell
from tests.sealing import REPOSITORY


def test_eight_processes_of_eight_threads_in_one_directory(disk: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.many", str(disk), "--seconds", "3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "abandoned" not in done.stderr
    counts = json.loads(done.stdout)
    for what in ("saved in the run", "loaded run/last", "loaded run/best", "looked", "replaced", "loaded shared"):
        assert counts[what] > 2, counts
    assert counts["refused: another one writes"] > 5, counts


def test_who_restored_while_another_one_wrote_does_not_set_its_later_checkpoints_aside(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", 3)
    reader, writer = CheckpointManager(run, monitor="loss"), CheckpointManager(run, monitor="loss")
    with writer:
        writer.restore(params())
        with pytest.warns(UserWarning, match="read-only: .*another CheckpointManager"):
            assert reader.restore(params()).epoch == 1
        tell(writer, 2, 1, first=2)
    with reader:
        with pytest.raises(RunError, match=r"another process went on to epoch 3 step 30 .* had restored epoch 1 step 10"):
            tell(reader, 5, first=2)
        assert epochs(reader) == [1, 2, 3] and not list(run.glob("abandoned-*"))
        assert reader.restore(params()).epoch == 3
        tell(reader, 0.5, first=4)
        assert epochs(reader)[-1] == 4


def test_who_restored_while_another_one_wrote_nothing_more_goes_on(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", 3)
    reader, writer = CheckpointManager(run, monitor="loss"), CheckpointManager(run, monitor="loss")
    with writer:
        writer.restore(params())
        with pytest.warns(UserWarning, match="read-only"):
            reader.restore(params())
    with reader:
        tell(reader, 2, first=2)
        assert epochs(reader) == [1, 2]
