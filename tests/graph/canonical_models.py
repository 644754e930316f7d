"""Small models in ONNX text, and running them with onnx's reference evaluator (not the code under test)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from pipeline.graph.prepare import canonicalize, prepare
from pipeline.running.session import run, session


def parse(body: str, *, opset: int = 17, ir_version: int = 8, more: str = "", functions: str = "") -> onnx.ModelProto:
    """Parse ``name (inputs) => (outputs) <initializers> { nodes }``."""
    header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}{more}]>'
    return onnx.parser.parse_model(header + body + functions)


def save(proto: onnx.ModelProto, folder: Path, name: str = "source.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def canonical(proto: onnx.ModelProto, **options: bool) -> ir.Model:
    model = ir.serde.deserialize_model(proto)
    canonicalize(model, **options)
    return model


def run_reference(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(proto).run(None, feeds)


def run_ort(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return run(session(proto.SerializeToString(), optimize=False), None, feeds)


def assert_same(
    before: onnx.ModelProto,
    after: ir.Model,
    feeds: dict[str, np.ndarray],
    tolerance: float = 1e-5,
    evaluate: Callable[[onnx.ModelProto, dict[str, np.ndarray]], list[np.ndarray]] = run_reference,
) -> None:
    """Both models give the same outputs in onnx's reference evaluator (or ONNX Runtime, unoptimized)."""
    changed = ir.serde.serialize_model(after)
    onnx.checker.check_model(changed, full_check=True)
    for ours, theirs in zip(evaluate(changed, feeds), evaluate(before, feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))


__all__ = ["assert_same", "canonical", "ops", "parse", "prepare", "run_ort", "run_reference", "save"]
