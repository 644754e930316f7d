"""Record what a stream does once and launch it as one CUDA graph: pycuda has no graphs, so the driver is called itself.

Source: CUDA driver API, "Graph Management" and "Stream Management" (cuStreamBeginCapture_v2 to cuGraphLaunch).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Self

from pipeline.errors import EngineError

_THREAD_LOCAL = 1
"""``CU_STREAM_CAPTURE_MODE_THREAD_LOCAL``: other threads' CUDA calls do not break the recording."""


class CudaGraph:
    """Work of one stream, recorded; a context manager that frees the graph.

    Args:
        stream: Handle of the stream (``CUstream``).
        enqueue: Puts the work on that stream; called once. The same work must have run before, because memory may not
            be allocated while recording.
    """

    def __init__(self, stream: int, enqueue: Callable[[], None]) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p(stream)
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_THREAD_LOCAL))
        try:
            enqueue()
        finally:
            self._call("cuStreamEndCapture", self._stream, ctypes.byref(self._graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), self._graph, ctypes.c_ulonglong(0))

    def launch(self) -> None:
        """Put the recorded work on the stream again."""
        self._call("cuGraphLaunch", self._executable, self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._call("cuGraphExecDestroy", self._executable)
        self._call("cuGraphDestroy", self._graph)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise EngineError(
                f"CUDA refuses {name} (error {status}).",
                fix="Measure without a CUDA graph: this engine cannot be recorded.",
            )
