"""Checkpoints of TensorFlow, read by TensorFlow: whose variables they hold is told by the objects of a live Keras model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from polyckpt.adapter import Contents, ModelCapture
from polyckpt.adapters.keras import files, variables
from polyckpt.dtypes import lookup
from polyckpt.errors import CorruptError, MismatchError, UnsupportedError
from polyckpt.formats.described import Like, problems_of
from polyckpt.formats.detyped import Tree
from polyckpt.formats.tensorflow_files import prefix_of
from polyckpt.leaves import Leaf

_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_BOOKKEEPING = ("_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter")


def read(path: Path, like: Like | None) -> Contents:
    """The variables of a checkpoint by the paths of their objects; by the names of `like` where it has these objects.

    Raises CorruptError, and MismatchError where a `like` that is required is not in it.
    """
    prefix = prefix_of(path)
    if prefix is None:
        raise UnsupportedError(f"{path}: no checkpoint of TensorFlow")
    leaves = dict(_leaves(prefix))
    left_out: list[str] = []
    if like is not None:
        found = _found(path, leaves, like)
        if found is not None:
            kept = {
                name: dataclasses.replace(found[name], identity=leaf.identity) for name, leaf in like.captured.weights.items()
            }
            model = dataclasses.replace(like.captured, weights=kept, rng=None)
            slots = _slots(leaves)
            optimizer = files.optimizer_of(like.model, like.optimizer, slots, model, left_out) if slots else None
            return Contents(adapter="keras", model=model, optimizer=optimizer, left_out=left_out)
        if like.required:
            raise MismatchError(f"{path}: its variables are not those of `like`:", list(problems_of(leaves, like)))
    model = ModelCapture(type="variables", weights=leaves, order="name")
    return Contents(adapter="keras", model=model, left_out=left_out)


def _leaves(prefix: Path) -> Iterator[tuple[str, Leaf]]:
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    except Exception as error:  # TensorFlow has an error for each way in which a file may be damaged
        raise CorruptError(f"{prefix}: TensorFlow cannot read it: {str(error)[:300]}") from error
    for name in sorted(shapes):
        if name.partition("/")[0] in _BOOKKEEPING or dtypes[name] == tf.string:
            continue
        dtype = lookup(dtypes[name].name, f"{prefix}: {name}").name
        read_value = functools.partial(_value, prefix, reader, name)
        yield name.removesuffix(_SUFFIX), Leaf(dtype=dtype, shape=tuple(shapes[name]), read=read_value, frozen=True)


def _value(prefix: Path, reader: Any, name: str) -> np.ndarray:
    try:
        return np.ascontiguousarray(reader.get_tensor(name)).reshape(-1).view(np.uint8)
    except Exception as error:
        raise CorruptError(f"{prefix}: {name}: {str(error)[:300]}") from error


def _found(path: Path, leaves: dict[str, Leaf], like: Like) -> dict[str, Leaf] | None:
    """The weights of a live model in a checkpoint, by the paths of its objects, below whatever it was called there."""
    if keras.backend.backend() != "tensorflow":
        return None  # the model is no tree of TensorFlow's objects
    places = _places(like.model)
    live = variables.weights(like.model)
    if any(id(live[name]) not in places for name in like.captured.weights):
        return None
    wanted = {places[id(live[name])]: leaf.shape for name, leaf in like.captured.weights.items()}
    found = Tree(leaves).find(wanted, str(path))
    return None if found is None else {name: found[places[id(live[name])]] for name in like.captured.weights}


def _places(model: Any) -> dict[int, str]:
    """Each variable below an object -> the path by which a checkpoint calls it, which is the shortest."""
    view = tf.train.TrackableView(model)
    paths: dict[int, str] = {}
    level = [("", model)]
    seen = {id(model)}
    while level:
        following = []
        for path, node in level:
            for name, child in view.children(node).items():
                at = f"{path}/{_escaped(name)}".lstrip("/")
                if id(child) not in seen:
                    seen.add(id(child))
                    paths[id(child)] = at
                    following.append((at, child))
        level = following
    return paths


def _escaped(name: str) -> str:
    # As TensorFlow writes names of children, in which a slash would end one.
    return name.replace(".", "..").replace("/", ".S")


def _slots(leaves: dict[str, Leaf]) -> list[Leaf]:
    """The variables of an optimizer of Keras in order, where there is one."""
    found = {name: leaf for name, leaf in leaves.items() if "optimizer/_variables/" in name}
    return [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("/")[2]))]
