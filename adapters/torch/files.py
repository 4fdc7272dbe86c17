"""Files of torch.save: what is a model in them, what an optimizer, and how far training was; and writing them.

They are pickles, so torch reads them with weights_only, which builds tensors and containers alone and runs nothing.
"""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import torch

from polyckpt import objects, residue, schema
from polyckpt.adapter import Contents, ModelCapture
from polyckpt.adapters.torch import lightning, state_dicts, tensors
from polyckpt.checkpoint import StoredTensor
from polyckpt.errors import CorruptError, PolicyError, UnsupportedError
from polyckpt.formats.described import Like, fitted
from polyckpt.formats.writing import Source
from polyckpt.leaves import Leaf
from polyckpt.native import native_of
from polyckpt.policy import infer_mode

MODELS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
"""Where a file that holds more keeps the model, as the tutorials and trainers call it."""


def load_file(path: Path) -> Any:
    """What torch.save wrote, built of tensors (mapped where they can be), containers and numbers alone.

    Raises UnsupportedError, naming what would have to run, and CorruptError.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UnsupportedError(
                    f"{path}: a TorchScript archive, which holds code: load it with torch.jit.load and save its state_dict()"
                )
    return _load(path, str(path), mmap=zipfile.is_zipfile(path))


def load_stream(stream: IO[bytes], where: str) -> Any:
    """As `load_file`, of what lies in memory."""
    return _load(stream, where, mmap=False)


def _load(source: Any, where: str, *, mmap: bool) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # torch raises whatever the parts of the file lead to
        told = str(error)
        if type(error).__name__ == "UnpicklingError" and (wanted := _wanted(told)):
            raise UnsupportedError(
                f"{where}: it is a pickle that needs {wanted} to be run, which a file from a stranger may abuse, so it is not "
                "read. Save state dicts alone (torch.save(model.state_dict(), ...)); or, if you trust the file, name the "
                "class with torch.serialization.add_safe_globals([...]) before you load it"
            ) from error
        raise CorruptError(f"{where}: torch cannot read it: {_first_line(told)}") from error


def _wanted(told: str) -> str | None:
    """The class or function that unpickling would have called, as torch names it."""
    found = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|operand|type) ([\w.<> ']+)", told)
    return (found[1] or found[2]).strip() if found else None


def _first_line(told: str) -> str:
    return told.strip().splitlines()[0][:300] if told.strip() else "no reason given"


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
        parts.others[""] = loaded
        return parts
    loose = {}
    for key, value in loaded.items():
        for name, each in _each(str(key), value):
            if is_optimizer(each):
                parts.optimizers[name] = each
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
    return parts


def _each(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or the members of a list of optimizers or schedulers."""
    if isinstance(value, list | tuple) and value and all(is_optimizer(each) or is_scheduler(each) for each in value):
        yield from ((name if len(value) == 1 else f"{name}.{index}", each) for index, each in enumerate(value))
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


def leaves_of_file(path: Path) -> dict[str, Leaf]:
    """The tensors of a file that holds one state dict. Raises UnsupportedError for another."""
    loaded = load_file(path)
    if not is_state_dict(loaded):
        raise UnsupportedError(f"{path}: not a state dict alone, which a shard of a model is")
    return _leaves(path, loaded)


def read(path: Path, like: Like | None) -> Contents:
    """The contents of a file: the model under the usual names or the only one, optimizers, a schedule, progress, the rest."""
    return contents_of(path, parts_of(load_file(path)), like)


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
    return ModelCapture(type="state_dict", weights=leaves, order="definition", native={"others": rest} if rest else None)


def _leaves(path: Path, state: Mapping[str, Any]) -> dict[str, Leaf]:
    return {name: tensors.leaf(value, f"{path}: {name}") for name, value in state.items() if isinstance(value, torch.Tensor)}


_STEPS = ("global_step", "step", "iteration", "iter")


def _progress(others: dict[str, Any]) -> dict[str, Any]:
    """How far training was, taken out of what a file holds besides: an epoch and a step as it calls them, and its metrics."""
    step = next((name for name in _STEPS if _is_count(others.get(name))), None)
    told = others.pop("metrics") if _are_numbers(others.get("metrics")) else {}
    metrics = {name: float(value) for name, value in told.items()}
    for name in list(others):
        if isinstance(others[name], float) and _is_metric(name):
            metrics[name] = others.pop(name)
    return {
        "epoch": others.pop("epoch") if _is_count(others.get("epoch")) else None,
        "step": None if step is None else others.pop(step),
        "metrics": metrics,
    }


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
