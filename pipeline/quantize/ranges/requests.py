"""Which tensors calibration looks at: all that any policy could quantize, so that one pass serves every later choice."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from calibrators.collector import Request
from pipeline.graph.operands import operands
from pipeline.policy.planning import plan
from pipeline.quantize.insertion.sites import sites
from pipeline.quantize.transforms.groups import groups
from pipeline.recipe import PolicyConfig, Preset, RuleConfig
from pipeline.types import NodeRole, Precision, Role


def requests(model: ir.Model, roles: dict[str, NodeRole], policies: Mapping[str, PolicyConfig]) -> tuple[Request, ...]:
    """Return the statistics to collect for these families of targets, in graph order.

    Every activation that a policy usually quantizes gets a sketch, and every one that this policy does, so that only
    an unusual rule (INT8 residual adds of a transformer) makes another pass over the data necessary. Families that
    compute in FP16 need the magnitude of every float tensor too, to keep in FP32 what FP16 cannot hold.

    Args:
        model: The canonical graph.
        roles: Its nodes' roles.
        policies: What is asked for now, by the variants that will be made.
    """
    tensors: dict[str, None] = {}
    for family, policy in policies.items():
        if family not in ("cpu", "gpu-int8", "gpu-fp8"):
            continue
        for asked in (_everything(model), policy):
            # A tensor that shares another one's range under this policy may stand alone under the next.
            tensors |= dict.fromkeys(s.tensor for s in sites(model, plan(model, roles, asked, family)))
    if any(f.startswith("gpu") for f in policies):
        values = [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]
        tensors |= dict.fromkeys(v.name or "" for v in values if v.type == ir.TensorType(ir.DataType.FLOAT))
    found = [Request(tensor=t) for t in tensors]
    smoothed = {f: p for f, p in policies.items() if _smooths(p)}
    plans = [plan(model, roles, p, f) for f, policy in smoothed.items() for p in (_everything(model), policy)]
    channels = dict.fromkeys((g.tensor, g.axis) for made in plans for g in groups(model, made) if g.smooth != "off")
    found += [Request(tensor=t, statistic="channel_range", axis=axis) for t, axis in channels]
    return tuple(found)


def _smooths(policy: PolicyConfig) -> bool:
    """Whether some nodes may be smoothed."""
    return policy.smooth != "off" or any(r.smooth not in (None, "off") for r in policy.rules)


def _everything(model: ir.Model) -> PolicyConfig:
    kinds = sorted({n.op_type for n in model.graph if operands(n) is not None and n.op_type != "Add"})
    rules = tuple(RuleConfig(op_type=k, precision=Precision.INT8) for k in kinds)
    rules += (RuleConfig(role=Role.KV_CACHE, precision=Precision.INT8),)
    return PolicyConfig(preset=Preset.INT8_ALL, rules=rules)
