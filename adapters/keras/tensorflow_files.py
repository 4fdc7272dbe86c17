"""Checkpoints of TensorFlow, read by TensorFlow: whose variables they hold is told by the objects of a live Keras model.

A checkpoint holds the graph of the objects that were saved: which attribute of which leads to which, and under what key the
value of a variable lies. The attributes that lead to a variable of the live model are followed in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from msgspec import structs
from tensorflow.core.protobuf import trackable_object_graph_pb2

from polyckpt.adapter import Contents, ModelCapture
from polyckpt.adapters.keras import files, variables
from polyckpt.dtypes import lookup
from polyckpt.errors import CorruptError, MismatchError, UnsupportedError
from polyckpt.formats.described import Like, problems_of
from polyckpt.formats.tensorflow_files import prefix_of
from polyckpt.leaves import Leaf

_GRAPH, _COUNTER = "_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter"
_VALUE = "VARIABLE_VALUE"
_OPTIMIZER = {"_iterations", "_variables"}
"""Attributes by which an optimizer of Keras is known among objects."""


@dataclass(frozen=True, slots=True)
class _Node:
    """An object that was saved. children: attribute -> place among all. key: of its value, None where it is no variable."""

    children: Mapping[str, int]
    key: str | None

    @property
    def is_optimizer(self) -> bool:
        return self.children.keys() >= _OPTIMIZER


def read(path: Path, like: Like | None) -> Contents:
    """The variables of a checkpoint by the paths of their objects; by the names of `like` where it has these objects.

    Raises CorruptError; UnsupportedError for a `like` on another backend; MismatchError where a required one is not in it,
    or where several objects in it fit.
    """
    prefix = prefix_of(path)
    if prefix is None:
        raise UnsupportedError(f"{path}: no checkpoint of TensorFlow")
    reader = _reader(prefix)
    leaves = dict(_leaves(prefix, reader))
    nodes = _nodes(prefix, reader)
    left_out: list[str] = []
    if like is not None:
        if (backend := keras.backend.backend()) != "tensorflow":
            raise UnsupportedError(
                f"{path}: which variable is which, only a model that is made of TensorFlow's objects tells, and this one is on "
                f"{backend}: set KERAS_BACKEND=tensorflow, and save a .keras or a checkpoint of polyckpt from there"
            )
        found = _found(path, nodes, leaves, like)
        if found is not None:
            kept = {name: structs.replace(found[name], identity=leaf.identity) for name, leaf in like.captured.weights.items()}
            model = dataclasses.replace(like.captured, weights=kept, rng=None)
            values = _optimizer(nodes, leaves, left_out)
            optimizer = files.optimizer_of(like.model, [like.optimizer], values, model, left_out)
            return Contents(adapter="keras", model=model, optimizer=optimizer, left_out=left_out)
        if like.required:
            raise MismatchError(
                f"{path}: its variables are not those of `like`:", list(problems_of(_by_path(nodes, leaves), like))
            )
    model = ModelCapture(type="variables", weights=_by_path(nodes, leaves), order="name")
    return Contents(adapter="keras", model=model, left_out=left_out)


def _reader(prefix: Path) -> Any:
    try:
        return tf.train.load_checkpoint(str(prefix))
    except Exception as error:  # TensorFlow has an error for each way in which a file may be damaged
        raise CorruptError(f"{prefix}: TensorFlow cannot read it: {str(error)[:300]}") from error


def _leaves(prefix: Path, reader: Any) -> Iterator[tuple[str, Leaf]]:
    """Every value by its key."""
    shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    for key in sorted(shapes):
        if key.partition("/")[0] == _COUNTER or dtypes[key] == tf.string:
            continue
        dtype = lookup(dtypes[key].name, f"{prefix}: {key}").name
        yield key, Leaf(dtype=dtype, shape=tuple(shapes[key]), read=functools.partial(_value, prefix, reader, key), frozen=True)


def _value(prefix: Path, reader: Any, key: str) -> np.ndarray:
    try:
        return np.ascontiguousarray(reader.get_tensor(key)).reshape(-1).view(np.uint8)
    except Exception as error:
        raise CorruptError(f"{prefix}: {key}: {str(error)[:300]}") from error


def _nodes(prefix: Path, reader: Any) -> list[_Node]:
    """The objects that were saved, the root first; none in a checkpoint of a Saver, which has names alone."""
    if not reader.has_tensor(_GRAPH):
        return []
    try:
        graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(reader.get_tensor(_GRAPH))
    except Exception as error:
        raise CorruptError(f"{prefix}: its graph of objects cannot be read: {str(error)[:300]}") from error
    found = []
    for node in graph.nodes:
        children = {child.local_name: child.node_id for child in node.children}
        if not all(0 <= child < len(graph.nodes) for child in children.values()):
            raise CorruptError(f"{prefix}: its graph of objects refers to objects that are not there")
        found.append(_Node(children, next((each.checkpoint_key for each in node.attributes if each.name == _VALUE), None)))
    return found


def _by_path(nodes: Sequence[_Node], leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The values by the path of the object from the root, the shortest that does not lead through an optimizer."""
    named: dict[str, str] = {}
    seen = {0}
    waiting: list[list[tuple[str, int]]] = [[("", 0)], []]
    while any(waiting):
        path, place = (waiting[0] or waiting[1]).pop(0)
        node = nodes[place] if nodes else _Node({}, None)
        if node.key is not None and node.key in leaves:
            named.setdefault(node.key, path)
        for name, child in node.children.items():
            if child not in seen or nodes[child].key is not None:
                seen.add(child)
                later = nodes[child].is_optimizer or node.is_optimizer
                waiting[later].append((f"{path}/{_escaped(name)}".lstrip("/"), child))
    return {named.get(key, key): leaf for key, leaf in leaves.items()}


def _escaped(name: str) -> str:
    # As TensorFlow writes names of children, in which a slash would end one.
    return name.replace(".", "..").replace("/", ".S")


def _found(path: Path, nodes: Sequence[_Node], leaves: Mapping[str, Leaf], like: Like) -> dict[str, Leaf] | None:
    """The weights of a live model in a checkpoint, whatever it was called there."""
    places = _places(like.model)
    live = variables.weights(like.model)
    trained = {id(each): place for place, each in enumerate(like.model.trainable_variables)}
    listed = _trained(nodes)
    wanted = like.captured.weights
    fitting: dict[tuple[str | None, ...], str] = {}
    for start, called in _starts(nodes).items():
        keys = []
        for name in wanted:
            key = _key(nodes, start, places[id(live[name])]) if id(live[name]) in places else None
            if key is None and len(listed) == len(trained) and id(live[name]) in trained:
                # TensorFlow follows no lists of layers; what is in one is saved by way of the optimizer alone.
                key = listed[trained[id(live[name])]]
            keys.append(key)
        shapes = [leaves[key].shape if key is not None and key in leaves else None for key in keys]
        if shapes == [leaf.shape for leaf in wanted.values()]:
            fitting.setdefault(tuple(keys), called)
    if len(fitting) > 1:
        called = ", ".join(sorted(fitting.values()))
        raise MismatchError(f"{path}: several objects in it fit the model, and which is meant is not known: {called}")
    return {name: leaves[str(key)] for keys in fitting for name, key in zip(wanted, keys, strict=True)} or None


def _starts(nodes: Sequence[_Node]) -> dict[int, str]:
    """Where in a checkpoint a model may be: the root, and what it and its attributes lead to."""
    found = {0: "the root"} if nodes else {}
    for name, place in list(nodes[0].children.items()) if nodes else ():
        found.setdefault(place, name)
        for below, child in nodes[place].children.items():
            found.setdefault(child, f"{name}/{below}")
    return found


def _key(nodes: Sequence[_Node], start: int, path: Sequence[str]) -> str | None:
    """The key of the value that attributes lead to."""
    place: int | None = start
    for name in path:
        place = nodes[place].children.get(name) if place is not None else None
    return None if place is None else nodes[place].key


def _places(model: Any) -> dict[int, tuple[str, ...]]:
    """Each object below a live one -> the attributes that lead there, but for those of optimizers."""
    view = tf.train.TrackableView(model)
    paths: dict[int, tuple[str, ...]] = {id(model): ()}
    waiting = [model]
    while waiting:
        node = waiting.pop(0)
        for name, child in view.children(node).items():
            if id(child) not in paths and not isinstance(child, keras.optimizers.Optimizer):
                paths[id(child)] = (*paths[id(node)], name)
                waiting.append(child)
    return paths


def _optimizer(nodes: Sequence[_Node], leaves: Mapping[str, Leaf], left_out: list[str]) -> list[Leaf]:
    """The variables of the optimizer of Keras in order, those of one that it wraps after its own; none of several."""
    found = _optimizers(nodes)
    if len(found) > 1:
        left_out.append(f"optimizer: there are {len(found)}, and which is that of the model is not known")
    if len(found) != 1:
        return []
    listed: list[str | None] = []
    place: int | None = found[0]
    while place is not None:
        listed += _listed(nodes, place, "_variables")
        place = nodes[place].children.get("inner_optimizer")
    return [leaves[key] for key in listed if key is not None and key in leaves]


def _optimizers(nodes: Sequence[_Node]) -> list[int]:
    """Those that no other one wraps."""
    inner = {node.children.get("inner_optimizer") for node in nodes if node.is_optimizer}
    return [place for place, node in enumerate(nodes) if node.is_optimizer and place not in inner]


def _trained(nodes: Sequence[_Node]) -> list[str | None]:
    """The keys of what the one optimizer trains, in the order of the model's trainable variables."""
    found = _optimizers(nodes)
    if len(found) != 1:
        return []
    return _listed(nodes, nodes[found[0]].children.get("inner_optimizer", found[0]), "_trainable_variables")


def _listed(nodes: Sequence[_Node], place: int, attribute: str) -> list[str | None]:
    """The keys of the variables in a list that is an attribute of an object."""
    children = nodes[place].children
    held = nodes[children[attribute]].children if attribute in children else {}
    return [nodes[held[name]].key for name in sorted(held, key=lambda name: (len(name), name))]
