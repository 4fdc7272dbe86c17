"""After a loss of power at any moment of a save, whatever the disk kept of what was not synced, nothing committed is lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from tests.faults.disk import Disk, File
from tests.sealing import REPOSITORY


def test_no_loss_of_power_loses_what_was_committed(disk: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.reordered", str(disk), "--samples", "1", "--every", "5"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["moments"] > 400 and counts["different states"] > 1000, counts


# The model itself: it must allow what a disk may do, and nothing else.


def left(disk: Disk) -> set[str]:
    """Every state that was found among many, as text."""
    rng = random.Random(0)
    return {repr(state.contents()) for _ in range(20) for state in disk.states(rng, 20)}


def written(*operations: tuple[object, ...]) -> Disk:
    disk = Disk()
    for operation in operations:
        disk.apply(operation)
    return disk


def test_what_was_not_synced_may_be_lost_torn_or_zero() -> None:
    file = [("create", "f"), ("write", "f", 0, b"ab"), ("sync", "")]
    contents = {b"", b"\0\0", b"a", b"ab"}
    assert left(written(*file)) == {repr(("directory", ("f", ("file", content)))) for content in contents}
    assert left(written(*file, ("sync", "f"))) == {repr(("directory", ("f", ("file", b"ab"))))}


def test_a_name_is_certain_once_its_directory_is_synced() -> None:
    made = [("mkdir", "a"), ("create", "a/f"), ("sync", "a")]
    assert left(written(*made)) == {"('directory',)", repr(("directory", ("a", ("directory", ("f", ("file", b""))))))}
    assert len(left(written(*made, ("sync", "")))) == 1


def test_a_rename_and_an_exchange_are_whole_and_may_be_overtaken() -> None:
    disk = written(("create", "a"), ("create", "b"), ("write", "a", 0, b"1"), ("write", "b", 0, b"2"))
    disk.sync_all()
    one, two = ("file", b"1"), ("file", b"2")
    before = ("directory", ("a", one), ("b", two))
    disk.apply(("exchange", "a", "b"))
    swapped = ("directory", ("a", two), ("b", one))
    assert left(disk) == {repr(before), repr(swapped)}
    disk.apply(("unlink", "b"))
    assert left(disk) == {repr(before), repr(swapped), repr(("directory", ("a", one))), repr(("directory", ("a", two)))}
    disk.apply(("sync", ""))
    assert left(disk) == {repr(("directory", ("a", two)))}


def test_a_file_that_is_cut_or_written_beyond_its_end_reads_as_a_system_has_it() -> None:
    file = File(b"abcdef", [(2, None), (4, b"x")])
    assert file.with_writes(file.pending) == b"ab\0\0x"
