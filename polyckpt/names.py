"""Names made of segments, joined so that they can be taken apart again.

A producer's keys may hold any character, "." and "/" included, so segments are escaped as in a JSON pointer (RFC 6901):
"~" becomes "~0" and "/" becomes "~1". An empty segment becomes "~2", so that the empty name stands for the root alone.
"""

from __future__ import annotations

from collections.abc import Iterable


def join(segments: Iterable[object]) -> str:
    """One name from path segments.

    >>> join(["params", "Dense_0", "kernel"])
    'params/Dense_0/kernel'
    >>> join(["mlp/~/linear_0", "w"])
    'mlp~1~0~1linear_0/w'
    >>> join([])
    ''
    """
    return "/".join([str(segment).replace("~", "~0").replace("/", "~1") or "~2" for segment in segments])


def split(name: str) -> list[str]:
    """The segments that `join` was given.

    >>> split('mlp~1~0~1linear_0/w')
    ['mlp/~/linear_0', 'w']
    """
    if not name:
        return []
    return ["" if part == "~2" else part.replace("~1", "/").replace("~0", "~") for part in name.split("/")]


def type_name(value: object) -> str:
    """The class of `value` as manifests name it.

    >>> from collections import OrderedDict
    >>> type_name(OrderedDict())
    'collections.OrderedDict'
    """
    return f"{type(value).__module__}.{type(value).__qualname__}"
