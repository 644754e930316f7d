"""Which nodes must agree, because they read one tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from pipeline.policy.rules import Candidate
from pipeline.types import Role

_QKV = (Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE)


def by_input(found: Iterable[Candidate]) -> list[list[Candidate]]:
    """Return the nodes by the tensor that is their first input, in graph order."""
    groups: dict[ir.Value, list[Candidate]] = defaultdict(list)
    for candidate in found:
        if candidate.node.inputs[0] is not None:
            groups[candidate.node.inputs[0]].append(candidate)
    return list(groups.values())


def merged_projections(found: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return the query, key and value projections that read one tensor, which TensorRT merges into one GEMM."""
    return by_input(c for c in found if c.role.role in _QKV and c.operands is not None)
