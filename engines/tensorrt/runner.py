"""Run an engine on the GPU, through Polygraphy's runner: what validation compares with FP32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from engines.tensorrt.flavour import Flavour, require, select
from pipeline.errors import EngineError, MissingError
from pipeline.types import Array, TensorInfo


class TrtRunner:
    """Runs one engine; GPU memory is held inside the ``with`` block. A :class:`pipeline.types.Runner`.

    Args:
        path: A serialized engine.
        flavour: Which TensorRT it is for; a process runs one flavour only.

    Raises:
        MissingError: The package or a GPU is missing.
        EngineError: The engine does not load here: another GPU, another version, a broken file.
    """

    def __init__(self, path: Path, *, flavour: Flavour = Flavour.TENSORRT) -> None:
        require(flavour, "Running an engine")
        select(flavour)
        self.path = path
        self._engine = load_engine(path)
        from polygraphy.backend.trt import TrtRunner as PolygraphyRunner

        self.inputs = _tensors(self._engine, "INPUT")
        self.outputs = _tensors(self._engine, "OUTPUT")
        self._profile = 0
        self._runner: Any = PolygraphyRunner(self._engine)
        self._active = False

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output for one batch, copied to the host.

        Args:
            feeds: An array for each input, in the input's dtype.

        Raises:
            EngineError: A feed is missing or unknown, no profile takes its shape, or the engine fails.
        """
        if not self._active:
            raise EngineError("The runner is closed.", where=str(self.path), fix="Use it inside its `with` block.")
        odd = sorted(set(feeds) ^ {info.name for info in self.inputs})
        if odd:
            raise EngineError(
                f"The engine's inputs and the feeds differ in {', '.join(odd)}.",
                where=str(self.path),
                fix=f"Feed exactly {', '.join(info.name for info in self.inputs)}.",
            )
        profile = profile_for(self._engine, feeds, self.path)
        if profile != self._profile:
            self._runner.set_profile(profile)
            self._profile = profile
        ready = {i.name: np.ascontiguousarray(feeds[i.name], dtype=i.dtype) for i in self.inputs}
        # The runner's host buffers are used again by the next batch.
        return {name: np.array(value) for name, value in self._runner.infer(ready).items()}

    def __enter__(self) -> Self:
        self._runner.activate()
        self._active = True
        return self

    def __exit__(self, *exc: object) -> None:
        if self._active:
            self._runner.deactivate()
        self._active = False


def load_engine(path: Path) -> Any:
    """Return the ``ICudaEngine`` of a file.

    Raises:
        MissingError: There is no CUDA driver or GPU.
        EngineError: The file cannot be read, or TensorRT refuses it; quotes the reason.
    """
    from engines.tensorrt.binding import trt
    from engines.tensorrt.observers import MessageLog
    from engines.tensorrt.refusal import builder_errors

    log = MessageLog()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(
            f"The engine cannot be read: {error.strerror}.", where=str(path), fix="Check the path."
        ) from error
    try:
        engine = trt.Runtime(log).deserialize_cuda_engine(data)
    except (RuntimeError, TypeError) as error:
        # Without a driver the runtime itself cannot be made.
        raise MissingError(
            "No GPU is here to run an engine on.", where=str(path), fix="Run this on the machine with the GPU."
        ) from error
    if engine is None:
        reasons = "; ".join(builder_errors(log.messages)) or "it gives no reason"
        raise EngineError(
            f"TensorRT {trt.__version__} does not load the engine: {' '.join(reasons.split())[:300]}",
            where=str(path),
            fix="Build it again on this GPU and with this version.",
        )
    return engine


def profile_for(engine: Any, feeds: Mapping[str, Array], path: Path) -> int:
    """Return the first optimization profile that takes the feeds' shapes.

    Raises:
        EngineError: None does; lists what the profiles take.
    """
    takes = []
    for index in range(engine.num_optimization_profiles):
        ends = {name: engine.get_tensor_profile_shape(name, index) for name in feeds}
        if all(_within(feeds[name].shape, least, most) for name, (least, _, most) in ends.items()):
            return index
        takes.append(", ".join(f"{name} {tuple(low)} to {tuple(high)}" for name, (low, _, high) in ends.items()))
    shapes = ", ".join(f"{name} {value.shape}" for name, value in feeds.items())
    raise EngineError(
        f"No optimization profile of the engine takes {shapes}.",
        where=str(path),
        fix=f"It takes {' or '.join(takes)}; build with other builder.profiles.",
    )


def _within(shape: tuple[int, ...], least: Any, most: Any) -> bool:
    return len(shape) == len(least) and all(lo <= size <= hi for lo, size, hi in zip(least, shape, most, strict=True))


def _tensors(engine: Any, mode: str) -> tuple[TensorInfo, ...]:
    from engines.tensorrt.binding import trt

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return tuple(
        TensorInfo(
            name=name,
            dtype=np.dtype(trt.nptype(engine.get_tensor_dtype(name))),
            shape=tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(name)),
        )
        for name in names
        if engine.get_tensor_mode(name) == getattr(trt.TensorIOMode, mode)
    )
