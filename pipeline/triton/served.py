"""What is published: a model, its engine file, and what each Triton backend expects of both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.tensorrt.profiles import Profile
from pipeline import model as models
from pipeline.errors import PublishError
from pipeline.running.memory import open_session
from pipeline.types import Feeds, TensorInfo

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names that are safe as a folder, in a URL and in the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A Triton backend that this package knows.

    Attributes:
        file: The engine's file in a version directory when the configuration names none.
        by_capability: The engine depends on the GPU: ``cc_model_filenames`` picks it and there is no default file,
            because the server falls back to that one silently on a GPU that the map lacks.
    """

    file: str
    by_capability: bool = False


BACKENDS = {
    "onnxruntime": Backend(file="model.onnx"),
    "tensorrt": Backend(file="model.plan", by_capability=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An engine of TensorRT.

    Attributes:
        file: ``model.plan``.
        target: The device that it was built for, as a recipe names it.
        tensorrt: Version of TensorRT that built it, and that must load it.
        profiles: Its optimization profiles, shapes with the batch dimension.
        version_compatible: Later versions of TensorRT load it too.
    """

    file: Path
    target: str
    tensorrt: str
    profiles: tuple[Profile, ...] = ()
    version_compatible: bool = False


PYTHON = "python"
"""The backend of what stands around an engine: a tokenizer, pooling."""

# What the onnxruntime backend accepts (its ModelConfigDataTypeToOnnxDataType): no bfloat16, no 4- or 8-bit floats.
TYPE_OF_ORT = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}

_NUMPY_OF_TYPE: dict[str, np.dtype[Any]] = {
    **{
        f"TYPE_{name.upper()}": np.dtype(name)
        for name in ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
    },
    "TYPE_FP16": np.dtype(np.float16),
    "TYPE_FP32": np.dtype(np.float32),
    "TYPE_FP64": np.dtype(np.float64),
    "TYPE_STRING": np.dtype(np.object_),
}

_TYPE_OF_NUMPY = {dtype: name for name, dtype in _NUMPY_OF_TYPE.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as it is to be served.

    Attributes:
        name: Model name: its folder in the repository and its name in requests.
        backend: ``onnxruntime`` or ``tensorrt``.
        engine: The engine file; external data beside it is published with it. For ``tensorrt`` the ONNX that the engines
            were built from, which is not published.
        inputs: Every input, with the batch dimension, as the backend sees them (see :func:`onnx_model`).
        outputs: Every output, likewise.
        threads: Intra-op threads of one instance; 0 lets ONNX Runtime take one per core.
        sample: Input name to the shape, with the batch dimension, of a real sample. It gives the warm-up request the
            dimensions that the model leaves open; without it a model that has such dimensions gets no warm-up.
        row: Input name to one real sample, with a batch dimension of 1 where the model forms batches; empty without one.
            The warm-up request carries it; without it the request is zeros.
        engines: For ``tensorrt``: compute capability (``8.0``) to the engine for it.
        at_load: For ``onnxruntime`` on a GPU: the profiles that its TensorRT provider builds an engine for when the model is
            loaded; ``None`` runs the model on the CPU.
        labels: Text file with the name of a class on each line; ``None`` for a model that gives no classes.
    """

    name: str
    backend: str
    engine: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    threads: int = 0
    sample: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    row: Feeds = field(default_factory=dict)
    engines: Mapping[str, Plan] = field(default_factory=dict)
    at_load: tuple[Profile, ...] | None = None
    labels: Path | None = None


def plan_name(capability: str) -> str:
    """Return the file name of the engine for a compute capability: ``8.0`` is ``sm80.plan``."""
    return f"sm{capability.replace('.', '')}.plan"


def onnx_model(
    engine: Path,
    *,
    name: str,
    threads: int = 0,
    sample: Mapping[str, tuple[int, ...]] | None = None,
    row: Feeds | None = None,
    labels: Path | None = None,
) -> ServedModel:
    """Return the ONNX model at ``engine`` with the inputs and outputs that ONNX Runtime reports.

    The backend compares the configuration with these, not with what the file declares: ONNX Runtime replaces a
    declared symbol by the number it infers, and an output declared ``[N, a]`` but inferred ``[N, 5]`` refuses ``-1``.

    Raises:
        EngineError: ONNX Runtime cannot load the model.
        ModelError: The model only simulates a quantization scheme.
    """
    models.refuse_simulation(models.load(engine), engine)
    live = open_session(engine, threads=1, optimize=False)
    return ServedModel(
        name=name,
        backend="onnxruntime",
        engine=engine,
        inputs=tuple(_info(value) for value in live.get_inputs()),
        outputs=tuple(_info(value) for value in live.get_outputs()),
        threads=threads,
        sample={**(sample or {}), **{name: values.shape for name, values in (row or {}).items()}},
        row=row or {},
        labels=labels,
    )


def triton_type(info: TensorInfo) -> str:
    """Return the configuration's name for a tensor's type.

    Raises:
        PublishError: The backend has no such type.
    """
    try:
        return _TYPE_OF_NUMPY[info.dtype]
    except KeyError:
        raise PublishError(
            f"Triton's onnxruntime backend has no data type for {info.dtype}.",
            where=f"tensor {info.name!r}",
            fix=f"Cast it inside the model to one of {', '.join(sorted(str(d) for d in _TYPE_OF_NUMPY))}.",
        ) from None


def numpy_type(name: str) -> np.dtype[Any]:
    """Return the numpy type of a configuration's type such as ``TYPE_FP32``; strings are objects."""
    return _NUMPY_OF_TYPE[name]


def check_name(name: str) -> None:
    """Refuse a model name that is no plain folder name.

    Raises:
        PublishError: The name has a path separator, starts with a dot, is empty or longer than 128 characters.
    """
    if not NAME.fullmatch(name):
        raise PublishError(
            f"{name[:60]!r} cannot be a model name in a repository.",
            where="triton.name",
            fix="Use at most 128 letters, digits, '.', '_' and '-', starting with a letter or digit.",
        )


def _info(value: object) -> TensorInfo:
    kind, shape = value.type, value.shape  # type: ignore[attr-defined]
    if kind not in TYPE_OF_ORT:
        raise PublishError(
            f"Triton's onnxruntime backend does not serve {kind}.",
            where=f"tensor {value.name!r}",  # type: ignore[attr-defined]
            fix="Cast it inside the model to float32, float16 or an integer type.",
        )
    return TensorInfo(name=value.name, dtype=numpy_type(TYPE_OF_ORT[kind]), shape=tuple(shape))  # type: ignore[attr-defined]
