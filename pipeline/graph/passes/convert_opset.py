"""Bring the model to an opset that has LayerNormalization (17), FP16 scales (19), Gelu (20) and block-wise Q/DQ (21).

Up to opset 18 onnx's own converter rewrites the graph. From 18 on hardly any operator changed its meaning up to
:data:`TARGET`; onnxscript's adapters rewrite those that did. (onnxscript alone would only relabel older graphs: an
opset-11 Softmax then computes something else.)
"""

from __future__ import annotations

import onnx
import onnx.helper
import onnx.version_converter
import onnx_ir as ir

from pipeline.errors import ModelError
from pipeline.graph.passes.graph_pass import GraphPass, all_nodes, is_op
from pipeline.graph.passes.infer_shapes import InferShapes
from pipeline.graph.passes.without_weights import through_onnx

TARGET = 21
C_API_TARGET = 18
IR_VERSION = 10
"""The IR version that goes with opset 21."""

CHANGED_MEANING = {"DFT": 20, "GridSample": 20, "GroupNormalization": 21}
"""Operators whose graph must be rewritten between opset 18 and 21, and the opset that changed them."""


class ConvertOpset(GraphPass):
    """Convert to :data:`TARGET` if the model is older."""

    name = "convert-opset"

    def change(self, model: ir.Model) -> int:
        """Return the number of opsets climbed; raise :class:`ModelError` if the model cannot be converted."""
        if not any(domain in model.opset_imports for domain in ("", "ai.onnx")):
            model.opset_imports[""] = TARGET  # only other domains are used
        before = opset(model)
        if before < C_API_TARGET:
            _convert_old(model, before)
        if opset(model) < TARGET:
            _convert_recent(model, opset(model))
        # The newest onnx package labels every model with its own IR version, which released runtimes then refuse.
        model.ir_version = max(IR_VERSION, min(model.ir_version, least_ir_version(opset(model))))
        return max(0, opset(model) - before)


def least_ir_version(version: int) -> int:
    """Return the IR version that goes with an opset of the ONNX domain; the newest for one that is not known yet."""
    return int(onnx.helper.OP_SET_ID_VERSION_MAP.get(("ai.onnx", version), onnx.IR_VERSION))


def opset(model: ir.Model) -> int:
    """Return the version of the ONNX domain that the model imports (1 if it imports none)."""
    return int(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1)))


def _convert_old(model: ir.Model, before: int) -> None:
    """Convert below 18 with the converter of onnx, whose failures are errors here, not surprises."""
    scan = next((n for n in all_nodes(model) if is_op(n, "Scan")), None)
    if scan is not None and before < 9:
        raise _error(before, "Scan had another signature then", scan.name or scan.outputs[0].name)
    foreign = {domain: version for domain, version in model.opset_imports.items() if domain not in ("", "ai.onnx")}
    functions, metadata = dict(model.functions), dict(model.graph.metadata_props)
    model.ir_version = max(model.ir_version, 4)  # before 4 every initializer is an input, too
    try:
        through_onnx(model, lambda proto: onnx.version_converter.convert_version(proto, C_API_TARGET))
    except Exception as error:  # the C++ converter raises RuntimeError, ConvertError, IndexError, …
        raise _error(before, " ".join(str(error).split())[:300], "") from error
    model.functions.update(functions)
    model.graph.metadata_props.update(metadata)
    model.graph.opset_imports.update({**foreign, "": C_API_TARGET})


def _convert_recent(model: ir.Model, before: int) -> None:
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    if not any(CHANGED_MEANING.get(node.op_type, 0) > before for node in nodes if node.domain == ""):
        for node in nodes:
            node.version = None
        model.graph.opset_imports.pop("ai.onnx", None)
        model.graph.opset_imports[""] = TARGET
        return
    InferShapes().change(model)
    from onnxscript import version_converter  # 0.3 s, and most models do not need it

    try:
        version_converter.convert_version(model, TARGET, fallback=False)
    except (ValueError, RuntimeError) as error:
        raise _error(before, " ".join(str(error).split())[:300], "") from error


def _error(before: int, reason: str, node: str | None) -> ModelError:
    return ModelError(
        f"The model is of opset {before} and cannot be converted to opset {TARGET}: {reason}.",
        where=f"node {node!r}" if node else "",
        fix=f"Export it again with opset_version={TARGET}.",
    )
