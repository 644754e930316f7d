"""The ``cpu`` engine and every simulation: a Q/DQ or float ONNX model as ONNX Runtime runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

from pipeline.errors import EngineError
from pipeline.running.memory import open_session, stream
from pipeline.running.segmented import in_order
from pipeline.running.session import Session
from pipeline.types import Array, TensorInfo

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
    "tensor(float8e4m3fn)": ml_dtypes.float8_e4m3fn,
}
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


class OnnxRuntimeRunner:
    """Runs one ONNX model on the CPU provider; the session lives inside the ``with`` block.

    Args:
        path: The model; external data beside it.
        threads: Intra-op threads, 0 for one per core.
        optimize: ``False`` runs every Q/DQ node as it stands in the graph.
        whole: Whether the model fits into memory; if not given, that is looked up. One that does not runs in segments.
    """

    def __init__(self, path: Path, *, threads: int = 0, optimize: bool = True, whole: bool | None = None) -> None:
        self.path = path
        live = open_session(path, threads=threads, optimize=optimize, spin=True, whole=whole)
        self.inputs = tuple(tensor_info(value) for value in live.get_inputs())
        self.outputs = tuple(tensor_info(value) for value in live.get_outputs())
        self._session: Session | None = live

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output for one batch.

        Args:
            feeds: An array for each input, in the input's dtype; names that the model lacks are an error.

        Raises:
            EngineError: A feed is missing or unknown, or ONNX Runtime fails on it.
        """
        return next(self.infer_all([feeds]))

    def infer_all(self, batches: Iterable[Mapping[str, Array]]) -> Iterator[dict[str, Array]]:
        """Yield every output of one batch after the other; in segments, many batches share one reading of the weights.

        Raises:
            EngineError: As for :meth:`infer`.
        """
        if self._session is None:
            raise EngineError("The runner is closed.", where=str(self.path), fix="Use it inside its `with` block.")
        given = ({name: ort_value(values) for name, values in feeds.items()} for feeds in batches)
        for found in in_order(stream(self._session, [info.name for info in self.outputs], given)):
            # ONNX Runtime gives FP8 as bytes.
            yield {
                info.name: found[info.name].view(_FP8) if info.dtype == _FP8 else found[info.name]
                for info in self.outputs
            }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None


def ort_value(values: Array) -> Array | ort.OrtValue:
    """Return what ONNX Runtime takes for an array: FP8, which numpy knows as an extension, as a value of its own."""
    if values.dtype != _FP8:
        return values
    stored = np.ascontiguousarray(values).view(np.uint8)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, onnx.TensorProto.FLOAT8E4M3FN)


def tensor_info(value: object) -> TensorInfo:
    """Return name, numpy dtype and shape of a session's input or output."""
    dtype = _DTYPES.get(value.type, np.object_)  # type: ignore[attr-defined]
    return TensorInfo(name=value.name, dtype=np.dtype(dtype), shape=tuple(value.shape))  # type: ignore[attr-defined]
