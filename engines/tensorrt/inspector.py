"""Read the compiled layers that an engine of full TensorRT tells: ``EngineInspector`` JSON of 10.x and of 11.x.

A tensor's type and layout are one sentence in 10.x (``"Format/Datatype": "Row major linear FP16 format"``, in layers
that Myelin makes just ``"Half"``) and two keys in 11.x (``"Format"`` and ``"DataType"``). 10.x lists the engine's inputs
and outputs as names under ``Bindings``, 11.x as objects under ``I/O Tensors``. Sources: TensorRT documentation, "Engine
Inspector" (10.16) and "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from engines.compiled_layers import CompiledLayer, LayerTensor
from engines.layer_log import origins
from pipeline.errors import EngineError

KINDS = {
    "caskconvolution": "correlation",
    "cudadepthwiseconvolution": "correlation",
    "convolution": "correlation",
    "conv": "correlation",
    "caskdeconvolution": "deconv",
    "deconvolution": "deconv",
    "caskgemmconvolution": "gemm",
    "caskgemmmatrixmultiply": "gemm",
    "matrixmultiply": "gemm",
    "matmul": "gemm",
    "noop": "no_op",
    "signal": "signal",
    "wait": "wait",
}
"""The builder's layer types, in lower case and without a version (``V2``), by the name that compiled layers use."""

_TYPES = (
    ("E8M0", r"e8m0"),
    ("FP4", r"fp4|e2m1"),
    ("FP8", r"fp8|e4m3"),
    ("BF16", r"bf16|bfloat16|bfloat"),
    ("Half", r"fp16|half|float16"),
    ("Float", r"fp32|float32|float"),
    ("UInt8", r"uint8"),
    ("Int4", r"int4"),
    ("Int8", r"int8"),
    ("Int64", r"int64"),
    ("Int32", r"int32"),
    ("Bool", r"bool|boolean"),
)
_MATRIX_TACTIC = re.compile(r"gemm|xmma|cutlass", re.IGNORECASE)


def parse_inspector(text: str) -> tuple[CompiledLayer, ...]:
    """Return the layers in an engine's inspector JSON, in execution order.

    With less than detailed profiling verbosity a layer is only a name; it has no kind and no tensors then.

    Raises:
        EngineError: The text is no such JSON.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            "The engine inspector's answer is not the JSON that TensorRT 10 and 11 write.",
            fix="Build with builder.profiling_verbosity: detailed.",
        ) from error
    return tuple(_layer(raw) for raw in layers)


def _layer(raw: str | Mapping[str, Any]) -> CompiledLayer:
    if isinstance(raw, str):
        return CompiledLayer(name=raw, kind="", tactic="", inputs=(), constants=(), outputs=(), origins=())
    tactic = str(raw.get("TacticName", ""))
    return CompiledLayer(
        name=str(raw.get("Name", "")),
        kind=_kind(str(raw.get("LayerType", "")), tactic),
        tactic=tactic,
        inputs=_tensors(raw.get("Inputs")),
        constants=(*_tensors(raw.get("Constants")), *_weights(raw)),
        outputs=_tensors(raw.get("Outputs")),
        origins=origins(str(raw.get("Metadata", ""))),
    )


def _kind(layer_type: str, tactic: str) -> str:
    plain = re.sub(r"v\d+$", "", layer_type.lower())
    if plain == "fusion" and _MATRIX_TACTIC.search(tactic):
        return "gemm"
    return KINDS.get(plain, plain)


def _tensors(raw: list[Mapping[str, Any]] | None) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(
            name=str(t.get("Name", "")),
            shape=tuple(int(d) for d in t.get("Dimensions") or ()),
            dtype=_dtype(
                str(t.get("DataType") or t.get("Datatype") or t.get("Format/Datatype") or t.get("Format") or "")
            ),
        )
        for t in raw or ()
        if isinstance(t, Mapping)
    )


def _weights(raw: Mapping[str, Any]) -> tuple[LayerTensor, ...]:
    """Return a convolution's weights and bias, of which the inspector tells type and number of elements."""
    given = [(key.lower(), raw.get(key)) for key in ("Weights", "Bias")]
    return tuple(
        LayerTensor(name=name, shape=(int(held["Count"]),), dtype=_dtype(str(held["Type"])))
        for name, held in given
        if isinstance(held, Mapping) and held.get("Count") and "Type" in held
    )


def _dtype(text: str) -> str:
    """Return the type that a name or a sentence means, by the name that compiled layers use."""
    lower = text.lower()
    return next((name for name, form in _TYPES if re.search(rf"(?<![a-z])(?:{form})(?![a-z0-9])", lower)), text)
