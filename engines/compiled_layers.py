"""What a builder really made of a graph: its compiled layers, their types, their origins and the bytes they move."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

BYTES = {
    "Float": 4.0, "Half": 2.0, "BF16": 2.0, "BFloat16": 2.0, "Int8": 1.0, "UInt8": 1.0, "FP8": 1.0, "Int32": 4.0, "Int64": 8.0,
    "Bool": 1.0, "Int4": 0.5, "FP4": 0.5, "FP4E2M1": 0.5, "E8M0": 1.0,
}  # fmt: skip
"""Bytes of one element by the builder's name for its type."""

LOW_PRECISION = frozenset({"Int8", "FP8", "Int4", "FP4", "FP4E2M1"})
NOT_KERNELS = frozenset({"signal", "wait", "shape_call", "no_op"})
"""Layers that only order other layers or compute shapes on the host."""
GEMM_KINDS = frozenset({"gemm", "correlation", "deconv", "runtime_fusion"})
ATTENTION = "_gemm_mha"
"""How the fused attention kernel is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensor:
    """A tensor that a layer reads or writes; ``dtype`` is the builder's name (``Int8``, ``Half``)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> float:
        """Return its size; 0 for a type whose width is not known."""
        return BYTES.get(self.dtype, 0.0) * abs(math.prod(self.shape))


@dataclass(frozen=True, kw_only=True)
class CompiledLayer:
    """One kernel (or host-side step) of an engine.

    Attributes:
        name: The builder's name for it; fused layers join their parts' names.
        kind: ``gemm``, ``correlation`` (convolution), ``kgen`` (generated elementwise or reduction kernel), ….
        tactic: The implementation chosen, as far as the builder tells.
        inputs: Activations read.
        constants: Weights and scalars read.
        outputs: Tensors written.
        origins: Names of the ONNX nodes that it came from.
    """

    name: str
    kind: str
    tactic: str
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    origins: tuple[str, ...]

    @property
    def is_kernel(self) -> bool:
        """Whether it runs on the GPU."""
        return self.kind not in NOT_KERNELS

    @property
    def is_attention(self) -> bool:
        """Whether it is a whole attention core in one kernel."""
        return ATTENTION in self.name

    @property
    def is_low_precision(self) -> bool:
        """Whether it multiplies INT8, FP8 or narrower operands."""
        return self.kind in GEMM_KINDS and any(t.dtype in LOW_PRECISION for t in (*self.inputs, *self.constants))

    @property
    def bytes_moved(self) -> float:
        """Return the bytes of everything it reads and writes, each once."""
        return sum(t.bytes for t in (*self.inputs, *self.constants, *self.outputs))

    @cached_property
    def flops(self) -> float:
        """Return the multiply-adds of its matrix products, times two; 0 for layers without one."""
        if not self.outputs:
            return 0.0
        if self.is_attention:
            return self._attention_flops()
        made = abs(math.prod(self.outputs[0].shape))
        if self.kind in ("correlation", "deconv", "runtime_fusion") and self.constants:
            weight = max(self.constants, key=lambda t: math.prod(t.shape))
            channels = self.outputs[0].shape[1] if len(self.outputs[0].shape) > 1 else 1
            return 2.0 * made * math.prod(weight.shape) / max(channels, 1)
        if self.kind == "gemm" and self.inputs and self.inputs[0].shape:
            return 2.0 * made * self.inputs[0].shape[-1]
        return 0.0

    def _attention_flops(self) -> float:
        # The kernel's inputs come in any order: query is [heads, rows, width], key and value hold the columns.
        made = self.outputs[0].shape
        heads, width = made[0], made[-1]
        held = [math.prod(t.shape) for t in self.inputs if t.dtype != "Bool" and len(t.shape) == len(made)]
        columns = max(held, default=0) // max(heads * width, 1)
        return 4.0 * math.prod(made) * columns


@dataclass(frozen=True, kw_only=True)
class CompiledLayers:
    """All layers of one engine, in execution order.

    Attributes:
        builder: ``tensorrt-rtx 1.7.1.116``: what compiled it.
        compute_capability: ``SM80``: for which GPU.
        engine_bytes: Size of the serialized engine.
        layers: The layers.
    """

    builder: str
    compute_capability: str
    engine_bytes: int
    layers: tuple[CompiledLayer, ...]

    def __iter__(self) -> Iterator[CompiledLayer]:
        return (layer for layer in self.layers if layer.is_kernel)

    @cached_property
    def kernels(self) -> int:
        """Return how many layers run on the GPU."""
        return sum(1 for _ in self)

    @cached_property
    def kinds(self) -> dict[str, int]:
        """Return kernels by kind."""
        return dict(sorted(Counter(layer.kind for layer in self).items()))

    @cached_property
    def bytes_moved(self) -> int:
        """Return the bytes that all kernels read and write."""
        return round(sum(layer.bytes_moved for layer in self))

    @cached_property
    def fused_attention(self) -> int:
        """Return how many attention cores are one kernel."""
        return sum(layer.is_attention for layer in self)

    @cached_property
    def low_precision_flops_share(self) -> float | None:
        """Return the share of matrix-product FLOPs in INT8, FP8 or narrower; ``None`` without any."""
        total = sum(layer.flops for layer in self)
        return sum(layer.flops for layer in self if layer.is_low_precision) / total if total else None

    def of_node(self, node: str) -> tuple[CompiledLayer, ...]:
        """Return the kernels that came from an ONNX node, among others."""
        return tuple(layer for layer in self if node in layer.origins)

    def to_json(self) -> str:
        """Return the layers as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CompiledLayers:
        """Return what :meth:`to_json` wrote."""
        raw = json.loads(text)
        return cls(**{**raw, "layers": tuple(_layer(layer) for layer in raw["layers"])})


def _layer(raw: dict[str, Any]) -> CompiledLayer:
    tensors = {
        key: tuple(LayerTensor(**{**t, "shape": tuple(t["shape"])}) for t in raw[key])
        for key in ("inputs", "constants", "outputs")
    }
    return CompiledLayer(**{**raw, **tensors, "origins": tuple(raw["origins"])})
