"""Files of Keras as it writes them itself: which dataset is which variable, told by a live model; and writing them.

Where a model lies in the file as a configuration, Keras makes one of it, in its safe mode; otherwise it is the caller's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
from keras.src.saving import saving_lib
from msgspec import structs

from polyckpt.adapter import Contents, ModelCapture, OptimizerCapture
from polyckpt.adapters.keras import KerasAdapter, optimizers, variables
from polyckpt.dtypes import lookup
from polyckpt.errors import MismatchError, Problem, UnsupportedError
from polyckpt.formats.described import Like
from polyckpt.formats.keras_files import Datasets
from polyckpt.formats.writing import Source
from polyckpt.leaves import Leaf


def read(path: Path, like: Like | None) -> Contents:
    """The contents of a file, described by `like` where it is of that structure, else by the configuration in the file.

    Without either, weights go by the paths of their datasets. Raises UnsupportedError for a configuration that would run code
    or names classes that nobody registered, MismatchError where `like` is required and is of another structure.
    """
    datasets = Datasets(path)
    left_out: list[str] = []
    for model, optimizer, required in _candidates(path, datasets, like):
        try:
            captured, problems = _captured(model, datasets, left_out)
        except UnsupportedError as error:  # the model of a configuration, which does not say how to build it
            left_out.append(f"layers: {error}")
            continue
        if captured is not None:
            described = optimizer_of(model, [_stated(datasets.config), optimizer], datasets.optimizer, captured, left_out)
            return Contents(adapter="keras", model=captured, optimizer=described, left_out=left_out)
        if required:
            raise MismatchError(f"{path}: its variables are not those of `like`:", problems)
        if like is None or model is not like.model:
            left_out.append("layers: the variables are not those of the model of the configuration")
    if datasets.optimizer:
        left_out.append(
            f"optimizer: {len(datasets.optimizer)} variables: whose they are, only a live model and its optimizer tell (like=)"
        )
    weights = ModelCapture(type="weights", weights=datasets.weights, order="name")
    return Contents(adapter="keras", model=weights, left_out=left_out)


def _candidates(path: Path, datasets: Datasets, like: Like | None) -> Any:
    """Models that may be of the structure of a file, with their optimizers, the caller's first."""
    if like is not None:
        yield like.model, like.optimizer, like.required
    if datasets.config is not None:
        made = _made(path, datasets.config)
        yield made, getattr(made, "optimizer", None), False


def _made(path: Path, config: Mapping[str, Any]) -> Any:
    """The model of a configuration."""
    try:
        made = keras.saving.deserialize_keras_object(_of_any_backend(config), safe_mode=True)
    except Exception as error:  # a configuration may lead into any constructor
        raise UnsupportedError(
            f"{path}: Keras does not make its model of the configuration: {str(error).strip()[:500]}. Register the class "
            "(@keras.saving.register_keras_serializable()), or pass like= a model that is built"
        ) from error
    if not isinstance(made, keras.Model):
        raise UnsupportedError(f"{path}: its configuration makes a {type(made).__name__}, which is no model")
    return made


def _of_any_backend(config: Any) -> Any:
    """A configuration with the classes of one backend under the names that all have; else it is of use there alone."""
    if isinstance(config, list):
        return [_of_any_backend(each) for each in config]
    if not isinstance(config, dict):
        return config
    found = {name: _of_any_backend(value) for name, value in config.items()}
    if str(found.get("module", "")).startswith("keras.src.backend.") and ".optimizers." in found["module"]:
        found["module"] = "keras.optimizers"
    return found


class _Recorder(saving_lib.H5IOStore):  # type: ignore[misc]
    """A store that keeps what Keras would write to a file: path of the dataset -> variable, or array."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Any = None) -> Any:
        return _Entry(self.entries, f"{path}/vars/".lstrip("/"))


class _Entry:
    def __init__(self, entries: dict[str, Any], prefix: str) -> None:
        self._entries, self._prefix = entries, prefix

    def __setitem__(self, name: str, value: Any) -> None:
        self._entries[f"{self._prefix}{name}"] = value


def _written(model: Any) -> dict[str, Any]:
    """What Keras would write of a model but for its optimizer: path of the dataset -> variable, or array."""
    recorder = _Recorder()
    saving_lib._save_state(
        model, weights_store=recorder, assets_store=None, inner_path="", visited_saveables=set(_optimizers(model))
    )
    return recorder.entries


def _optimizers(model: Any) -> list[int]:
    """What need not be walked: it would copy all its variables."""
    return [id(model.optimizer)] if getattr(model, "optimizer", None) is not None else []


def _captured(model: Any, datasets: Datasets, left_out: list[str]) -> tuple[ModelCapture | None, list[Problem]]:
    """A model with the variables of a file in place of its own; None and why where it is another one.

    left_out: takes what Keras writes of such a model besides its weights.
    """
    described = KerasAdapter().capture_model(model)
    entries = _written(model)
    paths = {id(value): path for path, value in entries.items() if isinstance(value, keras.Variable)}
    live = variables.weights(model)
    weights: dict[str, Leaf] = {}
    problems = []
    for name, leaf in described.weights.items():
        path = paths.get(id(live[name]), "")
        found = datasets.weights.get(path)
        if found is None:
            where = f"nothing at {path}" if path else "no place that Keras would keep it in"
            problems.append(Problem("missing", "weights", name, stored=where, live=f"{leaf.dtype}{list(leaf.shape)}"))
        elif found.shape != leaf.shape:
            problems.append(
                Problem(
                    "shape", "weights", name, stored=f"{found.dtype}{list(found.shape)}", live=f"{leaf.dtype}{list(leaf.shape)}"
                )
            )
        else:
            weights[name] = structs.replace(found, identity=leaf.identity)
    problems += [
        Problem("unexpected", "weights", path, stored=f"{leaf.dtype}{list(leaf.shape)}")
        for path, leaf in datasets.weights.items()
        if path not in entries
    ]
    if problems:
        return None, problems
    of_run = {paths[id(each)] for each in variables.run_states(model) if id(each) in paths}
    beside = sorted({path.rpartition("/vars/")[0] for path in datasets.weights.keys() - set(paths.values()) - of_run})
    left_out += [f"{place}: is no weight of the model, and its variables are not read" for place in beside]
    return dataclasses.replace(described, weights=weights, rng=None), []


def _stated(config: Mapping[str, Any] | None) -> Any:
    """The optimizer of a configuration, which may be of a class that nobody has registered; None where there is none."""
    compiled = (config or {}).get("compile_config")
    stated = compiled.get("optimizer") if isinstance(compiled, dict) else None
    try:
        return None if stated is None else keras.optimizers.get(_of_any_backend(stated))
    except Exception:  # a configuration may lead into any constructor
        return None


def optimizer_of(
    model: Any, candidates: Sequence[Any], values: Sequence[Leaf], captured: ModelCapture, left_out: list[str]
) -> OptimizerCapture | None:
    """The first of the candidates that has variables like these, with these values: a copy, since a live one stays as it is.

    None, with the reason in left_out, where none has.
    """
    if not values:
        return None
    shapes = [leaf.shape for leaf in values]
    reason = "which optimizer it was is not in the file: give the live one"
    for candidate in candidates:
        optimizer = candidate.main if isinstance(candidate, optimizers.Several) else candidate
        if optimizer is None:
            continue
        reason = f"not those of a {type(optimizer).__name__} of this model"
        try:
            found = next((each for each in _copies(optimizer, model) if _shapes(each) == shapes), None)
        except Exception as error:  # of a class of the user's, anything
            reason = f"a {type(optimizer).__name__} cannot be made once more: {str(error)[:200]}"
            continue
        if found is not None:
            return _filled(found, values, captured)
    left_out.append(f"optimizer: {len(values)} variables: {reason}")
    return None


def _copies(optimizer: Any, model: Any) -> Iterator[Any]:
    """An optimizer made once more: built, within the loss scaling of mixed precision, and as it is before the first step."""
    config = _of_any_backend(keras.optimizers.serialize(optimizer))
    for wrap in (lambda copy: copy, keras.optimizers.LossScaleOptimizer):
        copy = wrap(keras.optimizers.deserialize(config))
        copy.build(model.trainable_variables)
        yield copy
    yield keras.optimizers.deserialize(config)


def _shapes(optimizer: Any) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in optimizer.variables]


def _filled(optimizer: Any, values: Sequence[Leaf], captured: ModelCapture) -> OptimizerCapture:
    for variable, leaf in zip(optimizer.variables, values, strict=True):
        variable.assign(leaf.read().view(lookup(leaf.dtype, "optimizer").numpy).reshape(leaf.shape))
    described = optimizers.capture(optimizer, captured.parameters)
    # What was read just now is checked with the file that it came from.
    slots = {
        slot: {name: structs.replace(leaf, check=values[0].check) for name, leaf in entries.items()}
        for slot, entries in described.slots.items()
    }
    return dataclasses.replace(described, slots=slots)


def write_archive(source: Source, target: Path) -> None:
    """Write a `.keras` of the live model, with its optimizer where it is compiled. Raises UnsupportedError without one."""
    _live(source).save(target)


def write_weights(source: Source, target: Path) -> None:
    """Write a `.weights.h5` of the live model, with its optimizer where it is compiled. Raises UnsupportedError without one."""
    _live(source).save_weights(target)


def _live(source: Source) -> Any:
    if source.model is None:
        raise UnsupportedError("Keras writes its files from a live model alone: pass one to load into (model=, --like)")
    return source.model
