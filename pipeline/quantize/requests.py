"""Which tensors calibration looks at: all that any policy could quantize, so that one pass serves every later choice."""

from __future__ import annotations

import onnx_ir as ir

from calibrators.collector import Request
from pipeline.graph.operands import operands
from pipeline.policy.planning import plan
from pipeline.quantize.sites import range_source, sites
from pipeline.recipe import PolicyConfig, Preset, RuleConfig
from pipeline.types import NodeRole, Precision


def requests(model: ir.Model, roles: dict[str, NodeRole], families: list[str]) -> tuple[Request, ...]:
    """Return the statistics to collect for these families of targets, in graph order.

    Every activation that some rule could quantize gets a sketch. Families that compute in FP16 need the magnitude of
    every float tensor too, to keep in FP32 what FP16 cannot hold.

    Args:
        model: The canonical graph.
        roles: Its nodes' roles.
        families: Variants that will be made.
    """
    tensors: dict[str, None] = {}
    for family in families:
        if family not in ("cpu", "gpu-int8"):
            continue
        found = sites(model, plan(model, roles, _everything(model), family))
        names = [s.tensor for s in found]
        tensors |= dict.fromkeys(range_source(model, name, names) for name in names)
    if any(f.startswith("gpu") for f in families):
        tensors |= dict.fromkeys(v.name or "" for n in model.graph for v in n.outputs if v.dtype is ir.DataType.FLOAT)
    return tuple(Request(tensor=t) for t in tensors)


def _everything(model: ir.Model) -> PolicyConfig:
    kinds = sorted({n.op_type for n in model.graph if operands(n) is not None and n.op_type != "Add"})
    rules = tuple(RuleConfig(op_type=k, precision=Precision.INT8) for k in kinds)
    return PolicyConfig(preset=Preset.INT8_ALL, rules=rules)
