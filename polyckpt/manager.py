"""CheckpointManager: what a training loop calls. It keeps no state that is not on disk."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import secrets
import signal
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from polyckpt import api, schema, snapshot
from polyckpt.background import Background
from polyckpt.errors import CorruptError, LockedError, NotACheckpointError, PolicyError, RunError, StorageError
from polyckpt.history import FAILED, History
from polyckpt.policy import EarlyStopping, Keep, Record, When
from polyckpt.preemption import Preemption
from polyckpt.rules import Rules
from polyckpt.run import Run, read, where
from polyckpt.scalars import Scalar, count
from polyckpt.staging import Staging
from polyckpt.storage import local
from polyckpt.storage.run_directory import ABANDONED, CORRUPT, RunDirectory

logger = logging.getLogger("polyckpt")


@dataclass(frozen=True, kw_only=True)
class Start(api.Restored):
    """Where training goes on, as `restore` of a manager found it: epoch and step are 0 where nothing says more."""

    epoch: int
    step: int


class CheckpointManager:
    """The checkpoints of one run in one directory: when to save, what is best, what to keep, when to stop.

    >>> import numpy as np, polyckpt, tempfile
    >>> directory = tempfile.mkdtemp() + "/run"
    >>> params = {"w": np.zeros(3)}
    >>> with polyckpt.CheckpointManager(directory, monitor="val_loss", keep_best=1, keep_last=1, patience=2) as ckpts:
    ...     start = ckpts.restore(params)  # the newest checkpoint that verifies, or a fresh start
    ...     params = start.model
    ...     for epoch, loss in enumerate([0.5, 0.3, 0.4, 0.6, 0.7], start.epoch):
    ...         params["w"] += 1
    ...         _ = ckpts.save(params, epoch=epoch + 1, metrics={"val_loss": loss})
    ...         if ckpts.should_stop:
    ...             break
    ...     [record.epoch for record in ckpts.checkpoints], ckpts.best.epoch
    ([2, 4], 2)
    >>> polyckpt.load(directory + "/best", params).model["w"]
    array([2., 2., 2.])
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        monitor: str | None = None,
        mode: str = "auto",
        keep_best: int | None = None,
        keep_last: int | None = 3,
        keep: Iterable[Keep] | Keep = (),
        every: When | None = None,
        patience: int | None = None,
        min_delta: float = 0.0,
        early_stopping: EarlyStopping | None = None,
        missing: Literal["error", "warn"] = "error",
        async_save: bool = False,
        store: str | None = None,
        link_unchanged: bool = False,
        preemption: bool | Iterable[signal.Signals] = False,
    ) -> None:
        """Nothing is read or written yet.

        monitor, mode: the metric by which a checkpoint is best, and whether less ("min") or more ("max") of it is better;
        "auto" goes by its name, and logs which way. keep_best: how many of the best are kept, by default 1 where there is a
        monitor. keep_last: how many of the newest, None for all. keep: further policies, such as BestBy("val_acc", keep=2) or
        KeepEvery(epochs=10); a checkpoint stays that any one of them keeps. every: which calls of `save` save; by default
        all. patience, min_delta: short for early_stopping=EarlyStopping(patience, min_delta). missing: what a call does whose
        metrics lack one that is decided by. async_save: write in the background. store: as in polyckpt.save.
        link_unchanged: not to write again what has not changed since the checkpoint before, such as frozen weights: the file
        gets a hard link in the new one, so that both depend on the same bytes of the disk. preemption: True to save and exit
        where SIGTERM arrives, or the signals to do so.

        Raises PolicyError for what decides nothing, RunError for preemption outside the main thread.
        """
        self.directory = local.absolute(directory)
        self._rules = Rules.of(
            monitor=monitor,
            mode=mode,
            keep_best=keep_best,
            keep_last=keep_last,
            keep=keep,
            every=every,
            patience=patience,
            min_delta=min_delta,
            early_stopping=early_stopping,
        )
        if missing not in ("error", "warn"):
            raise PolicyError(f"missing={missing!r}: 'error' or 'warn'")
        if mode == "auto" and (best := self._rules.best_by):
            logger.info("%s: %s of it is better, by its name", best.metric, "less" if best.mode == "min" else "more")
        self._missing = missing
        self._async = async_save
        self._store = store
        self._links = link_unchanged
        self._staging = Staging()
        self._background = Background(f"polyckpt {self.directory.name}")
        self._files = RunDirectory(self.directory)
        self._history = History(self.directory)
        self._run = Run(self._rules, int(time.time()))
        self._restored: Record | None = None  # what was restored last, until something is added to the run
        self._read_only: Record | None = None  # what was restored as the last while another process wrote
        self._resumed = False  # whether its optimizer was restored too
        self._resumed_from: set[int] = set()  # what is not deleted as long as this process lives
        self._writing: Record | None = None
        self._failed: Record | None = None  # what was to be saved last, where that failed
        self._unmeasured_reported = False
        # A manager that is dropped without close(), as in a notebook, must not lock out the next one.
        weakref.finalize(self, _let_go, self._files, self._history)
        signals = () if preemption is False else (signal.SIGTERM,) if preemption is True else tuple(preemption)
        self._preemption = Preemption(signals) if signals else None
        if self._preemption is not None:
            weakref.finalize(self, self._preemption.restore)

    # What a loop asks.

    @property
    def checkpoints(self) -> tuple[Record, ...]:
        """The checkpoints that there are, the oldest first; `directory / name` is where each lies."""
        self._look()
        return self._run.checkpoints

    @property
    def best(self) -> Record | None:
        """The best of the run by `monitor`, of those too that were deleted or never saved (their name is None)."""
        self._look()
        best = self._run.state.best
        return best if best is not None and best == self._writing else self._run.best()

    @property
    def records(self) -> tuple[Record, ...]:
        """Every call of `save` that saved or measured something, the oldest first."""
        self._look()
        return tuple(self._run.records)

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        self._look()
        return self._run.state.patience.stopped

    def reached_preemption(self, step: int | None = None) -> bool:
        """Whether a signal asked the process to end; the next `save` then saves whatever the policy, and exits.

        step: for the log.
        """
        if self._preemption is None or self._preemption.signal is None:
            return False
        logger.warning("%s received%s", self._preemption.signal.name, "" if step is None else f" by step {step}")
        return True

    # What a loop does.

    def save(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        scheduler: Any = None,
        epoch: int | None = None,
        step: int | None = None,
        batch: int | None = None,
        metrics: Mapping[str, Scalar] | None = None,
        lr: Scalar | Iterable[Scalar] | None = None,
        extra: Mapping[str, Any] | None = None,
        probe: Any = None,
        apply: Callable[..., Any] | None = None,
        tx: Any = None,
        force: bool = False,
    ) -> Path | None:
        """Tell where training is, and save it if that is due; returns the path of the checkpoint, or None.

        The arguments are those of polyckpt.save; epoch or step is needed, and neither goes back unless an earlier checkpoint
        was restored: then those after it are set aside under names that begin with "abandoned-", as soon as something is
        saved or measured. metrics: None where nothing was measured. force: save whatever the policy.

        Metrics count for patience and for the best even where nothing is saved. The checkpoint is whole on disk before an
        older one is deleted. With async_save it is written after the call returns, and an error surfaces at the next call.
        Raises RunError, LockedError, PolicyError, UnsupportedError or StorageError; each leaves every checkpoint as it was.
        After a preemption signal it saves, then raises SystemExit with 128 and the signal's number.
        """
        preempted = self._preemption if self._preemption and self._preemption.signal else None
        try:
            self._surface(wait=preempted is not None)
        except Exception as error:
            if preempted is None:
                raise
            logger.error("an earlier save had failed: %s", error)  # what can still be saved comes first
        self._open()
        record, origin = self._receive(epoch, step, batch, metrics)
        if not (force or preempted or self._rules.due(self._run.before(record), record)):
            if record.metrics:
                self._add(record, origin)
            return None
        self._surface(wait=True)
        captured = snapshot.capture(
            model,
            optimizer,
            scheduler=scheduler,
            epoch=record.epoch,
            step=record.step,
            batch=record.batch,
            metrics=record.metrics,
            lr=lr,
            extra=extra,
            probe=probe,
            apply=apply,
            tx=tx,
        )
        if self._async and not preempted:
            captured.stage(self._staging)
        record = self._add(
            record, origin, name=f"epoch-{record.epoch:08d}" if record.step is None else f"step-{record.step:08d}"
        )
        assert record.name is not None
        path = self.directory / record.name
        self._writing = record
        job = functools.partial(self._commit, captured, record)
        if self._async and not preempted:
            self._background.submit(job)
        else:
            try:
                job()
            except BaseException:
                self._forget_failed()
                raise
        if preempted:
            logger.warning("%s ends the process with code %d", path, preempted.exit_code)
            self._finish()
            raise SystemExit(preempted.exit_code)
        return path

    def restore(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        step: int | Literal["last", "best"] = "last",
        scheduler: Any = None,
        extra: Mapping[str, Any] | None = None,
        strict: bool = True,
        verify: bool = True,
        rng: bool | None = None,
    ) -> Start:
        """Load a checkpoint into live objects; the arguments and the result are those of polyckpt.load.

        step: "last" for the newest, where there is none a fresh start (epoch 0, step 0, the objects as they were given,
        checkpoint None); "best" by the monitored metric; or the step (where there are none, the epoch) of one. One that is
        damaged is reported in a warning, set aside under a name that begins with "corrupt-", and the next newest or next best
        is taken; where none is left whole, CorruptError is raised and nothing is moved.

        "last" makes this manager the run's only writer. Where another one is, a warning says so, and only `save` fails.
        """
        self._surface(wait=True)
        if step == "last":
            self._read_only = None
            try:
                self._open()
            except (LockedError, StorageError) as error:
                warnings.warn(f"read-only: {error}", stacklevel=2)
        self._look()
        load = functools.partial(
            api.load, model=model, optimizer=optimizer, scheduler=scheduler, extra=extra, strict=strict, verify=verify, rng=rng
        )
        errors: dict[str, Exception] = dict(self._run.damaged)
        for record in self._run.selected(step, str(self.directory)):
            assert record.name is not None
            try:
                restored = load(self.directory / record.name)
            except NotACheckpointError:
                if self._files.claimed:
                    raise
                # The writer deleted it meanwhile, since there is a newer or a better one.
                return self.restore(
                    model, optimizer, step=step, scheduler=scheduler, extra=extra, strict=strict, verify=verify, rng=rng
                )
            except (CorruptError, StorageError) as error:
                if isinstance(step, int) or not (isinstance(error, CorruptError) or error.errno == errno.EIO):
                    raise
                errors[record.name] = error
                continue
            self._report_damaged(errors, record)
            self._restored, self._resumed = record, restored.optimizer is not None
            if step == "last" and not self._files.claimed:
                self._read_only = record
            if step != "best":
                self._resumed_from.add(record.sequence)
            if self._files.claimed:
                with contextlib.suppress(StorageError):  # a full disk is no reason not to go on
                    self._history.event("restored", name=record.name)
                self._link()
            logger.info("restored %s (epoch %s, step %s)", self.directory / record.name, record.epoch, record.step)
            found = {each.name: getattr(restored, each.name) for each in fields(restored)}
            return Start(**{**found, "epoch": restored.epoch or 0, "step": restored.step or 0})
        if errors:
            listed = "\n  ".join(str(error) for error in errors.values())
            raise CorruptError(
                f"{self.directory}: none of its checkpoints can be loaded, and training must not begin anew unnoticed. "
                f"Repair one, or use another directory:\n  {listed}"
            )
        if step != "last":
            raise RunError(f"{self.directory}: {self._run.no_best()}")
        if self._run.others:
            listed = ", ".join(self._run.others[:5])
            warnings.warn(f"{self.directory}: a fresh start beside {listed}, which no manager wrote", stacklevel=2)
        if self._run.lost:
            listed = ", ".join(self._run.lost[-5:])
            warnings.warn(
                f"{self.directory}: a fresh start, although history.jsonl tells of {listed}, which are gone",
                stacklevel=2,
            )
        logger.info("%s: no checkpoint yet, a fresh start", self.directory)
        return _fresh(model, optimizer, scheduler, extra)

    def restore_best(self, model: Any, optimizer: Any = None, **options: Any) -> Start:
        """`restore(model, optimizer, step="best", **options)`; a warning says where a better one is no longer on disk."""
        self._surface(wait=True)
        best = self.best
        restored = self.restore(model, optimizer, step="best", **options)
        if best is not None and best.name is None:
            warnings.warn(
                f"{self.directory}: the best of the run, {where(best)}, is not on disk; the best that is was restored",
                stacklevel=2,
            )
        return restored

    def delete(self) -> None:
        """Delete every checkpoint of the run, its history and its links, and the directory where nothing else is in it.

        Checkpoints that were set aside stay, and so does what somebody is reading. The next `save` begins a new run.
        """
        self._surface(wait=True)
        self._open()
        self._restored = None
        self._resumed_from.clear()
        self._run.checkpoints = tuple(
            each for each in self._run.checkpoints if each.name in self._run.copies or not self._files.delete(each.name or "")
        )
        if not self._run.checkpoints:
            for link in ("last", "best"):
                self._files.link(link, None)
            self._history.close()
            self._files.remove(self._history.path)
            self._run = Run(self._rules, int(time.time()))
        self._files.release()

    def wait(self) -> None:
        """Wait until all is on disk. Raises the error of a background save."""
        self._surface(wait=True)

    def close(self) -> None:
        """Wait, let other managers write, and put back earlier signal handlers. Raises the error of a background save.

        Where a preemption signal came after the last `save`, the process ends now: SystemExit.
        """
        preempted = self._preemption
        self._finish()
        if preempted is not None and preempted.signal is not None:
            raise SystemExit(preempted.exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self._finish()
        except Exception as failed:
            error.add_note(f"polyckpt: the background save failed as well: {failed!r}")

    def __repr__(self) -> str:
        return f"<CheckpointManager {str(self.directory)!r}, best by {self._rules.best_by}>"

    # How it is done.

    def _finish(self) -> None:
        try:
            self._surface(wait=True)
        finally:
            _let_go(self._files, self._history)
            if self._preemption is not None:
                self._preemption.restore()
                self._preemption = None

    def _open(self) -> None:
        """Become the writer, and know what there is."""
        if self._files.claimed:
            return
        self._files.claim()
        try:
            self._look()
            self._run.id = self._run.id or secrets.token_hex(8)
            self._history.begin(self._run.id)
        except BaseException:
            self._files.release()
            raise

    def _look(self) -> None:
        """Read what lies on disk; the only writer knows it already."""
        if self._history.open:
            return
        self._run = read(self._files, self._history, self._rules, self._run.started)

    def _receive(
        self, epoch: int | None, step: int | None, batch: int | None, metrics: Mapping[str, Scalar] | None
    ) -> tuple[Record, Record | None]:
        """The record of a call of `save`, which is checked, and the checkpoint to which it goes back, if it does."""
        epoch, step, batch = count(epoch, "epoch"), count(step, "step"), count(batch, "batch")
        if epoch is None and step is None:
            raise RunError("pass epoch= or step=: how many are completed. Checkpoints are named and ordered by it")
        numbers = snapshot.numbers(metrics)
        problem = None if metrics is None else self._rules.missing(numbers)
        if problem and self._missing == "error":
            raise PolicyError(f"{problem}. Pass metrics=None where nothing was measured, or missing='warn' to the manager")
        if problem:
            warnings.warn(problem, stacklevel=3)
        if metrics is None and epoch and batch is None and not self._unmeasured_reported and self._rules.metrics:
            self._unmeasured_reported = True
            wanted = ", ".join(self._rules.metrics)
            warnings.warn(f"epoch {epoch} came without metrics, so it is no candidate by {wanted}", stacklevel=3)
        record = Record(sequence=1, time=int(time.time()), epoch=epoch, step=step, batch=batch, metrics=numbers)
        origin = self._run.went_back(record, self._restored, resumed=self._resumed, directory=str(self.directory))
        if origin is not None and origin == self._read_only:
            raise RunError(
                f"{self.directory}: another process went on to {where(self._run.records[-1])} after this one had restored "
                f"{where(origin)}, read-only. Call restore() again, or use another directory"
            )
        if origin is not None:
            return replace(record, sequence=origin.sequence + 1), origin
        last = self._run.records[-1] if self._run.records else None
        again = self._failed is not None and where(self._failed) == where(record)
        if last is None or again:
            return replace(record, sequence=last.sequence if last else 1), None
        return replace(record, sequence=last.sequence + 1), None

    def _add(self, record: Record, origin: Record | None, *, name: str | None = None) -> Record:
        """Note what was saved or measured, after going back to `origin`; returns it with the name it got."""
        if origin is not None:
            self._go_back(origin)
        record = replace(record, name=self._files.free_name(name) if name else None)
        self._history.add(record)
        self._run.add(record)
        self._restored = self._failed = self._read_only = None
        return record

    def _go_back(self, record: Record) -> None:
        """Go on from `record`, leaving what came after it."""
        for abandoned in [each for each in self._run.checkpoints if each.sequence > record.sequence]:
            assert abandoned.name is not None
            new = self._files.set_aside(abandoned.name, ABANDONED)
            self._history.event("abandoned", name=abandoned.name, now=new)
            logger.warning("went back to %s: %s is now %s", where(record), abandoned.name, new)
        self._run.cut(record.sequence)
        self._link()

    def _commit(self, captured: snapshot.Snapshot, record: Record) -> None:
        assert self._run.id is not None and record.name is not None
        run = schema.Run(id=self._run.id, sequence=record.sequence)
        path = self.directory / record.name
        last = self._run.checkpoints[-1].name if self._links and self._run.checkpoints else None
        captured.write(
            path,
            time=record.time,
            run=run,
            before_commit=self._history.sync,
            store=self._store,
            before=None if last is None else self.directory / last,
        )
        self._run.checkpoints = (*self._run.checkpoints, record)
        self._writing = None
        logger.info("saved %s", path)
        self._tidy()

    def _tidy(self) -> None:
        """Point the links to the newest and the best, and delete what no policy keeps."""
        self._link()
        kept = self._rules.retained(self._run.checkpoints)
        remaining = []
        for record in self._run.checkpoints:
            assert record.name is not None
            spared = record.sequence in kept | self._resumed_from or record.name in self._run.copies
            if spared or not self._files.delete(record.name):
                remaining.append(record)
            else:
                self._history.event("deleted", name=record.name)
                logger.info("deleted %s", self.directory / record.name)
        self._run.checkpoints = tuple(remaining)

    def _link(self) -> None:
        for link in ("last", "best") if self._rules.best_by else ("last",):
            first = next(iter(self._run.selected(link, "")), None)
            if not self._files.link(link, first.name if first else None):
                logger.warning("%s is no link of this run: left alone", self.directory / link)

    def _surface(self, *, wait: bool) -> None:
        """Raise the error of a background save that has failed."""
        try:
            if wait:
                self._background.wait()
            else:
                self._background.raise_error()
        except BaseException:
            if not self._background.busy:  # else the wait was interrupted, not the save
                self._forget_failed()
            raise

    def _forget_failed(self) -> None:
        """A save that failed is not a checkpoint, but what it measured counts."""
        if (failed := self._writing) is not None:
            self._writing = None
            self._failed = replace(failed, name=None)
            self._run.unsave(failed)
            with contextlib.suppress(StorageError):  # the error that there is says more
                self._history.event(FAILED, name=failed.name)

    def _report_damaged(self, errors: Mapping[str, Exception], taken: Record) -> None:
        for name, error in errors.items():
            now = "left where it is"
            if self._files.claimed:
                new = self._files.set_aside(name, CORRUPT)
                self._history.event("corrupt", name=name, now=new, error=str(error))
                now = f"kept aside as {new}"
            warnings.warn(f"skipped a damaged checkpoint, {now}: {error}. {where(taken)} was restored instead", stacklevel=3)
        if self._files.claimed and errors:
            self._run.drop(errors.keys())


def _let_go(files: RunDirectory, history: History) -> None:
    history.close()
    files.release()


def _fresh(model: Any, optimizer: Any, scheduler: Any, extra: Mapping[str, Any] | None) -> Start:
    return Start(
        epoch=0,
        step=0,
        batch=None,
        metrics={},
        lr=None,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        extra=dict(extra or {}),
        skipped=(),
        checkpoint=None,
    )
