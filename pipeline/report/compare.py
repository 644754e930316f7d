"""Two builds side by side: what they weigh, cost and gain, and which nodes they treat differently."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.report import figures
from pipeline.report.contract import Report
from pipeline.report.headline import batches
from pipeline.table import Table

MOST_NODES = 40


def read_report(directory: Path) -> Report:
    """Return the report of a build.

    Raises:
        StoreError: There is none, or it is of another version.
    """
    path = directory / "report.json"
    try:
        text = path.read_text(encoding="utf-8")
        return Report.from_json(text, where=str(path))
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError(
            "The build directory has no report.", where=str(path), fix="Name the -o directory of a finished build."
        ) from error


def compare(reports: tuple[Report, ...]) -> tuple[Table, ...]:
    """Return the tables that compare some builds: their figures target by target, and nodes whose precision differs."""
    names = _titles(reports)
    tables = [
        _figures(target, reports, names) for target in dict.fromkeys(t for report in reports for t in report.targets)
    ]
    different = _different(reports, names) if len(reports) > 1 else None
    return (*tables, *([different] if different is not None else []))


def _titles(reports: tuple[Report, ...]) -> tuple[str, ...]:
    names = [report.name for report in reports]
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(f"{name} ({number})" for number, name in enumerate(names, start=1))


def _figures(target: str, reports: tuple[Report, ...], names: tuple[str, ...]) -> Table:
    rows: dict[str, list[str]] = {}

    def add(index: int, measure: str, text: str) -> None:
        rows.setdefault(measure, ["–"] * len(reports))[index] = text

    for index, report in enumerate(reports):
        made, found = report.targets.get(target), report.validation.get(target)
        if made is None or found is None:
            add(index, "status", "not a target")
            continue
        add(index, "status", str(made.status).replace("_", " "))
        add(index, "verdict", str(found.verdict).replace("_", " "))
        counted = Counter(n.precision for n in report.precision_plan if n.variant == made.variant)
        add(index, "nodes", ", ".join(f"{count} {precision}" for precision, count in counted.most_common()))
        add(index, "size", figures.size(made.bytes))
        for name, metrics in (found.outputs or {}).items():
            add(index, f"SQNR {name}", "equal" if metrics.exact else figures.decibels(metrics.sqnr_db))
            add(index, f"cosine {name}", figures.number(metrics.cosine, 6))
        if found.task is not None:
            for kind, values in (("FP32", found.task.fp32), ("engine", found.task.engine)):
                for metric, value in values.items():
                    add(index, f"task {metric}, {kind}", figures.number(value, 5))
        for row in batches(found):
            add(index, f"p50, batch {row.batch}", figures.milliseconds(row.p50))
            if row.beside is not None:
                add(index, f"speed over {row.beside[0]}, batch {row.batch}", figures.times(row.beside[2]))
        if made.compiled is not None:
            add(index, "kernels", figures.number(made.compiled.kernels))
            add(index, "bytes moved", figures.size(made.compiled.bytes_moved))
            add(index, "fused attention", figures.number(made.compiled.fused_attention))
            add(index, "estimate (not measured)", figures.milliseconds(made.compiled.estimate_ms))
    return Table(
        title=f"target {target}", columns=("", *names), rows=tuple((measure, *cells) for measure, cells in rows.items())
    )


def _different(reports: tuple[Report, ...], names: tuple[str, ...]) -> Table | None:
    plans = [{(n.variant, n.node): n.precision for n in report.precision_plan} for report in reports]
    shared = [key for key in plans[0] if all(key in plan for plan in plans)]
    rows = [(*key, *(plan[key] for plan in plans)) for key in shared if len({plan[key] for plan in plans}) > 1]
    if not rows:
        return None
    left = f", the first {MOST_NODES}" if len(rows) > MOST_NODES else ""
    return Table(
        title=f"{len(rows)} nodes in another precision{left}",
        columns=("variant", "node", *names),
        rows=tuple(rows[:MOST_NODES]),
    )
