"""Nested arguments and results as flat, named lists: ONNX knows only tensors with names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

CONSTANTS = (type(None), bool, int, float, str)


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(name, leaf)`` for everything in ``value`` that is no dict, list or tuple.

    A name is the path of keys joined by ``_``: ``{"a": (x, y)}`` gives ``a_0`` and ``a_1``; fields of a named tuple
    are named.
    """
    for key, item in _items(value):
        yield from flatten(item, f"{name}_{key}" if name else str(key))
    if not isinstance(value, Mapping | list | tuple):
        yield name, value


def rebuild(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return ``value`` with ``leaf(x)`` in the place of each leaf ``x``, visited in the order of :func:`flatten`."""
    if isinstance(value, Mapping):
        return {key: rebuild(item, leaf) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuild(item, leaf) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(rebuild(item, leaf) for item in value)
    return leaf(value)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
