"""Whether a model's weights fit into memory, and a session that works either way."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import psutil

from pipeline import model as models
from pipeline.errors import ModelError
from pipeline.notices import notice
from pipeline.running.segmented import Piece, SegmentedSession
from pipeline.running.segments import weight_bytes
from pipeline.running.session import Session, run, session
from pipeline.types import Array, Feeds

SEGMENT_BYTES = 512 << 20
"""Most weights of a segment. Larger ones gain nothing: loading a segment costs milliseconds beside reading it."""

_given: contextvars.ContextVar[int | None] = contextvars.ContextVar("memory_bytes", default=None)


@contextlib.contextmanager
def weights_within(memory_bytes: int | None) -> Iterator[None]:
    """Let a model's weights take so much memory inside the block; ``None`` is half of what is free at the time."""
    token = _given.set(memory_bytes)
    try:
        yield
    finally:
        _given.reset(token)


def given_memory() -> int | None:
    """Return what the recipe says that weights may take, bytes; ``None`` where it says nothing."""
    return _given.get()


def weight_memory() -> int:
    """Return how many bytes of weights may be in memory at once."""
    given = _given.get()
    return psutil.virtual_memory().available // 2 if given is None else given


def fit(*paths: Path) -> bool:
    """Return whether the weights of all these models may be in memory together."""
    return sum(weight_bytes(models.read_proto(path)) for path in paths) <= weight_memory()


def open_session(
    model: Path | bytes,
    *,
    folder: Path | None = None,
    made_from: Path | None = None,
    threads: int = 0,
    optimize: bool = True,
    spin: bool = False,
    whole: bool | None = None,
) -> Session:
    """Return a session of a model, in segments if its weights do not fit into memory (:func:`weights_within`).

    Args:
        model: See :func:`pipeline.running.session.session`, as for the others.
        folder: As above.
        made_from: As above.
        threads: As above.
        optimize: As above.
        spin: As above; has no meaning in segments.
        whole: Whether it fits; if not given, that is looked up.

    Raises:
        EngineError: ONNX Runtime refuses the model, or a segment would hand on what is no tensor.
    """
    if _fits(model) if whole is None else whole:
        found: Session = session(
            model, folder=folder, made_from=made_from, threads=threads, optimize=optimize, spin=spin
        )
        return found
    place = model.parent if isinstance(model, Path) else folder
    assert place is not None
    proto = _in_order(model)
    notice(
        "runs-in-segments",
        f"{weight_bytes(proto) / 1e9:.1f} GB of weights do not fit into the memory they may take (memory_mb), so the "
        "model runs in segments, which takes longer",
    )
    limit = min(weight_memory(), SEGMENT_BYTES)
    return SegmentedSession(proto, place, threads=threads, optimize=optimize, segment_bytes=limit)


def stream(live: Session, outputs: Sequence[str], batches: Iterable[Feeds]) -> Iterator[Piece]:
    """Yield ``outputs`` of every batch; batches are in order for each output.

    Raises:
        EngineError: ONNX Runtime fails on a batch.
    """
    if isinstance(live, SegmentedSession):
        yield from live.stream(outputs, batches)
        return
    for feeds in batches:  # nothing here keeps the arrays of a piece that was dropped
        yield Piece(feeds=feeds, values=_outputs(live, list(outputs), feeds), last=True)


def _outputs(live: Session, names: list[str], feeds: Feeds) -> dict[str, Array]:
    return dict(zip(names, run(live, names, feeds), strict=True)) if names else {}


def _fits(model: Path | bytes) -> bool:
    if isinstance(model, bytes):
        return weight_bytes(onnx.load_from_string(model)) <= weight_memory()
    try:
        return fit(model)
    except ModelError:
        return True  # what is wrong with it ONNX Runtime says better


def _in_order(model: Path | bytes) -> onnx.ModelProto:
    """Return a model without its external data, its nodes in topological order."""
    if isinstance(model, bytes):
        return onnx.load_from_string(model)
    proto = ir.serde.serialize_model(models.load(model))
    assert isinstance(proto, onnx.ModelProto)
    return proto
