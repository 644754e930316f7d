"""The rule about pairs inside the attention core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from pipeline.lint.finding import Severity
from pipeline.lint.operators import MOVES
from pipeline.lint.qdq_graph import LONGEST_WALK, QdqGraph
from pipeline.lint.quantizer import DEQUANTIZE, QUANTIZE
from pipeline.lint.repair import any_of, bypass
from pipeline.lint.rule import Hit, rule

_BEFORE = frozenset({"Add", "Mul", "Div", "Where", "Cast", "Clip", "Max", "Min", QUANTIZE, DEQUANTIZE, *MOVES})
"""What may stand between the scores and the Softmax: scaling and masking."""
_AFTER = frozenset({"Cast", "Dropout", "Where", QUANTIZE, DEQUANTIZE, *MOVES})


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """An attention core: ``softmax(query x key) x value``."""

    scores: ir.Node
    softmax: ir.Node
    context: ir.Node


def free_attention(graph: QdqGraph, hit: Hit) -> bool:
    """Take the pairs out of a core, so that it stays in floating point."""
    core = next((c for c in cores(graph) if c.softmax is hit.node), None)
    if core is None:
        return False
    done = any_of(bypass(graph, node, index) for node in (core.scores, core.context) for index in (0, 1))
    between = [user for user, _ in core.scores.outputs[0].uses() if user.op_type == QUANTIZE]
    for quantize in between:
        for dequantize, _ in quantize.outputs[0].uses():
            done |= any_of(bypass(graph, user, index) for user, index in dequantize.outputs[0].uses())
    return done


@rule(
    "QDQ209",
    "attention-core",
    severity=Severity.WARNING,
    fix="Quantize all four operands and the output of the core (of FP8: the operands), none between scores and Softmax; "
    "or keep the core in FP16.",
    repair=free_attention,
)
def attention_core(graph: QdqGraph) -> Iterator[Hit]:
    """The whole core is one kernel if both of its products are quantized or neither is.

    INT8 needs a pair on the core's output as well, FP8 does not; a pair on the scores themselves breaks either. A
    pair on one operand only keeps the kernel, but costs two more (22 % more bytes) and multiplies nothing in INT8.
    A core in FP32 fuses only in the fully quantized form.

    Source: measured on all 128 placements of pairs in one core, for INT8 (SM80) and FP8 (SM89).
    """
    for core in cores(graph):
        message = _judge(graph, core)
        if message:
            yield Hit(node=core.softmax, tensor=core.scores.outputs[0], message=message)


def cores(graph: QdqGraph) -> Iterator[Core]:
    """Yield every attention core: a Softmax between two products of activations."""
    for node in graph.nodes:
        if node.op_type != "Softmax" or not node.inputs:
            continue
        scores, context = _back(node.inputs[0]), _forth(graph, node.outputs[0])
        if scores is not None and context is not None and not any(_constant(graph, v) for v in scores.inputs[:2]):
            yield Core(scores=scores, softmax=node, context=context)


def _constant(graph: QdqGraph, value: ir.Value | None) -> bool:
    if value is None or graph.is_constant(value):
        return True
    q = graph.dequantizer(value)
    return q is not None and graph.is_constant(q.data)


def _back(value: ir.Value | None) -> ir.Node | None:
    """Return the product that made the scores; of two operands the first that leads to one."""
    pending = [] if value is None else [value]
    for _ in range(LONGEST_WALK):
        if not pending:
            return None
        node = pending.pop(0).producer()
        if node is not None and node.op_type == "MatMul":
            return node
        if node is not None and node.op_type in _BEFORE:
            width = 1 if node.op_type in (QUANTIZE, DEQUANTIZE, *MOVES) else len(node.inputs)
            pending.extend(v for v in node.inputs[:width] if v is not None)
    return None


def _forth(graph: QdqGraph, value: ir.Value) -> ir.Node | None:
    """Return the product that reads the probabilities as its first operand."""
    pending = [value]
    for _ in range(LONGEST_WALK):
        if not pending:
            return None
        for user, index in pending.pop(0).uses():
            if user.op_type == "MatMul" and index == 0:
                return user
            if user.op_type in _AFTER and (index == 0 or user.op_type == "Where"):
                pending.extend(user.outputs[:1])
    return None


def _judge(graph: QdqGraph, core: Core) -> str:
    query, key = (graph.dequantizer(v) for v in core.scores.inputs[:2])
    probabilities, value = (graph.dequantizer(v) for v in core.context.inputs[:2])
    first, second = query is not None and key is not None, probabilities is not None and value is not None
    if not first and not second:
        # Measured: a pair on the probabilities alone costs nothing.
        alone = [name for name, q in (("query", query), ("key", key), ("value", value)) if q is not None]
        return f"only {' and '.join(alone)} quantized: more kernels, and nothing multiplies in INT8" if alone else ""
    if first != second:
        done, left = ("scores", "context") if first else ("context", "scores")
        return f"the {done} product is quantized and the {left} product is not: no fused attention"
    if any(user.op_type == QUANTIZE for user in graph.readers(core.scores.outputs[0])):
        return "the scores are quantized before scaling and masking: no fused attention"
    narrow = query is not None and graph.dtype(query.data) is ir.DataType.FLOAT8E4M3FN
    ends = graph.readers(core.context.outputs[0])
    if not narrow and not any(user.op_type == QUANTIZE for user in ends):
        return "both products are quantized in INT8 and the output is not: no fused attention"
    return ""
