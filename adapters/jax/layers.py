"""What the layers of a model are: modules by the rows of their classes, dicts by conventions, all else as "custom"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax

from polyckpt import names
from polyckpt.adapters.jax import conventions, rows, trees
from polyckpt.adapters.jax.arrays import is_array
from polyckpt.adapters.jax.conventions import Found, Node
from polyckpt.layers import CUSTOM, axes
from polyckpt.leaves import Leaf
from polyckpt.schema import Layer, Role, to_number

Order = Literal["definition", "name"]


def describe(tree: Any, weights: Mapping[str, Leaf]) -> tuple[list[Layer], Order]:
    """A layer for every object that holds some of `weights`, and their order.

    Objects and sequences keep the order of definition; JAX sorts the keys of a dict.
    """
    structure = _structure(tree, weights)
    if structure is not None and _LAST and _LAST[0][0] == structure:
        return _LAST[0][1]
    described = _described(tree, weights)
    order: Order = "name" if described.sorted else "definition"
    if structure is not None:
        _LAST[:] = [(structure, (described.layers, order))]
    return described.layers, order


_LAST: list[tuple[Any, tuple[list[Layer], Order]]] = []
"""The structure that was described last, and its layers: a training loop saves the same one again and again."""


def _structure(tree: Any, weights: Mapping[str, Leaf]) -> Any:
    """All of a pytree on which its description depends; None where that cannot be compared, or objects of nnx are in it."""
    is_opaque = trees.opaque()
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_opaque)
    if is_opaque and any(map(is_opaque, leaves)):
        return None
    tensors = tuple([(name, leaf.shape, leaf.dtype) for name, leaf in weights.items()])
    others = tuple([(type(leaf), leaf) for leaf in leaves if not is_array(leaf)])
    try:
        hash((treedef, others))
    except (TypeError, ValueError):
        return None
    return treedef, others, tensors


def nodes(tree: Any) -> dict[str, tuple[Any, Layer]]:
    """What `describe` describes, by path: the object, module or dict, and the first layer that was made of it."""
    arrays = {name: entry for name, entry in trees.entries(tree, "model").items() if not trees.is_random(entry)}
    described = _described(tree, trees.capture(arrays, "model")[0])
    found: dict[str, tuple[Any, Layer]] = {}
    for node, layer in zip(described.nodes, described.layers, strict=True):
        found.setdefault(layer.path, (node, layer))
    return found


def _described(tree: Any, weights: Mapping[str, Leaf]) -> _Describer:
    # A model that is one array has no layer to it but itself.
    root = {"": tree} if isinstance(tree, jax.Array) else tree
    described = _Describer(tree, weights)
    described.recognise(root)
    described.visit(root, ())
    for node, path in described.states:
        described.visit(node, path)
    return described


class _Describer:
    def __init__(self, tree: Any, weights: Mapping[str, Leaf]) -> None:
        self.layers: list[Layer] = []
        self.nodes: list[Any] = []
        self.states: list[tuple[Any, tuple[Any, ...]]] = []
        self.sorted = False
        self._weights = weights
        # A shared Variable has one name, wherever a module is met.
        self._variables = {id(variable): path for variable, path in trees.variable_paths(tree)}
        self._conventional: dict[tuple[Any, ...], Found] = {}
        self._values: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        self._directions: dict[int, str] = {}
        self._taken: set[str] = set()
        self._seen: set[int] = set()

    def recognise(self, root: Any) -> None:
        """Find what can be told only from the whole tree: layers that are dicts, and states of Equinox beside the model."""
        dicts: dict[tuple[Any, ...], Node] = {}
        self._survey(root, (), dicts)
        self._conventional = conventions.recognise(dicts)
        self._taken.update(name for found in self._conventional.values() for name, _ in found.roles.values())
        if len(self.states) == 1:  # the indices of two models are alike
            state, path = self.states[0]
            values, markers = state.tree_flatten()
            self._values = {
                marker: (value, (*path, place)) for place, (marker, value) in enumerate(zip(markers, values, strict=True))
            }

    def _survey(self, node: Any, path: tuple[Any, ...], dicts: dict[tuple[Any, ...], Node]) -> None:
        if trees.is_graph(node):
            return
        if trees.is_state(node):
            self.states.append((node, path))
            return
        below = [(segment, *self._unwrapped(child, (*path, segment))) for segment, child in trees.children(node)]
        containers = [(segment, child, at) for segment, child, at in below if trees.is_node(child)]
        if isinstance(node, Mapping):
            arrays = {str(segment): names.join(at) for segment, child, at in below if self._is_weight(child, at)}
            dicts[path] = Node(
                arrays={key: (name, self._weights[name].shape) for key, name in arrays.items()},
                children=frozenset(str(segment) for segment, child, _ in containers if isinstance(child, Mapping)),
                foreign=len(below) != len(arrays) + sum(isinstance(child, Mapping) for _, child, _ in containers),
            )
        for _, child, at in containers:
            self._survey(child, at, dicts)

    def visit(self, node: Any, path: tuple[Any, ...], *, opaque: bool = False) -> None:
        """Add the layer of `node`, then those below it. opaque: within what changes weights before it applies them."""
        if trees.is_graph(node):
            if id(node) in self._seen:
                return
            self._seen.add(id(node))
        below = [(segment, *self._unwrapped(child, (*path, segment))) for segment, child in self._children(node)]
        self._directions.update((id(cell), way) for cell, way in rows.directed(node) if id(cell) not in self._directions)
        if found := self._conventional.get(path):
            roles = {name: (role, named) for role, (name, named) in found.roles.items()}
            self._add(node, path, found.kind, found.config, roles)
        elif not opaque:
            self._add_known(node, path)
        self.sorted |= (
            isinstance(node, Mapping) and not trees.is_graph(node) and sum(trees.is_node(child) for _, child, _ in below) > 1
        )
        own = {str(segment): names.join(at) for segment, child, at in below if self._is_weight(child, at)}
        if own:
            self._add(node, path, CUSTOM, {}, {name: (key, self._numbered(name)) for key, name in own.items()})
        for _, child, at in below:
            if (trees.is_graph(child) or trees.is_node(child)) and not trees.is_state(child):
                self.visit(child, at, opaque=opaque or rows.reparametrises(node))

    def _add_known(self, node: Any, path: tuple[Any, ...]) -> None:
        if (row := rows.row_of(node)) is None:
            return
        roles = row.roles(node)
        found = {key: name for key in roles if (name := self._resolve(node, path, key)) is not None}
        if not rows.is_plain(node) and self._below(path) - set(found.values()):
            # A call of its own with tensors of its own (low-rank adapters) is not what the row says.
            return
        # Stacked layers (vmap, scan) have further axes, which no row names.
        fits = all(len(axes(roles[key][1])) == len(self._weights[name].shape) for key, name in found.items())
        if fits and (found or row.kind == "dropout"):
            config = row.config(node)
            if direction := self._directions.get(id(node)):
                config = {**config, "direction": direction}
            self._add(node, path, row.kind, config, {name: roles[key] for key, name in found.items()})

    def _resolve(self, node: Any, path: tuple[Any, ...], key: str) -> str | None:
        """The name of the weight that is the attribute `key` of `node`, unless another layer has it."""
        for attribute in key.split("."):
            if isinstance(node, tuple):
                node, path = node[int(attribute)], (*path, int(attribute))
            elif isinstance(node, Mapping):
                key = next((each for each in node if str(each) == attribute), attribute)
                node, path = node.get(key), (*path, key)
            else:
                node, path = getattr(node, attribute, None), (*path, attribute)
                if type(node).__name__ == "StateIndex":
                    node, path = self._values.get(node.marker, (None, path))
        node, path = self._unwrapped(node, path)
        return names.join(path) if self._is_weight(node, path) else None

    def _below(self, path: tuple[Any, ...]) -> set[str]:
        """The weights at `path` and below it."""
        start = f"{names.join(path)}/" if path else ""
        return {name for name in self._weights if name.startswith(start)}

    def _unwrapped(self, child: Any, path: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        if trees.is_variable(child):
            return child.get_value(), self._variables.get(id(child), path)
        return child, path

    def _is_weight(self, child: Any, path: tuple[Any, ...]) -> bool:
        name = names.join(path)
        return hasattr(child, "shape") and name in self._weights and name not in self._taken

    def _children(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if not trees.is_graph(node):
            yield from trees.children(node)
            return
        for attribute, child in vars(node).items():
            if not attribute.startswith("_pytree__"):
                yield attribute, child

    def _numbered(self, name: str) -> str:
        return " ".join(f"a{axis}" for axis in range(len(self._weights[name].shape)))

    def _add(
        self,
        node: Any,
        path: tuple[Any, ...],
        kind: str,
        config: dict[str, Any],
        roles: Mapping[str, tuple[str, str]],
    ) -> None:
        """A layer of the tensors `roles`, as name -> (role, axes)."""
        described = {role: Role(tensor=name, axes=named) for name, (role, named) in roles.items()}
        numbers = {key: to_number(value) if isinstance(value, float) else value for key, value in config.items()}
        self._taken.update(roles)
        self.nodes.append(node)
        self.layers.append(Layer(path=names.join(path), kind=kind, type=names.type_name(node), config=numbers, roles=described))
