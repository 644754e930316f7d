"""``report.html``: the report for people, one file that needs no network."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.errors import MissingError
from pipeline.report import figures
from pipeline.report.contract import Report, write_text
from pipeline.report.headline import Headline, batches, headlines, slower_engines, worst_figure
from pipeline.report.pictures import blocks, histogram

_TEMPLATE = "report.html.j2"
_VERDICTS = {"passed": "passed", "failed": "failed", "not_measured": figures.NOT_MEASURED}


def render(report: Report) -> str:
    """Return the page: self-contained, everything from the report escaped; equal reports give equal text.

    Raises:
        MissingError: ``jinja2`` is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingError(
            "The report page needs jinja2.", where="package jinja2", fix="Run `pip install jinja2`."
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": figures.number,
        "size": figures.size,
        "ms": figures.milliseconds,
        "seconds": figures.seconds,
        "db": figures.decibels,
        "percent": figures.percent,
        "times": figures.times,
        "words": lambda text: str(text).replace("_", " "),
    }
    return environment.get_template(_TEMPLATE).render(**_context(report))


def write_html(report: Report, path: Path) -> None:
    """Write ``report.html``, all of it or nothing.

    Raises:
        MissingError: ``jinja2`` is not installed.
        StoreError: The file cannot be written.
    """
    write_text(path, render(report))


def _context(report: Report) -> dict[str, Any]:
    found = headlines(report)
    return {
        "report": report,
        "headlines": found,
        "verdict": str(report.verdict),
        "verdict_words": _VERDICTS,
        "slower": slower_engines(report),
        "batches": {name: batches(validation) for name, validation in report.validation.items()},
        "worst": {name: worst_figure(validation) for name, validation in report.validation.items()},
        "precisions": _precisions(report),
        "pictures": {variant: blocks(report.precision_plan, variant) for variant in _precisions(report)},
        "histograms": [histogram(r) for r in report.ranges],
        "methods": sorted({method for r in report.ranges for method in r.alternatives}),
        "range_counts": sorted(Counter(r.method for r in report.ranges).items(), key=lambda kv: (-kv[1], kv[0])),
        "stage_seconds": max((stage.seconds for stage in report.stages), default=0.0),
        "axis_ms": {h.target: _axis(report, h) for h in found},
        "nothing": figures.NOT_MEASURED,
    }


def _precisions(report: Report) -> dict[str, list[tuple[str, int, float]]]:
    """Return variant to (precision, nodes, share of all nodes), the most common first."""
    counts: dict[str, Counter[str]] = {}
    for node in report.precision_plan:
        counts.setdefault(node.variant, Counter())[node.precision] += 1
    return {
        variant: [(p, n, n / found.total()) for p, n in sorted(found.items(), key=lambda kv: (-kv[1], kv[0]))]
        for variant, found in sorted(counts.items())
    }


def _axis(report: Report, headline: Headline) -> float:
    """Return the largest median of a target, in ms: the full width of its latency bars."""
    rows = batches(report.validation[headline.target])
    return max((max(row.p50, row.beside[1].p50 if row.beside else 0.0) for row in rows), default=0.0)
