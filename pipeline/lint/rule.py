"""What a rule is: a small function that finds places in a graph, with an id, a reason and a fix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.lint.finding import Finding, Severity

if TYPE_CHECKING:
    import onnx_ir as ir

    from pipeline.lint.qdq_graph import QdqGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A place where a rule is broken.

    Attributes:
        node: The node.
        message: What is wrong there.
        tensor: The value concerned, if it is not the node as a whole.
        severity: Where it is not the rule's usual one.
    """

    node: ir.Node
    message: str
    tensor: ir.Value | None = None
    severity: Severity | None = None


Check = Callable[["QdqGraph"], Iterator[Hit]]
Repair = Callable[["QdqGraph", Hit], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule.

    Attributes:
        id: Stable id; never given to another rule.
        name: Stable short name (``nonzero-zero-point``).
        severity: The usual severity.
        reason: Why it exists: the first paragraph of the check's docstring.
        source: Where that is written or was measured: its paragraph ``Source: …``.
        fix: What to do about a finding.
        check: Yields every hit in one pass over the graph.
        repair: Changes the graph so that a hit is gone, and returns whether it did; ``None`` where no change is safe.
    """

    id: str
    name: str
    severity: Severity
    reason: str
    source: str
    fix: str
    check: Check
    repair: Repair | None = None

    def findings(self, graph: QdqGraph) -> Iterator[Finding]:
        """Yield the hits as findings."""
        for hit in self.check(graph):
            yield Finding(
                rule=self.id,
                severity=hit.severity or self.severity,
                node=label(hit.node),
                tensor=(hit.tensor.name or "") if hit.tensor is not None else "",
                message=hit.message,
                reason=self.reason,
                fix=self.fix,
            )


def rule(
    rule_id: str, name: str, *, fix: str, severity: Severity = Severity.ERROR, repair: Repair | None = None
) -> Callable[[Check], Rule]:
    """Turn a check into a :class:`Rule`; its docstring gives the reason and the source."""

    def decorate(check: Check) -> Rule:
        reason, _, source = inspect.cleandoc(check.__doc__ or "").partition("\n\nSource: ")
        return Rule(
            id=rule_id,
            name=name,
            severity=severity,
            reason=" ".join(reason.split()),
            source=" ".join(source.split()),
            fix=fix,
            check=check,
            repair=repair,
        )

    return decorate


def label(node: ir.Node) -> str:
    """Return a node's name, or that of its first output where it has none."""
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type
