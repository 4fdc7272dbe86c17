"""One run: its records, the checkpoints that there are of it, and what follows from both. `read` finds it on disk."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from polyckpt import schema
from polyckpt.errors import CorruptError, RunError
from polyckpt.history import History
from polyckpt.policy import Record
from polyckpt.rules import Rules, State
from polyckpt.storage.run_directory import RunDirectory


@dataclass
class Run:
    """id: None before the first save. records: what was saved or measured, in order. checkpoints: those on disk, in order.

    damaged: checkpoints whose manifest cannot be read, with the error. others: names of checkpoints that no manager wrote.
    copies: names of those of the run that its history does not know: somebody made them. lost: names of checkpoints that the
    history tells of, where none is left. started: when the process looked.
    """

    rules: Rules
    started: int
    id: str | None = None
    records: list[Record] = field(default_factory=list)
    checkpoints: tuple[Record, ...] = ()
    damaged: Mapping[str, CorruptError] = field(default_factory=dict)
    others: Sequence[str] = ()
    copies: frozenset[str] = frozenset()
    lost: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.state: State = self.rules.fold(self.records, self.started)

    def add(self, record: Record) -> None:
        """What comes next; nothing from its sequence number on has happened."""
        if self.records and self.records[-1].sequence >= record.sequence:
            self.cut(record.sequence - 1)
        self.records.append(record)
        self.state = self.rules.update(self.state, record)

    def before(self, record: Record) -> State:
        """The state in which `record` comes."""
        if not self.records or self.records[-1].sequence < record.sequence:
            return self.state
        return self.rules.fold([each for each in self.records if each.sequence < record.sequence], self.started)

    def cut(self, sequence: int) -> None:
        """Nothing after `sequence` has happened."""
        self.checkpoints = tuple(each for each in self.checkpoints if each.sequence <= sequence)
        self._replace([each for each in self.records if each.sequence <= sequence])

    def drop(self, names: Collection[str]) -> None:
        """Some checkpoints are damaged. What came after the newest that is left is lost, as if the process had been killed."""
        self.checkpoints = tuple(each for each in self.checkpoints if each.name not in names)
        self.damaged = {}
        self.cut(max((each.sequence for each in self.checkpoints), default=0))

    def unsave(self, record: Record) -> None:
        """Saving `record` failed; what it measured counts all the same."""
        self._replace([replace(each, name=None) if each == record else each for each in self.records])

    def went_back(self, record: Record, restored: Record | None, *, resumed: bool, directory: str) -> Record | None:
        """The checkpoint that `record` follows where that is not the newest, because it was `restored`; else None.

        resumed: whether the optimizer was restored too. Raises RunError where the record follows nothing.
        """
        if not self.records:
            return None
        last = self.records[-1]
        # At the very place of the newest, training was repeated from an earlier one only if it was resumed there.
        back = _behind(record, last) or (resumed and not _ahead(record, last))
        if restored and restored.sequence < last.sequence and back and not _behind(record, restored):
            return restored
        if _behind(record, last):
            raise RunError(
                f"{directory}: {where(record)} cannot follow {where(last)}. Call restore() first to go on from the last "
                "checkpoint, restore(step=...) to go back to an earlier one, or use another directory"
            )
        return None

    def best(self) -> Record | None:
        """The best of all; its name is None where it is not on disk."""
        best = self.state.best
        return best if best is None or best in self.checkpoints else replace(best, name=None)

    def selected(self, step: int | str, directory: str) -> Sequence[Record]:
        """The checkpoints to try in turn for `step`: "last", "best" or a number. Raises RunError for another."""
        if step == "last":
            return self.checkpoints[::-1]
        if step == "best":
            return self.rules.ranked(self.checkpoints)
        try:
            wanted = operator.index(step)  # type: ignore[arg-type]
        except TypeError as error:
            raise RunError(f"step={step!r}: 'last', 'best' or a number") from error
        numbered = [(each.epoch if each.step is None else each.step, each) for each in self.checkpoints]
        if found := [each for number, each in numbered if number == wanted]:
            return found[-1:]
        raise RunError(f"{directory}: no checkpoint of step {step}; there are {[number for number, _ in numbered] or 'none'}")

    def no_best(self) -> str:
        """Why none is best."""
        if self.rules.best_by is None:
            return "no metric says what is best: make the manager with monitor="
        measured = sorted({name for each in self.checkpoints for name in each.metrics})
        return (
            f"none of its {len(self.checkpoints)} checkpoints has a finite {self.rules.best_by.metric!r}; "
            f"the metrics there are: {', '.join(measured) or 'none'}"
        )

    def _replace(self, records: list[Record]) -> None:
        self.records = records
        self.state = self.rules.fold(records, self.started)


def read(files: RunDirectory, history: History, rules: Rules, started: int) -> Run:
    """The run in a directory, as far as its newest checkpoint: what came after that is lost, and will be done again.

    Raises RunError where the directory holds checkpoints of another run alone.
    """
    told = history.read()
    found = files.scan(None if told.run is None else told.names)
    ids = {head.run.id for head in found.heads.values() if head.run}
    run = told.run or (ids.pop() if len(ids) == 1 else None)
    own = {name: head for name, head in found.heads.items() if head.run and head.run.id == run}
    if foreign := sorted(found.heads.keys() - own.keys()):
        listed = f"{files.path}: {', '.join(foreign[:5])}{', ...' if len(foreign) > 5 else ''}: of another run"
        if not own:
            raise RunError(f"{listed}, and none of this one. Load one with polyckpt.load(), or use another directory")
        warnings.warn(f"{listed}; left alone. Load them with polyckpt.load()", stacklevel=4)
    checkpoints: dict[int, Record] = {}
    for name, head in sorted(own.items(), key=lambda item: item[0] not in told.names):
        record = _record(name, head)
        checkpoints.setdefault(record.sequence, record)  # a second one is a copy that somebody made
    newest = max(checkpoints, default=0)
    if newest > (told.records[-1].sequence if told.records else 0):
        told = history.read()  # it was written to meanwhile, and had all of that before the checkpoint was there
    records = {record.sequence: record for record in told.records if record.sequence <= newest} | checkpoints
    return Run(
        rules=rules,
        started=started,
        id=run,
        records=[records[sequence] for sequence in sorted(records)],
        checkpoints=tuple(checkpoints[sequence] for sequence in sorted(checkpoints)),
        damaged={name: error for name, error in found.damaged.items() if name in told.names or told.run is None},
        others=found.others,
        copies=frozenset(own.keys() - told.names) if told.names else frozenset(),
        lost=() if own else sorted(told.names - {told.last}),
    )


def _behind(record: Record, other: Record) -> bool:
    """Whether `record` says less of epoch or step than `other`."""
    pairs = ((record.step, other.step), (record.epoch, other.epoch))
    return any(one is not None and two is not None and one < two for one, two in pairs)


def _ahead(record: Record, other: Record) -> bool:
    """Whether `record` says more of step, or where one has none of epoch, than `other`."""
    if record.step is not None and other.step is not None:
        return record.step > other.step
    return record.epoch is None or other.epoch is None or record.epoch > other.epoch


def where(record: Record) -> str:
    """Where training was, for people."""
    parts = ((name, getattr(record, name)) for name in ("epoch", "step", "batch"))
    return " ".join(f"{name} {value}" for name, value in parts if value is not None)


def _record(name: str, head: schema.Head) -> Record:
    assert head.run is not None
    return Record(
        sequence=head.run.sequence,
        time=int(datetime.fromisoformat(head.saved_at_utc).timestamp()),
        epoch=head.progress.epoch,
        step=head.progress.step,
        batch=head.progress.batch,
        metrics={metric: schema.from_number(number) for metric, number in head.metrics.items()},
        name=name,
    )
