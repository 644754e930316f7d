"""Run the source and the canonical model on the same inputs and refuse a difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import EngineError, ModelError
from pipeline.graph.passes.convert_opset import least_ir_version
from pipeline.graph.sample import samples
from pipeline.model import read_proto
from pipeline.notices import notice
from pipeline.running.memory import open_session
from pipeline.running.session import Session, run
from pipeline.types import Feeds, TensorInfo

TOLERANCE = 1e-4
"""Largest max|canonical - source| / max|source| per output."""

COARSE = {"float16": 4e-3, "bfloat16": 3e-2}
"""The same for outputs in 16 bits, where one rounding step alone is 1e-3 (8e-3)."""


def compare(source: Path, canonical: Path, inputs: Sequence[TensorInfo], sample: Feeds | None) -> float | None:
    """Return the largest relative difference over all float outputs; ``None`` (and a notice) if nothing could be run.

    Raises:
        ModelError: The outputs differ by more than :data:`TOLERANCE`, or the canonical model does not run.
        EngineError: The given sample does not run on the source.
    """
    reference = _reference(source, inputs, sample)
    if reference is None:
        return None
    names, feeds, wanted = reference
    try:
        got = run(open_session(canonical, optimize=False), names, feeds)
    except EngineError as error:
        raise ModelError(
            f"The canonical graph does not run although the source does: {error.what}",
            where=str(source),
            fix="This is a defect of a graph pass: please report it with the model.",
        ) from error
    worst = 0.0
    for name, ours, theirs in zip(names, got, wanted, strict=True):
        worst = max(worst, _difference(name, ours, theirs, source))
    return worst


def _reference(
    source: Path, inputs: Sequence[TensorInfo], sample: Feeds | None
) -> tuple[list[str], Feeds, list[Any]] | None:
    try:
        live = _session(source)
    except EngineError as error:
        _not_compared(f"the source does not load: {error.what}", source)
        return None
    names = [output.name for output in live.get_outputs()]
    if sample is not None:
        return names, sample, run(live, names, sample)
    reason = ""
    if any(not value.type.startswith("tensor(") for value in live.get_inputs()):
        _not_compared("an input is a sequence or an optional", source)
        return None
    for feeds in samples(inputs):
        try:
            return names, feeds, run(live, names, feeds)
        except EngineError as error:
            reason = error.what
    _not_compared(f"no generated input runs: {reason}", source)
    return None


def _session(source: Path) -> Session:
    """Return a session of the source; if only its label is too new for ONNX Runtime, of a copy with an older one."""
    try:
        return open_session(source, optimize=False)
    except EngineError as error:
        if "IR version" not in error.what:
            raise
        proto = read_proto(source)
        version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
        proto.ir_version = min(proto.ir_version, least_ir_version(version))
        return open_session(proto.SerializeToString(), optimize=False, folder=source.parent)


def _not_compared(reason: str, source: Path) -> None:
    notice("not-compared", f"The canonical graph was not compared with the source; {reason[:300]}", where=str(source))


def _difference(name: str, ours: Any, theirs: Any, source: Path) -> float:
    """Return the relative difference of one output (0 for equal non-float outputs), or raise."""
    if isinstance(theirs, list):
        if not isinstance(ours, list) or len(ours) != len(theirs):
            raise _changed(name, "another number of sequence elements", source)
        return max((_difference(name, a, b, source) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    if theirs is None or isinstance(theirs, dict):
        if ours != theirs:
            raise _changed(name, "another value", source)
        return 0.0
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise _changed(name, f"{a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}", source)
    if b.dtype.kind in "biuOSU":
        if not np.array_equal(a, b):
            raise _changed(name, "other values", source)
        return 0.0
    return _float_difference(name, a, b, source)


def _float_difference(name: str, ours: Any, theirs: Any, source: Path) -> float:
    wide = np.complex128 if theirs.dtype.kind == "c" else np.float64
    a, b = ours.astype(wide), theirs.astype(wide)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        raise _changed(name, "NaN or infinite values", source)
    if not finite.any():
        return 0.0
    scale = float(np.abs(b[finite]).max())
    difference = float(np.abs(a[finite] - b[finite]).max()) / (scale or 1.0)
    if difference > COARSE.get(theirs.dtype.name, TOLERANCE):
        raise _changed(name, f"a relative difference of {difference:.2g}", source)
    return difference


def _changed(name: str, how: str, source: Path) -> ModelError:
    return ModelError(
        f"The canonical graph computes output {name!r} with {how}.",
        where=str(source),
        fix="This is a defect of a graph pass: please report it with the model.",
    )
