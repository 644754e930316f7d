"""Memory, streams and events on the GPU: the only module that touches pycuda."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

from pipeline.errors import MissingError
from pipeline.types import Array


def _cuda() -> Any:
    """Return ``pycuda.driver`` with the device's primary context current, the one that TensorRT and Polygraphy use.

    Raises:
        MissingError: pycuda is not installed, or there is no GPU.
    """
    if importlib.util.find_spec("pycuda") is None:
        raise MissingError("Running an engine needs pycuda, which is not installed.", fix="pip install '.[tensorrt]'")
    driver = importlib.import_module("pycuda.driver")
    try:
        importlib.import_module("pycuda.autoprimaryctx")
    except driver.Error as error:
        raise MissingError(f"CUDA finds no GPU here: {error}.", fix="Run this on the machine with the GPU.") from error
    return driver


class DeviceBuffers:
    """Named device memory that grows as needed, and one stream for copies and kernels."""

    def __init__(self) -> None:
        self._driver = _cuda()
        self._memory: dict[str, Any] = {}
        self._bytes: dict[str, int] = {}
        self.stream = self._driver.Stream()

    def reserve(self, name: str, size_bytes: int) -> int:
        """Return the address of at least ``size_bytes`` bytes kept under ``name``."""
        if self._bytes.get(name, -1) < size_bytes:
            self._memory[name] = self._driver.mem_alloc(max(size_bytes, 1))
            self._bytes[name] = size_bytes
        return int(self._memory[name])

    def upload(self, name: str, array: Array) -> int:
        """Copy an array to the device and return its address; the copy is done when this returns."""
        held = np.ascontiguousarray(array)
        address = self.reserve(name, held.nbytes)
        self._driver.memcpy_htod_async(self._memory[name], held, self.stream)
        self.stream.synchronize()
        return address

    def event(self) -> Any:
        """Return a new CUDA event that keeps the time."""
        return self._driver.Event()

    def free(self) -> None:
        """Give all memory back."""
        for memory in self._memory.values():
            memory.free()
        self._memory.clear()
        self._bytes.clear()
