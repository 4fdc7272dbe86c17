"""A run at one moment: captured from live objects, then written as a checkpoint, at once or later."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyckpt import __version__, collecting, manifest, objects, parity, registry, residue, schema
from polyckpt.adapter import Contents, OptimizerCapture
from polyckpt.checkpoint import Checkpoint
from polyckpt.errors import CheckpointError, StorageError
from polyckpt.heads import FILE_NAME, VERSION
from polyckpt.leaves import Leaf
from polyckpt.scalars import Scalar, count, learning_rate, scalar, text
from polyckpt.sections import Sections
from polyckpt.staging import Staging
from polyckpt.storage import local


@dataclass(frozen=True)
class Snapshot:
    """What `write` needs; until then, or until `stage`, its tensors are those of the live objects.

    draft: members of the manifest. metadata: for the header of the weights file.
    """

    draft: Mapping[str, Any]
    sections: Sections
    metadata: Mapping[str, str]

    def stage(self, staging: Staging) -> None:
        """Copy all tensors that training may change, so that `write` can run beside it."""
        self.sections.stage(staging)

    def write(
        self,
        target: Path,
        *,
        overwrite: bool = False,
        time: int | None = None,
        run: schema.Run | None = None,
        before_commit: Callable[[], None] = lambda: None,
        store: str | None = None,
        before: Path | None = None,
    ) -> None:
        """Write the checkpoint `target`, whole or not at all.

        store: as in polyckpt.save. before: a checkpoint whose files are linked where they hold what has not changed.
        time: that of the save, in seconds since 1970; by default now. before_commit: called when all is written but not yet
        in place. Raises as polyckpt.save does.
        """
        saved_at = datetime.datetime.now(datetime.UTC) if time is None else datetime.datetime.fromtimestamp(time, datetime.UTC)
        with local.replacing(target, overwrite=overwrite) as directory:
            where = self.sections.write(directory, self.metadata, store, None if before is None else _opened(before))
            finished = schema.Manifest(**self.draft, saved_at_utc=saved_at.isoformat(timespec="seconds"), run=run, **where)
            local.write_file(directory / FILE_NAME, manifest.encode(finished))
            before_commit()


@collecting.paused()
def capture(
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
) -> Snapshot:
    """Capture a run; the arguments are those of polyckpt.save. Raises UnsupportedError, naming what cannot be stored."""
    adapter = registry.adapter_for(model, "model")
    parts = adapter.parts(model, optimizer, tx)
    captured = adapter.capture_model(parts.model)
    adapters = {registry.HOST: registry.named(registry.HOST), adapter.name: adapter}
    owner, optimized = adapter, None
    if parts.optimizer is not None:
        owner = registry.find(parts.optimizer) or adapter
        adapters[owner.name] = owner
        optimized = owner.capture_optimizer(parts.optimizer, captured)
    recording = None
    if probe is not None:
        arguments = parity.arguments_of(probe)
        recording = parity.encode(parity.Probe(arguments, parity.record(adapter, parts.model, arguments, apply)))
    steps, epochs = count(step, "step"), count(epoch, "epoch")
    return compose(
        Contents(
            adapter=adapter.name,
            model=captured,
            optimizer=optimized,
            optimizer_adapter=owner.name,
            scheduler=None if scheduler is None else objects.capture(scheduler, "scheduler"),
            extra={text(name, "extra"): objects.capture(value, f"extra {name!r}") for name, value in (extra or {}).items()},
            probe=recording,
            rng={name: tree for name, each in adapters.items() if (tree := each.capture_rng()) is not None},
            epoch=epochs,
            step=steps,
            batch=count(batch, "batch"),
            metrics=numbers(metrics),
            learning_rate=lr,
            rates=_rates(optimized, scheduler, steps, epochs) if optimized else None,
            versions={name: version for each in adapters.values() for name, version in each.versions().items()},
        )
    )


def compose(contents: Contents) -> Snapshot:
    """The checkpoint that these contents make. Raises UnsupportedError, naming what cannot be stored."""
    sections = Sections()
    captured, optimized = contents.model, contents.optimizer
    aliases = sections.add_weights(captured.weights)
    native: dict[str, Any] = {"model": captured.native, "model_rng": captured.rng}
    if optimized is not None:
        native["optimizer"] = {"adapter": contents.optimizer_adapter or contents.adapter, "state": optimized.native}
    if contents.scheduler is not None:
        native["scheduler"] = contents.scheduler
    native["extra"] = contents.extra
    if contents.probe is not None:
        native["probe"] = contents.probe
    native["rng"] = contents.rng
    described = _describe_optimizer(optimized, sections, contents.rates) if optimized else None
    encoded = residue.encode(native, leaf=_encode_leaf, add_tensor=sections.add_state, path=())
    lr = contents.learning_rate
    if lr is None and optimized:
        lr = optimized.learning_rate
    draft = {
        "format": schema.FORMAT_NAME,
        "version": VERSION,
        "producer": schema.Producer(library_version=__version__, adapter=contents.adapter, versions=dict(contents.versions)),
        "progress": schema.Progress(epoch=contents.epoch, step=contents.step, batch=contents.batch),
        "metrics": {name: schema.to_number(value) for name, value in contents.metrics.items()},
        "learning_rate": learning_rate(lr),
        "model": schema.Model(type=captured.type, order=captured.order, layers=tuple(captured.layers), aliases=aliases),
        "optimizer": described,
        "native": encoded,
        "assumptions": tuple(captured.assumptions),
    }
    return Snapshot(draft, sections, captured.metadata)


def _opened(path: Path) -> Checkpoint | None:
    """A checkpoint, unless it is damaged: then there is nothing in it to link."""
    try:
        return Checkpoint(path, verify=False)
    except (CheckpointError, StorageError):
        return None


def numbers(metrics: Mapping[str, Scalar] | None) -> dict[str, float]:
    """Metrics as Python numbers. Raises UnsupportedError, naming the metric that is none."""
    return {text(name, "metrics"): scalar(value, f"metrics[{name!r}]") for name, value in (metrics or {}).items()}


_AHEAD = (*range(64), *(round(64 * 1.1**power) for power in range(1, 30)))
"""The updates, or calls of a scheduler, whose rates are stored: the next ones, and then ever fewer up to a thousand."""


def _rates(optimized: OptimizerCapture, scheduler: Any, step: int | None, epoch: int | None) -> schema.Rates | None:
    """The learning rates to come, where a schedule tells them."""
    step = optimized.step if optimized.step is not None else step
    if optimized.rates is not None and step is not None:
        return _stored_rates(_AHEAD, optimized.rates(np.array(_AHEAD) + step).tolist())
    owner = registry.find(scheduler) if scheduler is not None else None
    schedule = owner.schedule(scheduler) if owner else None
    if schedule is None or (per_call := updates_per_call(schedule.calls, step, epoch)) is None:
        return None
    values = list(itertools.islice(schedule.rates(), _AHEAD[-1] + 1))
    if len(values[0]) != len(optimized.groups):  # that of one of several optimizers
        return None
    calls = [ahead for ahead in _AHEAD if ahead < len(values)]
    return _stored_rates([ahead * per_call for ahead in calls], [values[ahead] for ahead in calls])


def updates_per_call(calls: int, step: int | None, epoch: int | None) -> int | None:
    """How many updates there are to a call of a scheduler, told by how often it was called; None where that tells nothing."""
    if not step or calls == step:
        return 1 if calls == (step or 0) else None
    return step // calls if calls and calls == epoch and step % calls == 0 else None


def _stored_rates(updates: Sequence[int], values: Sequence[Sequence[float]]) -> schema.Rates:
    return schema.Rates(updates=tuple(updates), values=tuple(tuple(map(schema.to_number, each)) for each in values))


def _describe_optimizer(captured: OptimizerCapture, sections: Sections, rates: schema.Rates | None) -> schema.Optimizer:
    slots = {}
    for slot, tensors in captured.slots.items():
        keys = {parameter: sections.add("optimizer", f"{slot}/{parameter}", leaf) for parameter, leaf in tensors.items()}
        slots[slot] = schema.Slot(meaning=captured.meanings.get(slot, "custom"), tensors=keys)
    return schema.Optimizer(
        type=captured.type,
        family=captured.family,
        conventions=dict(captured.conventions),
        groups=tuple(captured.groups),
        step=captured.step,
        slots=slots,
        rates=rates,
    )


def _encode_leaf(value: Any) -> Leaf | residue.Constant | None:
    adapter = registry.by_class(value)
    return adapter.leaf(value) if adapter else None
