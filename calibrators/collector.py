"""Runs the FP32 model over calibration data and gathers statistics of the tensors that were asked for.

A tensor is exposed as a graph output once, however many requests and nodes want it, and for a histogram through the
first tensor that holds the same values (so a Transpose or Reshape stays fused). Batches are added to the statistics
as they come and dropped, so memory follows the batch and not the data.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from calibrators.exposure import Graph, constant, not_float, read_graph
from calibrators.observation import Observer, batch_rows, groups_that_fit
from calibrators.padding import kept_positions
from calibrators.sketch import Sketch
from calibrators.statistic import Statistic
from calibrators.statistics import Request, Statistics, empty_statistic
from pipeline.errors import DataError
from pipeline.model import sha256
from pipeline.types import Array, CalibrationData, Feeds, Progress, silent

if TYPE_CHECKING:
    from pipeline.running.segmented import Piece

__all__ = ["CollectOptions", "Request", "Statistics", "collect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """How to collect.

    Attributes:
        threads: Threads for ONNX Runtime and for the statistics; 0 is one per core.
        memory_bytes: Activations held at once; more tensors are collected in several passes over the data.
        mask: The input that is 0 at padding, ``[batch, positions]``; padding is left out of the statistics.
        shard: ``(i, n)``: use only the batches whose index is ``i`` modulo ``n``.
        refuse_nonfinite: Stop at the first NaN or infinity. Otherwise they are counted, and the tensor's range is
            refused when it is asked for.
        model_sha256: Hash of the model with its external data, where it is known; else every file of it is read.
    """

    threads: int = 0
    memory_bytes: int = 1 << 30
    mask: str | None = None
    shard: tuple[int, int] | None = None
    refuse_nonfinite: bool = True
    model_sha256: str = ""


def collect(
    model: Path,
    requests: Sequence[Request],
    data: CalibrationData,
    options: CollectOptions = CollectOptions(),
    progress: Progress = silent,
) -> Statistics:
    """Return the statistics of the requested tensors over ``data``.

    Args:
        model: The FP32 ``.onnx`` file.
        requests: What to observe; float tensors of the main graph.
        data: Batches; read once for every pass.
        options: Threads, memory, padding, shard.
        progress: Told (batches done, batches in all) under the stage ``calibrate``.

    Raises:
        ModelError: The model is broken or has no such tensor.
        DataError: No samples, a tensor that holds no floats, NaN or infinity (names the tensor and how many).
        EngineError: ONNX Runtime cannot run the model on the data.
    """
    started = time.perf_counter()
    _check(data, options)
    graph = read_graph(model)
    wanted = list(dict.fromkeys(requests))
    graph.check([request.tensor for request in wanted])
    sources = {request: _source(graph, request) for request in wanted}
    run = _Run(graph=graph, data=data, options=options, progress=progress)
    run.made = {source: empty_statistic(source) for source in sources.values()}
    run.constants()
    run.passes()
    result = Statistics(
        {request: run.made[source] for request, source in sources.items()},
        model_sha256=options.model_sha256 or model_digest(map(sha256, graph.files)),
        samples=run.samples,
        constants=frozenset(r for r, source in sources.items() if source.tensor in graph.constants),
    )
    result.seconds = time.perf_counter() - started
    result.fp32_forward_seconds = run.forward_seconds
    result.peak_rss_bytes = peak_rss_bytes()
    return result


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One collection as it goes on."""

    graph: Graph
    data: CalibrationData
    options: CollectOptions
    progress: Progress
    made: dict[Request, Statistic] = field(default_factory=dict)
    samples: int = 0
    forward_seconds: float = 0.0
    done: int = 0

    def constants(self) -> None:
        """Observe the requested initializers, once."""
        for request in self.made:
            if request.tensor in self.graph.constants:
                self._observe(request, constant(self.graph.path, request.tensor), None)

    def passes(self) -> None:
        """Read the data once for every group of tensors that fits the memory."""
        first = next(self._batches(), None)
        if first is None:
            raise _no_samples(self.options)
        order, threads = self.graph.order, self.options.threads
        computed = sorted({r.tensor for r in self.made if r.tensor in order}, key=lambda name: (order[name], name))
        observer = Observer(self.graph, computed, threads=threads)
        groups = groups_that_fit(observer, first, self.options.memory_bytes)
        # The number of batches is an estimate: data says how many samples it has, and batches may differ.
        shards = self.options.shard[1] if self.options.shard else 1
        total = max(1, math.ceil(len(self.data) / max(batch_rows(first), 1) / shards)) * len(groups) * observer.pieces
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            for index, group in enumerate(groups):
                if len(groups) > 1:
                    observer.close()
                    observer = Observer(self.graph, group, threads=threads)
                # Graph inputs come with the data and need no pass of their own.
                names = {*group, *(self.graph.inputs if index == 0 else ())}
                mine = [request for request in self.made if request.tensor in names]
                for piece in observer.stream(self._batches()):
                    self._piece(pool, piece, mine)
                    self.samples += batch_rows(piece.feeds) if index == 0 and piece.last else 0
                    self.done += 1
                    self.progress("calibrate", self.done, max(total, self.done))
                self.forward_seconds += observer.seconds
        for statistic in self.made.values():
            if isinstance(statistic, Sketch):
                statistic.settle()

    def _piece(self, pool: ThreadPoolExecutor, piece: Piece, mine: list[Request]) -> None:
        """Observe some tensors of a batch (with its last ones the inputs), and free them before others are computed."""
        keep = kept_positions(piece.feeds, self.options.mask) if self.options.mask else None
        values = piece.values | (piece.feeds if piece.last else {})
        inputs = [request.tensor for request in mine if request.tensor in self.graph.inputs]
        missing = next((tensor for tensor in inputs if tensor not in piece.feeds), None)
        if missing is not None:
            raise DataError(
                "The data does not provide this input.",
                where=f"input {missing}",
                fix=f"It provides {', '.join(piece.feeds)}.",
            )
        # The compiled loops run without the GIL, so tensors are counted side by side.
        here = [request for request in mine if request.tensor in values]
        for done in [pool.submit(self._observe, request, values[request.tensor], keep) for request in here]:
            done.result()
        piece.values.clear()

    def _observe(self, request: Request, values: Array, keep: Array | None) -> None:
        statistic = self.made[request]
        if values.dtype.kind != "f":
            raise not_float(request.tensor, str(values.dtype))
        before = statistic.nonfinite
        try:
            statistic.update(values, keep)
        except DataError as error:
            raise DataError(error.what, where=f"tensor {request.tensor}", fix=error.fix) from error
        bad = statistic.nonfinite - before
        if bad and self.options.refuse_nonfinite:
            raise DataError(
                f"The FP32 model computes {bad} NaN or infinite values here, so this tensor has no range.",
                where=f"tensor {request.tensor}, of {values.size} values in the batch",
                fix="Check the data and the model's weights, or keep the nodes that read this tensor in high precision.",
            )

    def _batches(self) -> Iterator[Feeds]:
        share, shards = self.options.shard or (0, 1)
        for index, feeds in enumerate(self.data):
            if index % shards == share:
                yield feeds


def _check(data: CalibrationData, options: CollectOptions) -> None:
    if len(data) == 0:
        raise _no_samples(options)
    if options.shard is not None:
        share, shards = options.shard
        if not 0 <= share < shards:
            raise DataError(
                f"There is no shard {share} of {shards}.",
                where="shard",
                fix=f"Use 0/{shards} to {shards - 1}/{shards}.",
            )


def _no_samples(options: CollectOptions) -> DataError:
    if options.shard is None:
        return DataError("The calibration data has no samples.", fix="Give at least one; 100 to 500 are a good number.")
    share, shards = options.shard
    return DataError(
        "This shard has no batches.", where=f"shard {share}/{shards}", fix="Use fewer shards or smaller batches."
    )


def _source(graph: Graph, request: Request) -> Request:
    """Return the request that is carried out for ``request``: a histogram does not see how values are arranged."""
    return Request(graph.origin(request.tensor)) if request.statistic == "sketch" else request


def model_digest(hashes: Iterable[str]) -> str:
    """Return one SHA-256 (hex) for those of a model's files: the ``.onnx`` first, then its external data by name."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, hashes))).hexdigest()
