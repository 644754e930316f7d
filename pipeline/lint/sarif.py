"""Reports as SARIF 2.1.0, which code hosts show beside a change (OASIS, Static Analysis Results Interchange Format)."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from pipeline.lint.finding import Finding, Report
from pipeline.lint.rules import RULES

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def as_sarif(reports: Sequence[Report]) -> str:
    """Return one SARIF log with one run: every rule, and every finding as a result at its node."""
    driver = {
        "name": "enginewright lint",
        "version": importlib.metadata.version("enginewright"),
        "rules": [_rule(rule.id) for rule in RULES],
    }
    results = [_result(report, finding) for report in reports for finding in report.findings]
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return json.dumps(log, indent=1, ensure_ascii=False)


def _rule(rule_id: str) -> dict[str, Any]:
    rule = next(r for r in RULES if r.id == rule_id)
    return {
        "id": rule.id,
        "name": rule.name,
        "shortDescription": {"text": rule.reason},
        "help": {"text": f"{rule.fix} Source: {rule.source}"},
        "defaultConfiguration": {"level": str(rule.severity)},
    }


def _result(report: Report, finding: Finding) -> dict[str, Any]:
    where = {
        "physicalLocation": {"artifactLocation": {"uri": quote(PurePath(report.model).as_posix())}},
        "logicalLocations": [{"name": finding.node, "kind": "element"}],
    }
    properties = {"tensor": finding.tensor, "fix": finding.fix, "target": report.target}
    return {
        "ruleId": finding.rule,
        "ruleIndex": [rule.id for rule in RULES].index(finding.rule),
        "level": str(finding.severity),
        "message": {"text": f"{finding.node}: {finding.message}"},
        "locations": [where],
        "properties": properties,
    }
