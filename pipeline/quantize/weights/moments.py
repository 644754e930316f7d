"""Moments of what GEMMs and convolutions multiply, ``X^T X`` and sums, in memory that does not grow with the batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pipeline import model as models
from pipeline.quantize.products import Product, Reading
from pipeline.running.memory import open_session, stream
from pipeline.types import Array, Feeds

F64 = npt.NDArray[np.float64]
K = TypeVar("K")

POSITIONS = 256
"""Output positions of a convolution that are seen of each sample, evenly spread: neighbours are much alike."""
MOST_TAPPED = 16
"""Feature maps read in one pass over the data: a batch of all of them is in memory at once."""


class Tap:
    """Runs a float model and yields some of its tensors.

    Args:
        path: The model.
        tensors: Tensors of the main graph.
        mask: The input that is 0 at padding, ``[batch, positions]``.
        threads: Threads for ONNX Runtime; 0 is one per core.
    """

    def __init__(self, path: Path, tensors: Sequence[str], *, mask: str | None, threads: int) -> None:
        model = models.load(path)
        values = {v.name: v for v in model.graph.inputs} | {v.name: v for n in model.graph for v in n.outputs}
        outputs = {v.name for v in model.graph.outputs}
        self.tensors, self.mask = tensors, mask
        self.computed = [t for t in tensors if not values[t].is_graph_input()]
        model.graph.outputs.extend(values[t] for t in self.computed if t not in outputs)
        serialized = ir.serde.serialize_model(model)
        assert isinstance(serialized, onnx.ModelProto)
        self.session = open_session(serialized.SerializeToString(), threads=threads, folder=path.parent, made_from=path)

    def arrays(self, data: Iterable[Feeds]) -> Iterator[tuple[str, Array, Array | None]]:
        """Yield every tensor's name and values for each batch, and the mask, 0 at padding; a tensor's batches are in order."""
        for piece in stream(self.session, self.computed, data):
            found = piece.values | (piece.feeds if piece.last else {})
            mask = piece.feeds.get(self.mask) if self.mask else None
            for tensor in self.tensors:
                if tensor in found:
                    yield tensor, found[tensor], mask
            del found
            piece.values.clear()  # freed before more is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """First and second moments of what a node multiplies, for each group of its channels.

    Attributes:
        count: Rows seen.
        total: Their sum, float64 ``[groups, products summed]``.
        gram: ``X^T X``, float64 ``[groups, products summed, products summed]``.
        magnitude: The sum of ``|X|``, float64 ``[groups, products summed]``.
    """

    count: int
    total: F64
    gram: F64
    magnitude: F64

    @property
    def mean(self) -> F64:
        """Return the mean row of each group."""
        return self.total / max(self.count, 1)

    @property
    def centred(self) -> F64:
        """Return ``X^T X`` of the rows less their mean."""
        found: F64 = self.gram - self.total[:, :, None] * self.total[:, None] / max(self.count, 1)
        return found


def second_moments(
    tap: Tap, data: Iterable[Feeds], readings: Mapping[str, Sequence[Reading]]
) -> dict[tuple[str, Reading], Moments]:
    """Return the moments of every tensor over all batches, for each way in which it is read.

    Each batch's product is computed in float32 (its sums are short) and added in float64.
    """
    found: dict[tuple[str, Reading], Moments] = {}
    for tensor, array, mask in tap.arrays(data):
        for reading in readings[tensor]:
            limit = None if reading.window is None else POSITIONS * len(array)
            new = _moments(reading.rows(array, mask, limit))
            old = found.get((tensor, reading))
            found[tensor, reading] = new if old is None else _added(old, new)
    return found


def _moments(rows: npt.NDArray[np.float32]) -> Moments:
    # A single matrix with its own transpose costs half.
    gram = (rows[0].T @ rows[0])[None] if len(rows) == 1 else rows.transpose(0, 2, 1) @ rows
    return Moments(
        count=rows.shape[1],
        total=rows.sum(axis=1, dtype=np.float64),
        gram=gram.astype(np.float64),
        magnitude=np.abs(rows).sum(axis=1, dtype=np.float64),
    )


def _added(old: Moments, new: Moments) -> Moments:
    return Moments(
        count=old.count + new.count,
        total=old.total + new.total,
        gram=old.gram + new.gram,
        magnitude=old.magnitude + new.magnitude,
    )


def fitting(sizes: Mapping[K, int], memory_bytes: int) -> Iterator[list[K]]:
    """Yield the keys in parts whose second moments (and one batch's product) fit the memory together.

    Args:
        sizes: What each key's moments take, from :func:`moment_bytes`.
        memory_bytes: The memory.
    """
    part: list[K] = []
    used = 0
    for key, size in sizes.items():
        if part and (used + size > memory_bytes or len(part) == MOST_TAPPED):
            yield part
            part, used = [], 0
        part.append(key)
        used += size
    if part:
        yield part


def moment_bytes(product: Product) -> int:
    """Return what the second moments of a product's input take while one batch's are added to them."""
    groups, summed = product.channels.shape
    return int(2 * 8 * groups * summed**2)
