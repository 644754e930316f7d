"""ONNX files through Ray's object store: no machine needs to see another's disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import model as models
from pipeline.executors.library import library
from pipeline.types import Array

PIECE_BYTES = 64 << 20
"""A file travels in pieces, so that neither side holds a whole one in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A graph and its external data in the object store.

    Attributes:
        name: File name of the ``.onnx``.
        folder: Where it lies on the machine that sent it; for messages.
        files: Name relative to the folder, and references to its pieces, each ``uint8``.
    """

    name: str
    folder: str
    files: tuple[tuple[str, tuple[Any, ...]], ...]


def send(graph: Path) -> Sent:
    """Put a graph with its external data into the object store of this node."""
    files = [(file.relative_to(graph.parent).as_posix(), file) for file in models.files(graph)]
    ray = library()
    return Sent(
        name=graph.name,
        folder=str(graph.parent),
        files=tuple((name, tuple(ray.put(piece) for piece in _pieces(file))) for name, file in files),
    )


def received(sent: Sent, folder: Path) -> Path:
    """Write what was sent into a folder of this machine and return the path of the ``.onnx`` there."""
    ray = library()
    for name, pieces in sent.files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for piece in pieces:
                stream.write(ray.get(piece))
    return folder / sent.name


def _pieces(path: Path) -> Iterator[Array]:
    with path.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            yield np.frombuffer(piece, np.uint8)
