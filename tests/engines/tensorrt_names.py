"""Which of TensorRT's names some code uses, and which versions have them (``tensorrt_api.tsv``)."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("tensorrt_api.tsv")
Version = tuple[int, int]

OF_THE_PACKAGE = ("__version__", "nptype", "init_libnvinfer_plugins")
"""Names that the package ``tensorrt`` adds to its bindings."""


@cache
def table() -> tuple[tuple[Version, ...], dict[str, tuple[Version, Version]]]:
    """Return the versions looked at, and for each name the first and the last that has it."""
    head, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines)
    return tuple(map(_version, head.split("\t")[1].split())), {n: (_version(a), _version(b)) for n, a, b in rows}


def _version(text: str) -> Version:
    major, minor = text.split(".")
    return int(major), int(minor)


def has(name: str, version: Version) -> bool:
    """Return whether a version has ``Class`` or ``Class.attribute``."""
    span = table()[1].get(name)
    return span is not None and span[0] <= version <= span[1]


def names_lacking(source: str, version: Version) -> set[str]:
    """Return the names in Python source that are TensorRT's in some version but not in this one.

    ``trt.Class.ATTRIBUTE`` is looked up as it stands; of ``anything.attribute`` only the attribute is known, so it is
    lacking where classes that we use had it once and none has it in this version.
    """
    lacking = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        inner = node.value
        of_class = isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "trt"
        if isinstance(inner, ast.Name) and inner.id == "trt":
            if node.attr not in OF_THE_PACKAGE and not has(node.attr, version):
                lacking.add(node.attr)
            continue
        if of_class and not node.attr.startswith("__"):
            name = ast.unparse(node).removeprefix("trt.")
            lacking |= set() if has(name, version) else {name}
            continue
        # Members of enumerations are only met behind their class.
        classes = [] if node.attr.isupper() else [n for n in table()[1] if n.endswith(f".{node.attr}")]
        if classes and not any(has(name, version) for name in classes):
            lacking.add(node.attr)
    return lacking
