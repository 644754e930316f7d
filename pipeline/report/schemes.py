"""Quantization schemes side by side: accuracy, and which targets execute them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.figures import NOT_MEASURED, number
from pipeline.report.headline import figure, worst
from pipeline.report.measured import OutputMetrics
from pipeline.table import Table
from pipeline.validation.measurement import QDQ_PLAIN


def scheme_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return one row for each scheme, from its facts (:meth:`pipeline.stages.simulation.Simulated.to_dict`)."""
    task = next((row["measurements"]["task"] for row in rows if row["measurements"] is not None), None)
    metrics = dict(task["fp32"]) if task is not None else {}
    return Table(
        title="Schemes by simulation (worst output); nothing here is deployed",
        columns=(
            *("scheme", "weights", "activations", "products", "SQNR", "cosine"),
            *(f"{name} (FP32 {number(value)})" for name, value in metrics.items()),
            "targets that execute it",
        ),
        rows=tuple(
            (
                *(row["scheme"], row["weights"], row["activations"], f"{row['quantized']} of {row['products']}"),
                *_figures(row["measurements"], list(metrics)),
                row["runs_on"],
            )
            for row in rows
        ),
    )


def _figures(measurements: Mapping[str, Any] | None, metrics: Sequence[str]) -> list[str]:
    """Return SQNR and cosine of the worst output, and the task's metrics; not measured where nothing was quantized.

    Outputs of integers have no SQNR: where there are no others, the share of values that are equal stands there.
    """
    if measurements is None:
        return [NOT_MEASURED] * (2 + len(metrics))
    stored = measurements["stages"][QDQ_PLAIN]
    outputs = {name: OutputMetrics.model_validate(facts) for name, facts in stored.items()}
    floats = {name: o for name, o in outputs.items() if o.sqnr_db is not None or o.nonfinite}
    found = worst(floats or outputs)
    figures = [NOT_MEASURED, NOT_MEASURED]
    if found is not None:
        sqnr = figure(found[1]) or NOT_MEASURED
        figures = [sqnr, NOT_MEASURED if found[1].cosine is None else f"{found[1].cosine:.4f}"]
    return figures + [number(measurements["task"]["engine"][name]) for name in metrics]
