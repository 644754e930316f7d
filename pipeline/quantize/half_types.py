"""Which inputs and outputs of an operator may be FP16 or BF16: read from ONNX's own schemas, not listed by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pipeline.types import Array, Precision

FLOAT = ir.DataType.FLOAT
HALF_TYPES = {Precision.FP16: ir.DataType.FLOAT16, Precision.BF16: ir.DataType.BFLOAT16}
"""The 16-bit type that a graph's rest computes in."""

_OWN_TYPE = ("BitCast", "Bernoulli", "EyeLike", "RandomNormalLike", "RandomUniformLike")
"""Their output's type depends on the input's in a way that no type variable says."""
_REDUCING_SCATTERS = ("ScatterElements", "ScatterND")
"""With ``reduction`` they have no FP16 kernel in ONNX Runtime's CPU provider, where every variant is checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameters:
    """The type variable of every formal parameter (the last one is a variadic's), and which of them allow FP16."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    half: frozenset[str]


class HalfTypes:
    """What the schemas of one opset say.

    Args:
        opset: Of the default domain.
        half: The 16-bit type.
    """

    def __init__(self, opset: int, half: ir.DataType) -> None:
        self._opset = opset
        self._half = f"tensor({half.name.lower()})"
        self._known: dict[str, _Parameters | None] = {}

    def exist(self, node: ir.Node) -> bool:
        """Return whether a node can compute in FP16 at all; not if the type of something it reads or makes is unknown."""
        if self._parameters(node) is None or has_subgraph(node) or node.op_type in _OWN_TYPE:
            return False
        if node.op_type in _REDUCING_SCATTERS and _text(node, "reduction") not in ("", "none"):
            return False
        return all(isinstance(v.type, ir.TensorType) for v in (*node.inputs, *node.outputs) if v is not None and v.name)

    def inputs(self, node: ir.Node) -> frozenset[int]:
        """Return the inputs that ONNX lets be FP16 (``Resize``'s scales, for one, are float32 always)."""
        found = self._parameters(node)
        if found is None:
            return frozenset()
        return frozenset(i for i, name in enumerate(_spread(found.inputs, len(node.inputs))) if name in found.half)

    def outputs(self, node: ir.Node) -> frozenset[int]:
        """Return the outputs that are FP16 if the inputs are.

        An output follows the inputs that share its type variable. Where none does, an attribute decides: that of
        Cast and ConstantOfShape is changed by :func:`retype_attributes`; LayerNormalization's mean stays float32.
        """
        found = self._parameters(node)
        if found is None:
            return frozenset()
        if node.op_type == "DequantizeLinear":  # since opset 23 a type variable of its own, by default the scale's type
            return frozenset({0})
        follows = set(found.inputs) & found.half
        if _retyped(node):
            follows |= set(found.outputs) & found.half
        return frozenset(i for i, name in enumerate(_spread(found.outputs, len(node.outputs))) if name in follows)

    def _parameters(self, node: ir.Node) -> _Parameters | None:
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type not in self._known:
            self._known[node.op_type] = _read(node.op_type, self._opset, self._half)
        return self._known[node.op_type]


def _read(op_type: str, opset: int, half: str) -> _Parameters | None:
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    allowed = {p.type_str: set(p.types) for p in (*schema.inputs, *schema.outputs)}
    return _Parameters(
        inputs=tuple(p.type_str for p in schema.inputs),
        outputs=tuple(p.type_str for p in schema.outputs),
        half=frozenset(name for name, types in allowed.items() if {half, "tensor(float)"} <= types),
    )


def _spread(names: tuple[str, ...], count: int) -> list[str]:
    return [names[min(i, len(names) - 1)] for i in range(count)] if names else []


def has_subgraph(node: ir.Node) -> bool:
    """Return whether a node is If, Loop, Scan or the like."""
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def is_float(value: ir.Value, dtype: ir.DataType) -> bool:
    """Return whether a value is a tensor (no sequence or optional) of this type."""
    return isinstance(value.type, ir.TensorType) and value.dtype is dtype


def retype_attributes(node: ir.Node, half: ir.DataType) -> None:
    """Let Cast and ConstantOfShape make the 16-bit type where they made float32."""
    if not _retyped(node):
        return
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", half.value)
    else:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(saturated(_filling(node), half)))


def _retyped(node: ir.Node) -> bool:
    if node.op_type == "Cast":
        return node.attributes["to"].as_int() == FLOAT.value
    return node.op_type == "ConstantOfShape" and _filling(node).dtype == np.float32


def _filling(node: ir.Node) -> npt.NDArray[np.float32]:
    attribute = node.attributes.get("value")
    return np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()


def _text(node: ir.Node, name: str) -> str:
    attribute = node.attributes.get(name)
    return "" if attribute is None else attribute.as_string()


def saturated(array: npt.NDArray[np.float32], half: ir.DataType) -> Array:
    """Return 16-bit values; those beyond FP16's range become ±65504, NaN stays NaN. BF16 has float32's range."""
    if half is not ir.DataType.FLOAT16:
        return array.astype(half.numpy())
    limit = np.float32(np.finfo(np.float16).max)
    return np.clip(array, -limit, limit).astype(np.float16)
