"""A session that computes chosen tensors of a model, and how many of them to compute at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from calibrators.exposure import Graph, expose, not_float
from pipeline.errors import EngineError
from pipeline.types import Array, Feeds

if TYPE_CHECKING:
    from pipeline.running.segmented import Piece
    from pipeline.running.session import Session

_FLOAT_TYPES = {"tensor(float)", "tensor(float16)", "tensor(double)"}


class Observer:
    """Computes tensors of a model for one batch at a time.

    Args:
        graph: The model's graph.
        tensors: Node outputs of the main graph; with none, nothing is run.
        threads: For ONNX Runtime; 0 is one per core.

    Attributes:
        tensors: What is computed.
        pieces: In how many pieces the tensors of a batch come; more than one if the model runs in segments.
        seconds: Wall-clock time spent in ONNX Runtime so far, without :meth:`sizes`.

    Raises:
        DataError: A tensor does not hold floats; names it.
        EngineError: ONNX Runtime refuses the model.
    """

    def __init__(self, graph: Graph, tensors: Sequence[str], *, threads: int = 0) -> None:
        from pipeline.running.memory import open_session  # onnxruntime: a quarter of a second
        from pipeline.running.segmented import SegmentedSession

        self.tensors = tuple(tensors)
        self._path = graph.path
        self.seconds = 0.0
        self._session: Session | None = None
        if tensors:
            try:
                self._session = open_session(expose(graph, tensors), threads=threads, folder=graph.path.parent)
            except EngineError as error:
                raise EngineError(error.what, where=str(graph.path), fix=error.fix) from error
        self.pieces = self._session.pieces(tensors) if isinstance(self._session, SegmentedSession) else 1
        for output in self._session.get_outputs() if self._session else ():
            if output.name in tensors and output.type not in _FLOAT_TYPES:
                raise not_float(output.name, output.type)

    def stream(self, batches: Iterable[Feeds]) -> Iterator[Piece]:
        """Yield every tensor of every batch; a piece that the caller clears is freed before the next one is computed."""
        from pipeline.running.memory import stream
        from pipeline.running.segmented import Piece

        if self._session is None:
            yield from (Piece(feeds=feeds, values={}, last=True) for feeds in batches)
            return
        pieces = stream(self._session, self.tensors, self._untimed(batches))
        while True:
            started = time.perf_counter()
            try:
                piece = next(pieces, None)
            except EngineError as error:
                raise EngineError(error.what, where=str(self._path), fix=error.fix) from error
            self.seconds += time.perf_counter() - started
            if piece is None:
                return
            yield piece

    def _untimed(self, batches: Iterable[Feeds]) -> Iterator[Feeds]:
        """Yield the batches, and take the time that making them needs off :attr:`seconds`."""
        source = iter(batches)
        while True:
            started = time.perf_counter()
            feeds = next(source, None)
            self.seconds -= time.perf_counter() - started
            if feeds is None:
                return
            yield feeds

    def sizes(self, feeds: Feeds) -> dict[str, int]:
        """Return the bytes of each tensor for this batch.

        Where the model leaves the batch size open, one sample is run and its sizes are multiplied.
        """
        rows = batch_rows(feeds)
        one = self._one_sample(feeds) if rows > 1 else None
        if one is not None:
            try:
                return {name: value.nbytes * rows for name, value in self._run(one).items()}
            except EngineError:
                pass  # a graph that ties its batch size to another input: measure the whole batch
        return {name: value.nbytes for name, value in self._run(feeds).items()}

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def _one_sample(self, feeds: Feeds) -> Feeds | None:
        if self._session is None:
            return None
        rows = batch_rows(feeds)
        one = dict(feeds)
        for item in self._session.get_inputs():
            value = feeds.get(item.name)
            if value is None or not value.ndim or value.shape[0] != rows:
                continue
            if item.shape and isinstance(item.shape[0], int):
                return None
            one[item.name] = value[:1]
        return one

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        if self._session is None:
            return {}  # no tensors
        from pipeline.running.session import run

        try:
            return dict(zip(self.tensors, run(self._session, list(self.tensors), feeds), strict=True))
        except EngineError as error:
            raise EngineError(error.what, where=str(self._path), fix=error.fix) from error


def groups_that_fit(observer: Observer, batch: Feeds, memory_bytes: int) -> list[list[str]]:
    """Return the observer's tensors in groups that together fit the memory; usually it is one.

    In segments a batch's tensors are held one segment at a time, and more passes would read all weights again: one group.

    Args:
        observer: Computes all of them, in the order of the graph, so that an early group does not need the later part
            of the model.
        batch: A typical batch.
        memory_bytes: Room for one batch of a group's tensors. A tensor that alone needs more has its own group.
    """
    if not observer.tensors or observer.pieces > 1:
        return [list(observer.tensors)]
    sizes = observer.sizes(batch)
    groups: list[list[str]] = []
    room = 0
    for tensor in observer.tensors:
        if not groups or sizes[tensor] > room:
            groups.append([])
            room = memory_bytes
        groups[-1].append(tensor)
        room -= sizes[tensor]
    return groups


def batch_rows(feeds: Feeds) -> int:
    """Return how many samples a batch holds."""
    shape = next((value.shape for value in feeds.values() if value.ndim), (1,))
    return int(shape[0])
