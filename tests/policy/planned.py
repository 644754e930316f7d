"""Small graphs with hand-given roles, and the canonical zoo models, planned."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from pipeline import model as models
from pipeline.graph.prepare import prepare
from pipeline.graph.roles import find_roles
from pipeline.policy.plan import NodePlan, PrecisionPlan
from pipeline.policy.planning import Evidence, plan
from pipeline.recipe import PolicyConfig
from pipeline.types import NodeRole, Role
from tests import zoo


@functools.cache
def canonical(name: str) -> tuple[ir.Model, dict[str, NodeRole]]:
    path = zoo.exported(name, "legacy")
    model = models.load(prepare(path, path.with_name(f"planned-{path.name}")).path)
    return model, find_roles(model)


def plan_zoo(name: str, family: str, policy: PolicyConfig | None = None, **more: object) -> PrecisionPlan:
    model, roles = canonical(name)
    return plan(model, roles, policy or PolicyConfig(), family, Evidence(**more))  # type: ignore[arg-type]


def graph(nodes, inputs, weights, outputs=("y",), types=None) -> ir.Model:  # type: ignore[no-untyped-def]
    """A model of float inputs (name to shape); ``types`` gives value_info types of intermediates."""
    infos = [
        helper.make_tensor_value_info(n, TensorProto.INT64 if n.startswith("ids") else TensorProto.FLOAT, s)
        for n, s in inputs.items()
    ]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    made = helper.make_graph(nodes, "g", infos, outs, [numpy_helper.from_array(v, k) for k, v in weights.items()])
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    import onnx

    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def roles_of(**given: Role) -> dict[str, NodeRole]:
    return {name: NodeRole(role=role) for name, role in given.items()}


def entry(made: PrecisionPlan, node: str) -> NodePlan:
    return next(n for n in made if n.node == node)
