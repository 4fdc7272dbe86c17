"""Files of torch.save: what is a model in them, what an optimizer, and how far training was; and writing them.

They are pickles, so torch reads them with weights_only, which builds tensors and containers alone and runs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from polyckpt import objects, registry, residue, schema
from polyckpt.adapter import Contents, ModelCapture
from polyckpt.adapters.torch import lightning, pickles, state_dicts, tensors
from polyckpt.checkpoint import StoredTensor
from polyckpt.errors import PolicyError, UnsupportedError
from polyckpt.formats.archives import Records
from polyckpt.formats.described import Like, aligned, fitted
from polyckpt.formats.writing import Source
from polyckpt.leaves import Leaf
from polyckpt.native import native_of
from polyckpt.policy import infer_mode

MODELS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
"""Where a file that holds more keeps the model, as the tutorials and trainers call it."""


@dataclass
class Parts:
    """What an object that was saved consists of, by where it stands."""

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    optimizers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    schedulers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


def parts_of(loaded: Any) -> Parts:
    """Take apart what a file held: a state dict, or a dict of several things by name."""
    parts = Parts()
    if is_state_dict(loaded):
        parts.models[""] = dict(loaded)
        return parts
    if not isinstance(loaded, Mapping):
        parts.others[f"a {type(loaded).__name__}"] = loaded
        return parts
    loose = {}
    for key, value in loaded.items():
        for name, each in _each(str(key), value):
            if is_optimizer(each):
                parts.optimizers[name] = each
            elif state_dicts.is_flattened(each):
                parts.optimizers[name] = state_dicts.nested(each)
            elif is_scheduler(each):
                parts.schedulers[name] = each
            elif is_state_dict(each):
                parts.models[name] = dict(each)
            elif isinstance(each, torch.Tensor) and isinstance(key, str):
                loose[name] = each
            else:
                parts.others[name] = each
    if loose and not parts.models:
        parts.models[""] = loose
    else:
        parts.others |= loose
    if not parts.models:
        _unfold(parts)
    return parts


def _unfold(parts: Parts) -> None:
    """Put what a model lies in one level deeper beside the rest ({"app": {"model": ..., "optim": ...}})."""
    for name, value in list(parts.others.items()):
        if isinstance(value, Mapping) and (inside := parts_of(value)).models:
            del parts.others[name]
            for found, rest in zip(vars(parts).values(), vars(inside).values(), strict=True):
                found |= {f"{name}.{key}" if key in found else key or name: each for key, each in rest.items()}


def _each(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or the members of a list or dict of optimizers or schedulers."""
    members = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    if isinstance(members, Mapping) and members and all(is_optimizer(each) or is_scheduler(each) for each in members.values()):
        yield from ((name if len(members) == 1 else f"{name}.{key}", each) for key, each in members.items())
    else:
        yield name, value


def is_state_dict(value: Any) -> bool:
    """Whether it is what Module.state_dict() gives: tensors by name."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(each, torch.Tensor) for each in value.values())
        and all(
            isinstance(name, str) and (isinstance(each, torch.Tensor) or name.endswith("_extra_state"))
            for name, each in value.items()
        )
    )


def is_optimizer(value: Any) -> bool:
    """Whether it is what Optimizer.state_dict() gives."""
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys() and isinstance(value["param_groups"], list)


def is_scheduler(value: Any) -> bool:
    """Whether it is what LRScheduler.state_dict() gives."""
    return isinstance(value, Mapping) and {"last_epoch", "_step_count"} <= value.keys()


def leaves_of_file(path: Path, records: Records) -> dict[str, Leaf]:
    """The tensors of a file that holds one state dict. records: gets their checksums. Raises UnsupportedError for another."""
    loaded = pickles.load_file(path, records)
    if not is_state_dict(loaded):
        raise UnsupportedError(f"{path}: not a state dict alone, which a shard of a model is")
    return _leaves(path, loaded)


def read(path: Path, like: Like | None) -> Contents:
    """The contents of a file: the model under the usual names or the only one, optimizers, a schedule, progress, the rest."""
    records = Records()
    parts = parts_of(pickles.load_file(path, records))
    return dataclasses.replace(contents_of(path, parts, like), check=records.check)


def contents_of(path: Path, parts: Parts, like: Like | None) -> Contents:
    """The contents that these parts make. Raises UnsupportedError where none, or more than one, may be the model."""
    chosen = _chosen(path, parts, like)
    model = _captured(path, parts.models[chosen], like)
    left_out: list[str] = []
    optimizer = None
    if parts.optimizers:
        optimizer = state_dicts.optimizer_capture(list(parts.optimizers.values()), model, like, left_out)
    others = {**parts.others, **{name: value for name, value in parts.models.items() if name != chosen}}
    progress = lightning.progress(others, left_out) if lightning.is_one(others) else _progress(others)
    extra, schedulers = {}, {name: state_dicts.scheduler_entry(each) for name, each in parts.schedulers.items()}
    for name, value in others.items():
        try:
            residue.encode(value, leaf=_leaf, add_tensor=lambda path, leaf: "", path=(name,))
            extra[name] = objects.capture(value, name)
        except UnsupportedError as error:
            left_out.append(str(error))
    first = next(iter(schedulers), None)
    extra |= {name: entry for name, entry in schedulers.items() if name != first}
    return Contents(
        adapter="torch",
        model=model,
        optimizer=optimizer,
        scheduler=None if first is None else schedulers[first],
        extra=extra,
        left_out=left_out,
        **progress,
    )


def _chosen(path: Path, parts: Parts, like: Like | None) -> str:
    """Which of the state dicts is the model: the one with the names of `like`, the one of a usual name, the only one."""
    if like is not None and len(parts.models) > 1:
        soft = dataclasses.replace(like, required=False)
        fitting = [name for name, state in parts.models.items() if fitted(_leaves(path, state), soft)]
        if len(fitting) == 1:
            return fitting[0]
    usual = [name for name in MODELS if name in parts.models]
    if usual:
        return usual[0]
    if len(parts.models) == 1:
        return next(iter(parts.models))
    if parts.models:
        raise UnsupportedError(
            f"{path}: holds several state dicts, {', '.join(parts.models)}, and none is called as a model usually is: pass "
            "like= the model that is meant"
        )
    held = ", ".join([*parts.optimizers, *parts.schedulers, *parts.others]) or "nothing"
    raise UnsupportedError(f"{path}: holds no state dict of a model: {held}")


def _captured(path: Path, state: Mapping[str, Any], like: Like | None) -> ModelCapture:
    leaves = _leaves(path, state)
    if (model := fitted(leaves, like)) is not None:
        return model
    rest = {name: value for name, value in state.items() if name not in leaves}
    return ModelCapture(
        type="state_dict", weights=aligned(leaves, like), order="definition", native={"others": rest} if rest else None
    )


def _leaf(value: Any) -> Leaf | residue.Constant | None:
    adapter = registry.by_class(value)
    return adapter.leaf(value) if adapter else None


def _leaves(path: Path, state: Mapping[str, Any]) -> dict[str, Leaf]:
    return {name: tensors.leaf(value, f"{path}: {name}") for name, value in state.items() if isinstance(value, torch.Tensor)}


_STEPS = ("global_step", "step", "iteration", "iter", "iter_num")


def _progress(others: dict[str, Any]) -> dict[str, Any]:
    """How far training was, taken out of what a file holds besides: an epoch and a step as it calls them, and its metrics."""
    plain = {name: _number(value) for name, value in others.items()}
    step = next((name for name in _STEPS if _is_count(plain.get(name))), None)
    epoch = "epoch" if _is_count(plain.get("epoch")) else None
    told = others.pop("metrics") if _are_numbers(others.get("metrics")) else {}
    metrics = {name: float(value) for name, value in told.items()}
    for name, value in plain.items():
        if isinstance(value, float) and _is_metric(name):
            metrics[name] = value
    for name in {step, epoch, *metrics}:
        others.pop(name, None)
    return {
        "epoch": None if epoch is None else plain[epoch],
        "step": None if step is None else plain[step],
        "metrics": metrics,
    }


def _number(value: Any) -> Any:
    """A tensor of one number, such as a loss that was saved as it is, as a number; all else as it is."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(each, int | float) for name, each in value.items()
    )


def _is_metric(name: str) -> bool:
    try:
        infer_mode(name)
    except PolicyError:
        return False
    return True


def write(source: Source, target: Path) -> None:
    """Write a file that torch.load(weights_only=True) reads.

    Weights alone are the state dict itself. With an optimizer they stand as `model_state_dict`, `optimizer_state_dict` and
    `scheduler_state_dict`, with `epoch`, `step` and `metrics`, as the tutorials of PyTorch have it.
    """
    checkpoint = source.checkpoint
    made: dict[int, torch.Tensor] = {}
    state = {name: _tensor(each, made) for name, each in checkpoint.weights.stored.items()}
    if checkpoint.manifest.optimizer is None:
        torch.save(state, target)
        return
    native = native_of(checkpoint)
    states = state_dicts.of_stored(checkpoint, native["optimizer"]["state"])
    document: dict[str, Any] = {"model_state_dict": state}
    document |= {"optimizer_state_dict": states[0]} if len(states) == 1 else {"optimizer_state_dicts": states}
    scheduler = native.get("scheduler")
    if scheduler is not None and scheduler["kind"] == objects.STATE_DICT:
        document["scheduler_state_dict"] = residue.live(scheduler["state"])
    told = msgspec.to_builtins(checkpoint.manifest.progress)
    document |= {name: value for name, value in told.items() if value is not None}
    metrics = {name: schema.from_number(value) for name, value in checkpoint.manifest.metrics.items()}
    torch.save({**document, **({"metrics": metrics} if metrics else {})}, target)


def _tensor(stored: StoredTensor, made: dict[int, torch.Tensor]) -> torch.Tensor:
    """A tensor of its own; names of one stored tensor have one, so that they are tied again."""
    if id(stored) not in made:
        made[id(stored)] = tensors.copied(stored)
    return made[id(stored)]
