"""What users call: save, load, inspect."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyckpt import collecting, conversion, objects, parity, plans, registry, residue, schema, snapshot
from polyckpt.adapter import NO_OPTIMIZER, Adapter, Parts, Restore, StoredModel, StoredOptimizer
from polyckpt.checkpoint import Checkpoint, check_all
from polyckpt.conversion import Report
from polyckpt.errors import CorruptError, MismatchError, Problem, UnsupportedError
from polyckpt.formats import opened, table, writing
from polyckpt.formats.described import Like
from polyckpt.names import type_name
from polyckpt.native import native_of
from polyckpt.plans import Plan
from polyckpt.scalars import Scalar, optional_number
from polyckpt.sides import Flatten
from polyckpt.storage import local

OURS = "polyckpt"
"""What `export` calls the format of checkpoints that `save` writes."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What `load` found.

    epoch: completed epochs; step: completed steps; batch: batches consumed of the epoch under way; each None where it was
    not saved. lr: the learning rate at the save, one per parameter group where there are several. model, optimizer,
    scheduler: the objects given to `load`, restored; new values where theirs are immutable (JAX). tx: the transformation that
    goes with the optimizer state, where one was given: another one with continuation="exact". extra: every value that
    was saved, and the objects that were given. skipped: with strict=False, what did not fit and was left alone.
    checkpoint: the opened checkpoint; None at a manager's fresh start. report: where the checkpoint was converted, item by
    item what became of it, and how the outputs compare.
    """

    epoch: int | None
    step: int | None
    batch: int | None
    metrics: dict[str, float]
    lr: float | tuple[float, ...] | None
    model: Any
    optimizer: Any
    scheduler: Any
    extra: dict[str, Any]
    skipped: tuple[Problem, ...]
    checkpoint: Checkpoint | None
    report: Report | None = None
    tx: Any = None


def save(
    path: str | os.PathLike[str],
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
    overwrite: bool = False,
    store: str | None = None,
) -> Path:
    """Save a training run as the directory `path`, whole or not at all; returns its absolute path.

    model: a torch module, Keras model, nnx module, flax TrainState, or any pytree or dict of arrays. optimizer: its
    optimizer or optimizer state; by default the one that the model carries, False to leave that out. scheduler: a learning
    rate schedule with state. epoch, step: completed so far. batch: batches consumed of the epoch under way, where the save
    is in the middle of one. metrics: name -> number, NaN allowed. lr: by default that of the optimizer, where it holds one.
    extra: name -> any further object with state (loss scaler, EMA, generator) or any value of JSON and arrays.
    probe: a small batch (an array, or a tuple of the arguments of the model), stored with what the model makes of it: what
    proves a conversion into another framework right. apply: how a model that is no function is called, as apply(model, batch).
    tx: the optax transformation that a bare optimizer state is of, which says what the state is; a TrainState or nnx.Optimizer
    has it. store: "orbax" to have orbax-checkpoint write weights and slots, sharded arrays shard by shard, into the directory
    `arrays`, which Orbax restores by itself too. overwrite: whether a checkpoint that is there already is replaced; the old one
    stays until the new one is whole.

    The random states of Python, NumPy and the framework are saved too. Training goes on as if nothing had been saved.

    Raises CheckpointExistsError, UnsupportedError (naming what cannot be stored and why) or StorageError; after each of
    them everything that was on disk is still there.

    >>> import numpy as np, polyckpt, tempfile
    >>> path = polyckpt.save(tempfile.mkdtemp() + "/step-7", {"w": np.ones(3)}, step=7, metrics={"loss": 0.5})
    >>> polyckpt.load(path, {"w": np.zeros(3)}).model["w"]
    array([1., 1., 1.])
    """
    target = local.absolute(path)
    captured = snapshot.capture(
        model,
        optimizer,
        scheduler=scheduler,
        epoch=epoch,
        step=step,
        batch=batch,
        metrics=metrics,
        lr=lr,
        extra=extra,
        probe=probe,
        apply=apply,
        tx=tx,
    )
    captured.write(target, overwrite=overwrite, store=store)
    return target


def load(
    path: str | os.PathLike[str],
    model: Any,
    optimizer: Any = None,
    *,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    strict: bool = True,
    verify: bool = True,
    rng: bool | None = None,
    rules: Mapping[str, str] | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    cast: bool = False,
    probe_axes: str | Sequence[str | None] | None = None,
    tolerance: float | None = None,
    accept: Collection[str] = (),
    apply: Callable[..., Any] | None = None,
    tx: Any = None,
    continuation: Literal["stock", "exact"] = "stock",
    like: Any = None,
    format: str | None = None,
) -> Restored:
    """Restore the checkpoint `path` into live objects, of the framework that wrote it or of another.

    path: a checkpoint that `save` wrote, or a file or directory in a format of others, which its content tells (format: the
    name of one, where it does not). like: for such a file that is to be converted, a model of the framework that wrote it, with
    its names: it says what the tensors are, and nothing is written to it.

    model, optimizer, scheduler, extra: as given to `save`; for immutable JAX values templates (arrays or
    ShapeDtypeStructs), and the restored ones are in the result. Without an optimizer only weights are loaded. strict: with
    False, load the entries that fit and report the rest in `.skipped`. verify: compare all bytes that are read with their
    checksums first. rng: restore random states; by default where an optimizer is restored.

    Into a model of another framework (or one whose names are all others) weights are converted: layers are paired by kind,
    shape, names and order, layouts are turned, and where the checkpoint holds a probe the model is run on it and must compute
    the same. What cannot be told is refused. rules: path in the checkpoint -> path in the model, for what names do not say;
    `{name}` stands for any part of a path. plan: a Plan, or the file of one. cast: also round to narrower types. probe_axes:
    how the model wants the probe's axes ("b c h w -> b h w c"), by default read off both. tolerance: of the outputs, relative,
    by default 1e-5 in float32. accept: evidence that suffices where there is no probe: {"names and order"}. apply: how a model
    that is no function is called, as apply(model, batch). `report` in the result says what became of each tensor.

    Everything is compared and verified before anything is written. Raises MismatchError, listing every entry that is
    missing, unexpected, of another shape or type; AmbiguityError and ParityError, which are kinds of it; PlanError;
    NotACheckpointError, CorruptError, VersionError or StorageError.
    """
    adapter = registry.adapter_for(model, "model")
    checkpoint = _open(path, verify, like, format, model, optimizer, tx)
    options = conversion.Options(
        rules=rules,
        pairs=_pairs(plan),
        strict=strict,
        verify=verify,
        cast=cast,
        probe_axes=probe_axes,
        tolerance=tolerance,
        accept=accept,
        apply=apply,
        continuation=continuation,
    )
    native = native_of(checkpoint)
    parts = adapter.parts(model, optimizer, tx)
    convert = functools.partial(_convert, checkpoint, native, adapter, model, optimizer, tx, scheduler, extra or {}, options)
    if rules or plan is not None or checkpoint.manifest.producer.adapter != adapter.name:
        return convert()
    random = any(native.get(name) for name in ("rng", "model_rng"))
    restore_rng = (parts.optimizer is not None and random) if rng is None else rng

    try:
        with _readable(checkpoint):
            prepared = _prepare(checkpoint, native, adapter, parts, scheduler, extra or {}, restore_rng)
    except UnsupportedError:
        if native.get("probe") is None or _is_of_one_class(checkpoint, parts.model):
            raise
        return convert()  # not built yet, which the probe does
    if prepared["model"].problems and _is_of_another_library(checkpoint, adapter, parts.model):
        return convert()
    if isinstance(checkpoint, opened.Foreign) and _differ_in_type_only(prepared["model"].problems, adapter, parts.model):
        # Others load float16 into float32; what may be rounded is decided as for any conversion.
        options = dataclasses.replace(
            options, pairs=[(unit.path, unit.path, None) for unit in conversion.side_of(checkpoint).units]
        )
        return _convert(checkpoint, native, adapter, model, optimizer, tx, scheduler, extra or {}, options)
    problems = tuple(problem for restore in prepared.values() for problem in restore.problems)
    if problems and strict:
        raise MismatchError(
            f"{checkpoint.path} does not fit the live objects ({len(problems)} entries; nothing was loaded). Load into the "
            "objects it was saved from, or pass strict=False to load what fits:",
            problems,
        )
    check_all((tensor for restore in prepared.values() for tensor in restore.tensors), verify=verify)
    results = _apply(prepared)

    return _restored(checkpoint, parts, results["model"], results.get("optimizer"), results, problems)


def plan(
    path: str | os.PathLike[str],
    model: Any,
    *,
    rules: Mapping[str, str] | None = None,
    probe_axes: str | Sequence[str | None] | None = None,
    apply: Callable[..., Any] | None = None,
    like: Any = None,
    format: str | None = None,
) -> Plan:
    """How `load` would convert the checkpoint `path` into `model`; nothing is loaded, and nothing of the model changes.

    The arguments are those of `load`. Print the plan, or `save` it, edit the file, and pass it to `load(..., plan=)`. What is
    not settled in it is settled by the probe where the checkpoint holds one, by rules or by hand.

    Raises PlanError for rules that cannot be followed, NotACheckpointError, CorruptError, VersionError or StorageError.
    """
    checkpoint = _open(path, True, like, format, model)
    adapter = registry.adapter_for(model, "model")
    options = conversion.Options(rules=rules, probe_axes=probe_axes, apply=apply)
    parts = adapter.parts(model, NO_OPTIMIZER)
    return conversion.prepare(checkpoint, _probe(checkpoint, native_of(checkpoint)), adapter, parts.model, options).plan


def inspect(path: str | os.PathLike[str], *, verify: bool = True, like: Any = None, format: str | None = None) -> Checkpoint:
    """Open the checkpoint `path`, in whatever format it is.

    `.manifest` says what it holds; `.weights`, `.optimizer` and `.state` map names to NumPy arrays, read when they are
    asked for and, with `verify`, compared with their checksums. Ours, and most others, are read without any framework.

    verify, like, format: as in `load`. Raises NotACheckpointError, CorruptError, VersionError or StorageError; for formats of
    others UnsupportedError, naming what nobody may read, AdapterError, naming what to install, and MismatchError where what
    there is is not that of `like`.
    """
    return _open(path, verify, like, format)


open = inspect
"""As `inspect`: what a checkpoint holds, before it is loaded."""


def export(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model: Any = None,
    optimizer: Any = None,
    *,
    to: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write the checkpoint `path` as `target` in a format of others, which their own loaders read; returns its absolute path.

    to: the name of the format ("polyckpt" for our own), by default the one that the name of `target` ends like. model,
    optimizer: live objects to load the checkpoint into first, as `load` does with `options`: needed where it was written by
    another framework than that of the format, or where the format is written by live objects only (Keras, Equinox).
    overwrite: whether what is there is replaced.

    Raises CheckpointExistsError, UnsupportedError, and as `load` does; after each of them what was on disk is still there.
    """
    wanted = local.absolute(target)
    chosen = None if to == OURS else table.by_suffix(wanted) if to is None else table.named(to)
    if chosen is None and to != OURS:
        raise UnsupportedError(f"{wanted}: its name does not say which format it is to have: pass to= (--to)")
    if chosen is not None:
        writing.check(wanted, chosen, overwrite=overwrite)
    if model is None:
        checkpoint = _open(path, True, options.pop("like", None), options.pop("format", None))
        if options:
            raise UnsupportedError(f"{', '.join(options)}: only where a model is given into which to load")
        source = writing.Source(checkpoint)
    else:
        restored = load(path, model, optimizer, **options)
        assert restored.checkpoint is not None
        source = writing.Source(_captured(restored), restored.model, None if optimizer is None else restored.optimizer)
    if chosen is None:
        if not isinstance(source.checkpoint, opened.Captured):
            raise UnsupportedError(f"{path}: is a checkpoint of polyckpt already: copy it, or pass a model to convert it into")
        source.checkpoint.snapshot.write(wanted, overwrite=overwrite)
        return wanted
    if chosen.adapter not in ("", source.checkpoint.manifest.producer.adapter):
        raise UnsupportedError(
            f"{chosen.title}: holds what {chosen.adapter} writes, and {path} was written by "
            f"{source.checkpoint.manifest.producer.adapter}: pass a model of {chosen.adapter} to convert it into (--like)"
        )
    writing.write(source, wanted, chosen, overwrite=overwrite)
    return wanted


def _differ_in_type_only(problems: Sequence[Problem], adapter: Adapter, model: Any) -> bool:
    """Whether nothing but the element types of tensors differs; numbers of Python are none."""
    if not problems or any(problem.kind != "dtype" for problem in problems):
        return False
    return {problem.name for problem in problems} <= adapter.capture_model(model).weights.keys()


def _captured(restored: Restored) -> Checkpoint:
    """The live objects into which a checkpoint was loaded, as a checkpoint again."""
    assert restored.checkpoint is not None
    optimizer = restored.optimizer
    if optimizer is None and restored.checkpoint.manifest.optimizer is None:
        optimizer = NO_OPTIMIZER
    captured = snapshot.capture(
        restored.model,
        optimizer,
        extra=restored.extra,
        epoch=restored.epoch,
        step=restored.step,
        batch=restored.batch,
        metrics=restored.metrics,
        lr=restored.lr,
        tx=restored.tx,
    )
    return opened.Captured(restored.checkpoint.path, captured)


def _open(
    path: str | os.PathLike[str],
    verify: bool,
    like: Any,
    format: str | None,
    model: Any = None,
    optimizer: Any = None,
    tx: Any = None,
) -> Checkpoint:
    """The checkpoint in whatever format; model: the one that it is for, whose names it may have."""

    def described() -> Like | None:
        if like is not None:
            return Like.of(*(like if isinstance(like, tuple) and len(like) == 2 else (like,)), required=True)
        if model is None:
            return None
        try:
            return Like.of(model, optimizer, tx, required=False)
        except UnsupportedError:
            return None  # not built yet

    return opened.open_(path, verify=verify, like=described, format=format)


def _convert(
    checkpoint: Checkpoint,
    native: Mapping[str, Any],
    adapter: Adapter,
    model: Any,
    optimizer: Any,
    tx: Any,
    scheduler: Any,
    extra: Mapping[str, Any],
    options: conversion.Options,
) -> Restored:
    """Load into a model whose names are other ones. What only the framework that wrote it can use stays out."""
    owner = registry.find(scheduler) if scheduler is not None else None
    schedule = owner.schedule(scheduler) if owner else None
    refused = {"scheduler": scheduler is not None and schedule is None, "extra": bool(extra)}
    if any(refused.values()):
        raise MismatchError(
            f"{checkpoint.path} was saved by the {checkpoint.manifest.producer.adapter} adapter from a model with other names. "
            f"Weights and optimizer can be converted; {' and '.join(name for name, given in refused.items() if given)} cannot: "
            "leave it out"
        )
    # One that the model merely carries is left alone where there is nothing for it.
    carried = optimizer is None and checkpoint.manifest.optimizer is None
    parts = adapter.parts(model, NO_OPTIMIZER if carried else optimizer, tx)
    with _readable(checkpoint):
        values = {
            f"extra {name}": objects.prepare(None, entry, f"extra {name}")
            for name, entry in (native.get("extra") or {}).items()
            if entry["kind"] == objects.VALUE
        }
        check_all((tensor for restore in values.values() for tensor in restore.tensors), verify=options.verify)
        results = _apply(values)
    probe = _probe(checkpoint, native)
    followed = dataclasses.replace(options, schedule=schedule)
    converted = conversion.prepare(checkpoint, probe, adapter, parts.model, followed, parts.optimizer)
    try:
        restored, continued, report, problems = converted.run()
    except MismatchError as error:
        if isinstance(checkpoint, opened.Foreign) and (why := _why_not(checkpoint, error)):
            raise why from error
        raise
    if scheduler is not None:
        results["scheduler"] = scheduler
    report = dataclasses.replace(report, left_out=list(_left_out(native)))
    return _restored(checkpoint, parts, restored, continued, results, problems, report)


def _why_not(checkpoint: opened.Foreign, error: MismatchError) -> MismatchError | None:
    """The error of a conversion with what the file lacks, or what of it could not be read, where that led to it."""
    text = str(error)
    if not checkpoint.manifest.model.layers:
        text = (
            f"{checkpoint.path}: {table.named(checkpoint.format).title} holds names and values, and not what the layers are: "
            f"pass like= a live model as it was saved (--like). Without it:\n{error}"
        )
    elif reasons := _unread_optimizer(checkpoint):
        text = "\n  ".join([text, *reasons])
    else:
        return None
    told = type(error)(text)
    told.problems = error.problems
    return told


def _unread_optimizer(checkpoint: Checkpoint) -> list[str]:
    """Why the optimizer that a file in a format of others holds is not read."""
    return [each for each in getattr(checkpoint, "left_out", ()) if each.startswith("optimizer")]


def _left_out(native: Mapping[str, Any]) -> Iterator[str]:
    """The objects with state that a conversion does not bring along, by name."""
    for name, entry in (native.get("extra") or {}).items():
        if entry["kind"] != objects.VALUE:
            yield f"extra {name}, the state of a {entry['type']}"
    if entry := native.get("scheduler"):
        yield f"the state of the scheduler, a {entry['type']}: its rates are compared where they are known"


def _restored(
    checkpoint: Checkpoint,
    parts: Parts,
    model: Any,
    optimizer: Any,
    results: Mapping[str, Any],
    problems: Sequence[Problem],
    report: Report | None = None,
) -> Restored:
    tx = parts.tx(optimizer) if optimizer is not None else None
    model, optimizer = parts.join(model, optimizer)
    metrics, rate = checkpoint.manifest.metrics, checkpoint.manifest.learning_rate
    return Restored(
        epoch=checkpoint.manifest.progress.epoch,
        step=checkpoint.manifest.progress.step,
        batch=checkpoint.manifest.progress.batch,
        metrics={name: schema.from_number(number) for name, number in metrics.items()},
        lr=tuple(map(schema.from_number, rate)) if isinstance(rate, tuple) else optional_number(rate),
        model=model,
        optimizer=optimizer,
        tx=tx,
        scheduler=results.get("scheduler"),
        extra={name.removeprefix("extra "): value for name, value in results.items() if name.startswith("extra ")},
        skipped=tuple(problems),
        checkpoint=checkpoint,
        report=report,
    )


def _is_of_one_class(checkpoint: Checkpoint, model: Any) -> bool:
    """Whether a model is of the class that was saved, and that class says what it holds."""
    return checkpoint.manifest.model.type == type_name(model) and not isinstance(model, Mapping)


def _is_of_another_library(checkpoint: Checkpoint, adapter: Adapter, model: Any) -> bool:
    """Whether a model of the adapter that saved cannot be what was saved: of another library's layers, or all names differ."""
    if _is_of_one_class(checkpoint, model):
        return False
    captured = adapter.capture_model(model)
    stored = checkpoint.weights.stored.keys()
    ours, theirs = (
        {layer.type.partition(".")[0] for layer in layers} for layers in (checkpoint.manifest.model.layers, captured.layers)
    )
    of_others = bool(ours and theirs) and ours.isdisjoint(theirs)
    return bool(captured.weights and stored) and (of_others or stored.isdisjoint(captured.weights))


def _pairs(plan: Plan | str | os.PathLike[str] | None) -> Sequence[tuple[str, str, Flatten | None]]:
    if plan is None:
        return ()
    if isinstance(plan, Plan):
        return [(pair.source.path, pair.target.path, pair.flatten) for pair in plan.pairs]
    return plans.read(plan)


def _probe(checkpoint: Checkpoint, native: Mapping[str, Any]) -> parity.Probe | None:
    with _readable(checkpoint):
        return parity.decode(residue.live(native.get("probe")))


@collecting.paused()
def _prepare(
    checkpoint: Checkpoint,
    native: Mapping[str, Any],
    adapter: Adapter,
    parts: Parts,
    scheduler: Any,
    extra: Mapping[str, Any],
    restore_rng: bool,
) -> dict[str, Restore]:
    """Every part of a load, compared and ready to apply, in the order to apply them in."""
    prepared: dict[str, Restore] = {}
    stored_extra = native.get("extra") or {}
    for name, value in extra.items():
        prepared[f"extra {name}"] = _prepare_entry(stored_extra.get(name), value, f"extra {name}")
    for name, entry in stored_extra.items():
        if name not in extra and entry["kind"] == objects.VALUE:
            prepared[f"extra {name}"] = objects.prepare(None, entry, f"extra {name}")
    if scheduler is not None:
        prepared["scheduler"] = _prepare_entry(native.get("scheduler"), scheduler, "scheduler")
    stored_model = StoredModel(
        type=checkpoint.manifest.model.type,
        weights=checkpoint.weights.stored,
        aliases=checkpoint.manifest.model.aliases,
        native=native.get("model"),
        rng=native.get("model_rng"),
    )
    restored = adapter.prepare_model(parts.model, stored_model, rng=restore_rng)
    if parts.optimizer is not None:
        parameters = restored.renamed(adapter.parameters(parts.model))
        prepared["optimizer"] = _prepare_optimizer(checkpoint, native, parts, adapter, parameters)
    prepared["model"] = restored
    if restore_rng:
        # The host's last of all: making what another framework needs may draw from Python's or NumPy's state.
        for name, tree in sorted((native.get("rng") or {}).items(), key=lambda item: item[0] == registry.HOST):
            prepared[f"rng {name}"] = registry.named(name).prepare_rng(tree)
    return prepared


@contextlib.contextmanager
def _readable(checkpoint: Checkpoint) -> Iterator[None]:
    """Native residue is what an adapter wrote; where it is not, reading it fails in as many ways as there are."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptError(
            f"{checkpoint.path}: its native residue is not what the adapter of {checkpoint.manifest.producer.adapter} writes, "
            f"or an object given to load() failed: {error!r}"
        ) from error


def _prepare_entry(entry: dict[str, Any] | None, live: Any, path: str) -> Restore:
    if entry is None:
        section, _, name = path.partition(" ")
        problem = Problem("missing", section, name or section, live=f"a {type(live).__name__}")
        return Restore(apply=lambda: live, problems=[problem])
    return objects.prepare(live, entry, path)


def _prepare_optimizer(
    checkpoint: Checkpoint, native: Mapping[str, Any], parts: Parts, owner: Adapter, parameters: Sequence[tuple[str, Any]]
) -> Restore:
    """Prepare the optimizer of `parts`. owner: the adapter of the model. parameters: of that, as the checkpoint names them."""
    described, entry, optimizer = checkpoint.manifest.optimizer, native.get("optimizer"), parts.optimizer
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if described is None or entry is None:
        reasons = "; ".join(each.removeprefix("optimizer: ") for each in _unread_optimizer(checkpoint))
        problem = Problem(
            "missing",
            "optimizer",
            "(all of it; pass optimizer=False to load weights only)",
            stored=reasons or "absent",
            live=kind,
        )
        return Restore(apply=lambda: optimizer, problems=[problem])
    adapter = registry.find(optimizer) or owner
    if adapter.name != entry["adapter"]:
        problem = Problem("value", "optimizer", "framework", stored=entry["adapter"], live=adapter.name)
        return Restore(apply=lambda: optimizer, problems=[problem])
    tensors = checkpoint.optimizer.stored
    stored = StoredOptimizer(
        type=described.type,
        slots={
            name: {parameter: tensors[key] for parameter, key in slot.tensors.items()} for name, slot in described.slots.items()
        },
        native=entry["state"],
    )
    return adapter.prepare_optimizer(optimizer, stored, parameters, parts.model)


@collecting.paused()
def _apply(prepared: Mapping[str, Restore]) -> dict[str, Any]:
    """Run every `apply` in order: foreign code first, since it alone can fail, and random states last."""
    done: list[Restore] = []
    results = {}
    for name, restore in prepared.items():
        done.append(restore)
        try:
            results[name] = restore.apply()
        except BaseException:
            for earlier in reversed(done):
                if earlier.undo:
                    # One that cannot go back must not keep the others from it, nor hide the error.
                    with contextlib.suppress(Exception):
                        earlier.undo()
            raise
    for restore in done:
        restore.finish()
    return results
