"""The history file: only appended to, every line checked, torn and damaged lines left out."""

from __future__ import annotations

import math
import os
import tracemalloc
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyckpt.errors import StorageError
from polyckpt.history import FILE_NAME, History, Told
from polyckpt.policy import Record
from polyckpt.storage import local


def record(sequence: int, name: str | None = None, **metrics: float) -> Record:
    return Record(sequence=sequence, time=60 * sequence, epoch=sequence, step=10 * sequence, metrics=metrics, name=name)


def written(directory: Path, *records: Record) -> bytes:
    history = History(directory)
    history.begin("a1")
    for each in records:
        history.add(each)
    history.close()
    return history.path.read_bytes()


def test_what_was_added_is_read(tmp_path: Path) -> None:
    assert History(tmp_path).read() == Told(None, (), frozenset())
    records = (record(1, "c1", loss=0.5), record(2, None, loss=math.inf), Record(sequence=3, time=1, epoch=1, batch=4))
    written(tmp_path, *records)
    told = History(tmp_path).read()
    assert (told.run, told.records, told.names) == ("a1", records, {"c1"})


def test_nan_is_kept(tmp_path: Path) -> None:
    written(tmp_path, record(1, loss=math.nan))
    assert math.isnan(History(tmp_path).read().records[0].metrics["loss"])


def test_a_run_that_went_back_is_told_as_it_went_on(tmp_path: Path) -> None:
    written(tmp_path, record(1, "c1"), record(2, "c2"), record(3, "c3"), record(2, "d2"))
    told = History(tmp_path).read()
    assert [each.name for each in told.records] == ["c1", "d2"]
    assert told.names == {"c1", "c2", "c3", "d2"}, "every checkpoint that was ever made is known"


def test_events_and_a_later_begin_change_nothing(tmp_path: Path) -> None:
    written(tmp_path, record(1, "c1"))
    history = History(tmp_path)
    history.begin("b2")
    history.event("deleted", name="c1")
    history.close()
    assert History(tmp_path).read() == Told("a1", (record(1, "c1"),), frozenset({"c1"}), "c1")


@pytest.mark.parametrize("keep", [1, 20, -1, -2, -30])
def test_a_torn_last_line_is_left_out_and_removed(tmp_path: Path, keep: int) -> None:
    whole = written(tmp_path, record(1, "c1"))
    both = written(tmp_path, record(2, "c2"))
    path = tmp_path / FILE_NAME
    last = both[len(whole) :]
    path.write_bytes(whole + last[:keep])
    assert History(tmp_path).read().records == (record(1, "c1"),)
    written(tmp_path, record(2, "d2"))
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 3
    assert History(tmp_path).read().records == (record(1, "c1"), record(2, "d2"))


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_damaged_line_is_never_believed(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    directory = tmp_path_factory.mktemp("h")
    records = [record(i, f"c{i}", loss=i / 3) for i in range(1, 6)]
    data = bytearray(written(directory, *records))
    data[position % len(data)] ^= 1 << bit
    (directory / FILE_NAME).write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = History(directory).read()
    if data.endswith(b"\n"):
        assert "damaged and left out" in str(caught[0].message)
    assert set(told.names) <= {each.name for each in records}
    assert all(each in records for each in told.records)
    assert len(told.records) >= 3


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(tmp_path)
    history.begin("a1")
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    with pytest.raises(StorageError, match="no space left"):
        history.add(record(1))
    monkeypatch.undo()
    history.add(record(1, "c1"))
    history.close()
    assert History(tmp_path).read().records == (record(1, "c1"),)


@pytest.mark.parametrize("block", [1, 7, 100, 10_000])
def test_lines_come_out_whole_wherever_blocks_end(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tuple(record(i, f"c{i}", loss=i / 3) for i in range(1, 9))
    data = written(tmp_path, *records)
    path = tmp_path / FILE_NAME
    path.write_bytes(data + b"torn")
    monkeypatch.setattr(local, "_BLOCK_BYTES", block)
    assert History(tmp_path).read().records == records
    written(tmp_path)  # cuts it
    assert path.read_bytes() == data
    path.write_bytes(b"no line at all")
    assert written(tmp_path, *records) == data


def test_a_history_of_garbage_takes_no_more_memory_than_a_line(tmp_path: Path) -> None:
    written(tmp_path, record(1, "c1"))
    with open(tmp_path / FILE_NAME, "ab") as file:
        file.write(b"\n" * 300_000)
        file.truncate(file.tell() + (1 << 28))  # zeros, without an end of a line
    tracemalloc.start()
    try:
        with pytest.warns(UserWarning, match=r"lines \[3, 4, 5, 6, 7, 8, 9, 10, 11, 12\] are damaged"):
            assert History(tmp_path).read().records == (record(1, "c1"),)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()
