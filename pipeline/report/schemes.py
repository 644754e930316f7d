"""Quantization schemes side by side: accuracy, and which targets execute them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.figures import NOT_MEASURED, decibels, number
from pipeline.report.headline import worst
from pipeline.report.measured import OutputMetrics
from pipeline.table import Table
from pipeline.validation.measurement import QDQ_PLAIN


def scheme_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return one row for each scheme, from its facts (:meth:`pipeline.stages.simulation.Simulated.to_dict`)."""
    task = next((row["measurements"]["task"] for row in rows), None)
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
                *_worst(row["measurements"]["stages"][QDQ_PLAIN]),
                *(number(row["measurements"]["task"]["engine"][name]) for name in metrics),
                row["runs_on"],
            )
            for row in rows
        ),
    )


def _worst(outputs: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    found = worst({name: OutputMetrics.model_validate(metrics) for name, metrics in outputs.items()})
    if found is None:
        return NOT_MEASURED, NOT_MEASURED
    metrics = found[1]
    sqnr = "equal" if metrics.exact else decibels(metrics.sqnr_db)
    return sqnr, NOT_MEASURED if metrics.cosine is None else f"{metrics.cosine:.4f}"
