"""Which adapter handles an object, found without importing any framework.

Adapters are entry points of the group "polyckpt.adapters". An entry point's name is a top-level package, its value the
adapter class for objects of that package, its extra the one to install: ``flax = polyckpt.adapters.jax:JaxAdapter [jax]``.
So a further framework registers itself from its own distribution, and nothing here changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from polyckpt.adapter import Adapter
from polyckpt.errors import AdapterError

GROUP = "polyckpt.adapters"
HOST = "numpy"
"""The adapter of host values: NumPy arrays, Python's and NumPy's random states. Others prevail over it in a mixed tree."""


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


@cache
def _load(value: str, package: str) -> Adapter:
    entry = _entries()[package]
    try:
        adapter: Adapter = entry.load()()
        return adapter
    except ImportError as error:
        extra = f"[{','.join(entry.extras)}]" if entry.extras else ""
        distribution = entry.dist.name if entry.dist else "polyckpt"
        raise AdapterError(
            f"objects of {package} need a package that cannot be imported: {error}. "
            f"Install it with: pip install '{distribution}{extra}'"
        ) from error


def check_known(package: str) -> None:
    """Raise AdapterError where no adapter is registered for the top-level `package`."""
    entries = _entries()
    if package not in entries:
        raise AdapterError(
            f"no adapter is registered for {package!r}; there are adapters for {', '.join(sorted(entries)) or 'nothing'}. "
            f"Install the distribution that provides it, or reinstall polyckpt if its own are missing"
        )


def named(package: str) -> Adapter:
    """The adapter for the top-level `package` (an adapter's own name is one). Raises AdapterError with an install hint."""
    check_known(package)
    return _load(_entries()[package].value, package)


def find(value: Any) -> Adapter | None:
    """The adapter for `value`: by its class, by what it contains, or because a framework in use recognises it."""
    packages = set(_packages(value))
    if len(packages) > 1:
        packages.discard(HOST)
    if len(packages) > 1:
        raise AdapterError(f"a {type(value).__name__} mixes objects of {' and '.join(sorted(packages))}: save them apart")
    return named(packages.pop()) if packages else None


def adapter_for(value: Any, what: str) -> Adapter:
    """As `find`, but raises AdapterError where there is none; `what` names the value in it."""
    if adapter := find(value):
        return adapter
    kind = type(value)
    raise AdapterError(
        f"{what}: no adapter handles a {kind.__module__}.{kind.__qualname__}; there are adapters for objects of "
        f"{', '.join(sorted(_entries())) or 'nothing'}"
    )


def by_class(value: Any) -> Adapter | None:
    """The adapter of the nearest known package among the classes of `value`, nearest first."""
    for kind in type(value).__mro__:
        if (package := kind.__module__.partition(".")[0]) in _entries():
            return named(package)
    return None


def _packages(value: Any) -> Iterator[str]:
    # No recursion, and each container once: what is searched may contain itself.
    seen: dict[int, Any] = {}
    classes: set[type] = set()  # that have an adapter
    stack = [value]
    while stack:
        node = stack.pop()
        if type(node) in classes:
            continue
        if adapter := by_class(node):
            classes.add(type(node))
            yield adapter.name
        elif isinstance(node, Mapping | list | tuple):
            if id(node) not in seen:
                seen[id(node)] = node
                stack.extend(node.values() if isinstance(node, Mapping) else node)
        elif not isinstance(node, str | bytes | int | float | complex | None):
            for package in _entries():
                if package in sys.modules and package != HOST and named(package).recognises(node):
                    yield named(package).name
                    break
