"""Reports as text for people, and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

from pipeline.lint.finding import Finding, Report

SHOWN = 5
"""Findings of one rule that text shows."""
WIDTH = 110
"""Columns of what a rule says about itself."""


def as_text(reports: Sequence[Report]) -> str:
    """Return every report as lines, findings of one rule together and at most :data:`SHOWN` of them."""
    return "\n".join(line for report in reports for line in _lines(report))


def as_json(reports: Sequence[Report]) -> str:
    """Return ``{"reports": […]}``: every finding with all of its fields."""
    return json.dumps({"reports": [report.to_dict() for report in reports]}, indent=1, ensure_ascii=False)


def _lines(report: Report) -> Iterator[str]:
    target = f" for {report.target}" if report.target else ""
    ordered = sorted(report.findings, key=lambda f: (list(report.counts()).index(str(f.severity)), f.rule))
    for (severity, rule), group in groupby(ordered, key=lambda f: (f.severity, f.rule)):
        found = list(group)
        yield from textwrap.wrap(f"{severity} {rule}: {found[0].reason}", WIDTH, subsequent_indent="  ")
        yield from (f"  {_place(f)}: {f.message}" for f in found[:SHOWN])
        if len(found) > SHOWN:
            yield f"  … and {len(found) - SHOWN} more (--format json shows all)"
        yield from textwrap.wrap(f"  fix: {found[0].fix}", WIDTH, subsequent_indent="  ")
    counts = ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for name, n in report.counts().items())
    yield f"{report.model}{target}: {counts}"


def _place(finding: Finding) -> str:
    return f"{finding.node} [{finding.tensor}]" if finding.tensor and finding.tensor != finding.node else finding.node
