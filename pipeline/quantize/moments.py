"""Moments of GEMM inputs, ``X^T X`` and sums, added up over calibration batches in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pipeline import model as models
from pipeline.session import run, session
from pipeline.types import Array, Feeds

F64 = npt.NDArray[np.float64]


class Tap:
    """Runs a float model and yields some of its tensors, one row a position, padding left out.

    Args:
        path: The model.
        tensors: Tensors of the main graph whose last axis is the channel.
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
        self.session = session(serialized.SerializeToString(), threads=threads, folder=path.parent, made_from=path)

    def rows(self, feed: Feeds) -> Iterator[tuple[str, Array]]:
        """Yield every tensor's rows for one batch, ``[rows, channels]``."""
        found = dict(feed)
        if self.computed:  # without a name ONNX Runtime would return every output
            found |= zip(self.computed, run(self.session, self.computed, dict(feed)), strict=True)
        mask = feed.get(self.mask) if self.mask else None
        for tensor in self.tensors:
            array = found[tensor]
            if mask is not None and array.ndim >= 3 and array.shape[:2] == mask.shape:
                array = array[mask != 0]
            yield tensor, array.reshape(-1, array.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """First and second moments of a GEMM's input.

    Attributes:
        count: Rows seen.
        total: Their sum, float64 ``[channels]``.
        gram: ``X^T X``, float64 ``[channels, channels]``.
    """

    count: int
    total: F64
    gram: F64

    @property
    def mean(self) -> F64:
        """Return the mean row, ``[channels]``."""
        return self.total / max(self.count, 1)

    @property
    def centred(self) -> F64:
        """Return ``X^T X`` of the rows less their mean, ``[channels, channels]``."""
        found: F64 = self.gram - np.outer(self.total, self.total) / max(self.count, 1)
        return found


def second_moments(tap: Tap, data: Iterable[Feeds]) -> dict[str, Moments]:
    """Return the moments of every tensor over all batches.

    Each batch's product is computed in float32 (its sums are short) and added in float64.
    """
    found: dict[str, Moments] = {}
    for feed in data:
        for tensor, array in tap.rows(feed):
            values = array.astype(np.float32)
            gram, total = (values.T @ values).astype(np.float64), values.sum(axis=0, dtype=np.float64)
            old = found.get(tensor)
            if old is None:
                found[tensor] = Moments(count=len(values), total=total, gram=gram)
            else:
                found[tensor] = Moments(count=old.count + len(values), total=old.total + total, gram=old.gram + gram)
    return found
