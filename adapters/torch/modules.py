"""Modules, state dicts and other containers of torch tensors: their entries by name, and writing them back in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyckpt import names, residue
from polyckpt.adapter import ModelCapture, Restore, StoredModel
from polyckpt.adapters.torch import layers, tensors
from polyckpt.checkpoint import StoredTensor
from polyckpt.errors import MismatchError, Problem, UnsupportedError
from polyckpt.names import type_name


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a model: `key` in its own state dict, and the tensor or other value there."""

    key: str
    value: Any


def capture(model: Any) -> ModelCapture:
    """Describe a module or a container of tensors."""
    found = entries(model)
    weights = {name: tensors.leaf(entry.value, name) for name, entry in found.items() if _is_tensor(entry)}
    described = layers.describe(model, Renamer(model)) if isinstance(model, nn.Module) else []
    return ModelCapture(
        type=type_name(model),
        weights=weights,
        layers=described,
        order="definition",
        parameters=parameters(model),
        native=_native(model, found),
        metadata={"format": "pt"},
    )


def entries(model: Any) -> dict[str, Entry]:
    """All that a model's state consists of, by canonical name: its state-dict key without the segments of wrappers."""
    if isinstance(model, nn.Module):
        rename = Renamer(model)
        return {rename(key): Entry(key, value) for key, value in model.state_dict(keep_vars=True).items()}
    if isinstance(model, torch.Tensor):
        return {"": Entry("", model)}
    if inner := next((path for path, value in residue.walk(model) if isinstance(value, nn.Module)), None):
        raise UnsupportedError(
            f"model: {names.join(inner)} is a module in a {type(model).__name__}: give torch.nn.ModuleDict or ModuleList"
        )
    if isinstance(model, Mapping) and all(isinstance(key, str) and not _is_container(value) for key, value in model.items()):
        return {key: Entry(key, value) for key, value in model.items()}  # a state dict: names as a module has them
    found: dict[str, Entry] = {}
    for path, value in residue.walk(model):
        name = names.join(path)
        if name in found:
            raise UnsupportedError(f"model: two entries are named {name!r}: keys that differ only in type")
        found[name] = Entry(name, value)
    return found


def parameters(model: Any) -> list[tuple[str, Any]]:
    """Trainable tensors by canonical name, tied ones under the first of their names."""
    if isinstance(model, nn.Module):
        rename = Renamer(model)
        return [(rename(key), parameter) for key, parameter in model.named_parameters()]
    return [(name, entry.value) for name, entry in entries(model).items() if _is_tensor(entry)]


_NOTHING_BESIDE: Mapping[str, Any] = {"others": {}}


def prepare(model: Any, stored: StoredModel, section: str) -> Restore:
    """Compare a model with a stored one; `apply` copies every entry that fits into the live tensors."""
    live = entries(model)
    native = _NOTHING_BESIDE if stored.native is None else stored.native
    others: Mapping[str, Any] = native["others"]
    versions = {str(key): int(version) for key, version in native.get("versions", {}).items()}
    values = {name: residue.live(value) for name, value in others.items()}
    problems = list(_problems(live, stored.weights, others, section))
    unfit = {problem.name for problem in problems}
    before: dict[str, torch.Tensor] = {}

    def apply() -> Any:
        fitting = [name for name in live if name in stored.weights and name not in unfit]
        foreign = isinstance(model, nn.Module) and _runs_foreign_code(model)
        whole = [name for name in fitting if not _expanded(live[name].value)]
        # Torch's own code, which changes no values, gets those that are there: they are written afterwards.
        plain = {live[name].key: tensors.mapped(stored.weights[name]) if foreign else live[name].value for name in whole}
        rest = {live[name].key: value for name, value in values.items() if name not in unfit}
        by_hand = fitting
        if isinstance(model, nn.Module):
            if foreign:
                # With torch's own code alone nothing can fail here, and a copy of everything costs its memory.
                before.update({name: live[name].value.detach().clone() for name in fitting})
            try:
                _load_module(model, {**plain, **rest}, versions)
            except Exception as error:
                refusal = f"{section}: {type(model).__name__}.load_state_dict() refused what was stored: {error}"
                raise MismatchError(refusal) from error
            by_hand = [name for name in fitting if live[name].key not in plain]
            if not foreign:
                tensors.write_all((live[name].value, stored.weights[name]) for name in whole)
        with torch.no_grad():
            for name in by_hand:
                # Writing one element of an expanded axis writes them all.
                _once(live[name].value).copy_(_once(live[name].value, tensors.mapped(stored.weights[name])))
        return model

    def undo() -> None:
        with torch.no_grad():
            for name, value in before.items():
                _once(live[name].value).copy_(_once(live[name].value, value))

    needed = [stored.weights[name] for name in live if name in stored.weights]
    return Restore(apply=apply, problems=problems, tensors=[*needed, *residue.tensors(dict(others))], undo=undo)


def _runs_foreign_code(model: nn.Module) -> bool:
    """Whether loading runs code that is not torch's own, which may fail after it has written."""
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or not all(
            getattr(type(module), method).__module__.startswith("torch.")
            for method in ("load_state_dict", "_load_from_state_dict", "set_extra_state")
        )
        for module in model.modules()
    )


def capture_tree(model: nn.Module) -> dict[str, Any]:
    """A module as one tree, for where it stands beside the model."""
    captured = capture(model)
    return {"weights": dict(captured.weights), "native": captured.native, "type": captured.type}


def prepare_tree(model: nn.Module, tree: Mapping[str, Any], path: str) -> Restore:
    """The counterpart of `capture_tree`."""
    weights = {name: ref.stored for name, ref in tree["weights"].items()}
    stored = StoredModel(type=tree["type"], weights=weights, aliases={}, native=tree["native"], rng=None)
    return prepare(model, stored, path)


def _problems(
    live: Mapping[str, Entry], weights: Mapping[str, StoredTensor], others: Mapping[str, Any], section: str
) -> Iterator[Problem]:
    by_memory: dict[Any, str] = {}
    for name, entry in live.items():
        if _is_tensor(entry):
            tensors.leaf(entry.value, f"model: {name}")  # raises where it cannot be written: lazy, meta, sharded
        if _is_tensor(entry) and entry.value.is_inference() and not torch.is_inference_mode_enabled():
            raise UnsupportedError(f"model: {name}: a tensor of inference mode can be written only there: load in that mode")
    for name, entry in live.items():
        shown = tensors.show(entry.value) if _is_tensor(entry) else f"a {type(entry.value).__name__}"
        if name not in weights and name not in others:
            yield Problem("missing", section, name, live=shown)
        elif _is_tensor(entry) != (name in weights):
            yield Problem("dtype", section, name, stored=str(weights.get(name, "no tensor")), live=shown)
        elif _is_tensor(entry):
            stored = weights[name]
            identity = tensors.leaf(entry.value, f"model: {name}").identity
            if stored.shape != tuple(entry.value.shape):
                yield Problem("shape", section, name, stored=str(stored), live=shown)
            elif stored.dtype != tensors.DTYPE_NAMES.get(entry.value.dtype):
                yield Problem("dtype", section, name, stored=str(stored), live=shown)
            elif (
                identity is not None
                and (first := by_memory.setdefault(identity, name)) != name
                and weights[first].checksums != stored.checksums
            ):
                yield Problem(
                    "value", section, name, stored=f"values of its own, not those of {first}", live=f"one tensor with {first}"
                )
            elif _expanded(entry.value) and not _repeats(tensors.mapped(stored), entry.value):
                yield Problem(
                    "value", section, name, stored=f"{stored} of distinct values", live=f"{shown} that repeats (expanded)"
                )
    for name in [*weights, *others]:
        if name not in live:
            yield Problem("unexpected", section, name, stored=str(weights.get(name, "a value")))


def _expanded(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _once(live: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """`values` (by default `live` itself) with one element of each axis along which `live` repeats itself."""
    values = live if values is None else values
    for axis, (stride, size) in enumerate(zip(live.stride(), live.shape, strict=True)):
        values = values.narrow(axis, 0, 1) if stride == 0 and size > 1 else values
    return values


def _repeats(values: torch.Tensor, live: torch.Tensor) -> bool:
    """Whether `values` are the same, bit for bit, along every axis along which `live` repeats itself."""
    repeated = _once(live, values).expand_as(values).contiguous()
    return torch.equal(repeated.reshape(-1).view(torch.uint8), values.reshape(-1).view(torch.uint8))


def _native(model: Any, found: Mapping[str, Entry]) -> dict[str, Any]:
    others = {name: entry.value for name, entry in found.items() if not _is_tensor(entry)}
    if not isinstance(model, nn.Module):
        return {"others": others}
    rename = Renamer(model)
    # Modules read entries of older versions of their class differently; 1 is the version of nearly all.
    versions = {rename(key): module._version for key, module in model.named_modules() if module._version != 1}
    return {"others": others, "versions": versions}


def _load_module(model: nn.Module, state: dict[str, Any], versions: Mapping[str, int]) -> None:
    rename = Renamer(model)
    # load_state_dict reads the versions of modules from this attribute of the dict.
    state_dict = model.state_dict().__class__(state)
    state_dict._metadata = {  # type: ignore[attr-defined]
        key: {"version": versions.get(rename(key), 1)} for key, _ in model.named_modules(remove_duplicate=False)
    }
    model.load_state_dict(state_dict, strict=False)  # compared already


def _wrappers() -> dict[type, str]:
    """Module classes that hold one module and are no part of its names -> the attribute that holds it."""
    found: dict[type, str] = {nn.parallel.DistributedDataParallel: "module", nn.DataParallel: "module"}
    if compiled := sys.modules.get("torch._dynamo.eval_frame"):
        found[compiled.OptimizedModule] = "_orig_mod"
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside all wrappers, which computes what they do."""
    wrappers = _wrappers()
    while attribute := next((attribute for kind, attribute in wrappers.items() if isinstance(model, kind)), None):
        model = getattr(model, attribute)
    return model


class Renamer:
    """Canonical names of a module's state-dict keys: segments that a wrapper adds are dropped, wherever it stands."""

    def __init__(self, model: nn.Module) -> None:
        wrappers = _wrappers()
        self._dropped = {
            f"{path}.{attribute}".lstrip(".")
            for path, module in model.named_modules(remove_duplicate=False)
            for kind, attribute in wrappers.items()
            if isinstance(module, kind)
        }

    def __call__(self, key: str) -> str:
        if not self._dropped:
            return key
        segments = key.split(".")
        return ".".join(
            segment for index, segment in enumerate(segments) if ".".join(segments[: index + 1]) not in self._dropped
        )


def _is_tensor(entry: Entry) -> bool:
    return isinstance(entry.value, torch.Tensor)


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)
