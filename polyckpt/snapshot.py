"""A run at one moment: captured from live objects, then written as a checkpoint, at once or later."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyckpt import __version__, manifest, objects, parity, registry, residue, schema
from polyckpt.adapter import OptimizerCapture
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
    ) -> None:
        """Write the checkpoint `target`, whole or not at all.

        time: that of the save, in seconds since 1970; by default now. before_commit: called when all is written but not yet
        in place. Raises as polyckpt.save does.
        """
        saved_at = datetime.datetime.now(datetime.UTC) if time is None else datetime.datetime.fromtimestamp(time, datetime.UTC)
        with local.replacing(target, overwrite=overwrite) as directory:
            files, tensors = self.sections.write(directory, self.metadata)
            finished = schema.Manifest(
                **self.draft, saved_at_utc=saved_at.isoformat(timespec="seconds"), run=run, files=files, tensors=tensors
            )
            local.write_file(directory / manifest.FILE_NAME, manifest.encode(finished))
            before_commit()


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
    sections = Sections()
    aliases = sections.add_weights(captured.weights)
    adapters = {registry.HOST: registry.named(registry.HOST), adapter.name: adapter}
    native: dict[str, Any] = {"model": captured.native, "model_rng": captured.rng}
    optimized = None
    if parts.optimizer is not None:
        owner = registry.find(parts.optimizer) or adapter
        adapters[owner.name] = owner
        optimized = owner.capture_optimizer(parts.optimizer, captured)
        native["optimizer"] = {"adapter": owner.name, "state": optimized.native}
    if scheduler is not None:
        native["scheduler"] = objects.capture(scheduler, "scheduler")
    native["extra"] = {text(name, "extra"): objects.capture(value, f"extra {name!r}") for name, value in (extra or {}).items()}
    if probe is not None:
        arguments = parity.arguments_of(probe)
        native["probe"] = parity.encode(parity.Probe(arguments, parity.record(adapter, parts.model, arguments, apply)))
    native["rng"] = {name: tree for name, each in adapters.items() if (tree := each.capture_rng()) is not None}
    described = _describe_optimizer(optimized, sections) if optimized else None
    encoded = residue.encode(native, leaf=_encode_leaf, add_tensor=sections.add_state, path=())
    if lr is None and optimized:
        lr = optimized.learning_rate
    draft = {
        "format": schema.FORMAT_NAME,
        "version": manifest.VERSION,
        "producer": schema.Producer(
            library_version=__version__,
            adapter=adapter.name,
            versions={name: version for each in adapters.values() for name, version in each.versions().items()},
        ),
        "progress": schema.Progress(epoch=count(epoch, "epoch"), step=count(step, "step"), batch=count(batch, "batch")),
        "metrics": {name: schema.to_number(value) for name, value in numbers(metrics).items()},
        "learning_rate": learning_rate(lr),
        "model": schema.Model(type=captured.type, order=captured.order, layers=tuple(captured.layers), aliases=aliases),
        "optimizer": described,
        "native": encoded,
        "assumptions": tuple(captured.assumptions),
    }
    return Snapshot(draft, sections, captured.metadata)


def numbers(metrics: Mapping[str, Scalar] | None) -> dict[str, float]:
    """Metrics as Python numbers. Raises UnsupportedError, naming the metric that is none."""
    return {text(name, "metrics"): scalar(value, f"metrics[{name!r}]") for name, value in (metrics or {}).items()}


def _describe_optimizer(captured: OptimizerCapture, sections: Sections) -> schema.Optimizer:
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
    )


def _encode_leaf(value: Any) -> Leaf | residue.Constant | None:
    adapter = registry.by_class(value)
    return adapter.leaf(value) if adapter else None
