"""What the lint says: findings, and all of them for one model."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad a finding is; the values are SARIF's levels."""

    ERROR = "error"
    """TensorRT refuses the graph, or takes it and computes something else than the graph says."""
    WARNING = "warning"
    """It compiles and computes what it says, but loses speed, accuracy or another reader of the file."""
    NOTE = "note"
    """What the literature advises against, and what was measured to cost little or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a rule found.

    Attributes:
        rule: Stable id (``QDQ101``).
        severity: How bad it is.
        node: Name of the node; of its first output where the node has none.
        tensor: Name of the tensor concerned; empty if it is the node as a whole.
        message: What is wrong here.
        reason: Why the rule exists.
        fix: What to do about it.
    """

    rule: str
    severity: Severity
    node: str
    tensor: str
    message: str
    reason: str
    fix: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields as JSON-ready text."""
        return {key: str(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every finding of one model, in the order of the rules, then of the nodes.

    Attributes:
        model: The file, as it was named.
        target: Name of the target that the graph was judged for; ``None`` without one.
        findings: What the rules found.
    """

    model: str
    target: str | None
    findings: tuple[Finding, ...]

    @property
    def has_errors(self) -> bool:
        """Whether any finding is an error."""
        return any(f.severity is Severity.ERROR for f in self.findings)

    def counts(self) -> dict[str, int]:
        """Return the number of findings of each severity."""
        found = Counter(f.severity for f in self.findings)
        return {str(severity): found[severity] for severity in Severity}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "model": self.model,
            "target": self.target,
            "counts": self.counts(),
            "findings": [f.to_dict() for f in self.findings],
        }
