"""What matters first about each target, derived from the report: verdict, size, accuracy, speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.report.contract import Report, TargetStatus
from pipeline.report.figures import decibels, milliseconds, number, percent, size, times
from pipeline.report.measured import BatchLatency, Mode, OutputMetrics, Validation, VerdictStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One target in a few words.

    Attributes:
        target: Its name.
        status: What became of its engine.
        reason: Why it was not built.
        verdict: What the gates say.
        size: Engine size beside FP32's.
        size_share: Engine bytes over FP32 bytes; ``None`` if not measured.
        accuracy: The worst output, the task, and generation.
        latency: Per batch size, and of a token in generation, beside FP32.
        slower: Batch sizes at which the engine is slower than FP32, with both medians; empty if none is.
        simulated: The accuracy is of a simulation, not of the engine.
    """

    target: str
    status: TargetStatus
    reason: str
    verdict: VerdictStatus
    size: str
    size_share: float | None
    accuracy: tuple[str, ...]
    latency: tuple[str, ...]
    slower: tuple[str, ...]
    simulated: bool


def headlines(report: Report) -> tuple[Headline, ...]:
    """Return one headline for each target, those that were built first."""
    names = sorted(report.targets, key=lambda name: report.targets[name].status is not TargetStatus.BUILT)
    return tuple(_headline(report, name) for name in names)


def slower_engines(report: Report) -> str:
    """Return the sentence that says where quantizing made the model slower; empty if nowhere (or not measured)."""
    found = [f"{h.target}: {', '.join(h.slower)}" for h in headlines(report) if h.slower]
    rows = [r for v in report.validation.values() for r in batches(v) if r.beside and r.beside[2] < 1]
    names = " and ".join(sorted({r.beside[0] for r in rows if r.beside}))
    return f"The engine is SLOWER than {names}. {'; '.join(found)}." if found else ""


def worst_output(validation: Validation) -> tuple[str, OutputMetrics] | None:
    """Return the output that lost most (least SQNR, or least share of equal values), with its name."""
    return worst(validation.outputs)


def worst(outputs: Mapping[str, OutputMetrics] | None) -> tuple[str, OutputMetrics] | None:
    """Return the one of these outputs that lost most, with its name; ``None`` without outputs."""
    return min(outputs.items(), key=_quality) if outputs else None


def worst_figure(validation: Validation) -> str:
    """Return the worst output's figure alone; empty without outputs."""
    found = worst_output(validation)
    return "" if found is None else figure(found[1])


def figure(output: OutputMetrics) -> str:
    """Return an output's SQNR, or the share of its values that are equal; empty if it has neither."""
    if output.nonfinite:
        return "NaN or infinite"
    if output.exact:
        return "equal"
    if output.sqnr_db is not None:
        return decibels(output.sqnr_db)
    return "" if output.exact_match is None else f"{percent(output.exact_match)} equal"


def batches(validation: Validation) -> list[BatchLatency]:
    """Return the latency rows by batch size."""
    return sorted((validation.latency_ms or {}).values(), key=lambda row: row.batch)


def _quality(item: tuple[str, OutputMetrics]) -> float:
    metrics = item[1]
    if metrics.nonfinite:
        return float("-inf")
    if metrics.exact:
        return float("inf")
    if metrics.sqnr_db is not None:
        return metrics.sqnr_db
    return metrics.exact_match if metrics.exact_match is not None else 0.0


def _headline(report: Report, name: str) -> Headline:
    target, validation = report.targets[name], report.validation[name]
    rows = batches(validation)
    reference = validation.fp32_bytes if validation.fp32_bytes is not None else report.source.fp32_bytes
    share = target.bytes / reference if target.bytes is not None and reference else None
    return Headline(
        target=name,
        status=target.status,
        reason=target.reason or "",
        verdict=validation.verdict,
        size=size(target.bytes) + (f" ({100 * share:.0f} % of FP32's {size(reference)})" if share is not None else ""),
        size_share=share,
        accuracy=tuple(_accuracy(validation)),
        latency=tuple(
            f"batch {r.batch}: {milliseconds(r.p50)}"
            + (f", {r.beside[0]} {milliseconds(r.beside[1].p50)} ({times(r.beside[2])})" if r.beside else "")
            for r in rows
        )
        + tuple(_step(validation)),
        slower=tuple(
            f"batch {r.batch} takes {milliseconds(r.p50)}, {r.beside[0]} {milliseconds(r.beside[1].p50)}"
            for r in rows
            if r.beside and r.beside[2] < 1
        ),
        simulated=validation.mode in (Mode.SIMULATED, Mode.EMULATED),
    )


def _accuracy(validation: Validation) -> list[str]:
    lines = []
    worst = worst_output(validation)
    if worst is not None:
        lines.append(describe_output(*worst) + (" (worst output)" if len(validation.outputs or {}) > 1 else ""))
    task = validation.task
    if task is not None:
        lines += [
            f"{metric if metric == task.name else f'{task.name} {metric}'}: {number(value)}, FP32 {number(task.fp32.get(metric))}"
            for metric, value in task.engine.items()
        ]
    return lines + _generation(validation)


def _generation(validation: Validation) -> list[str]:
    found = validation.generation
    if found is None:
        return []
    same = sum(row.identical for row in found.prompts)
    return [
        f"generation: {percent(found.token_agreement)} of FP32's {found.tokens} tokens, "
        f"{same} of {len(found.prompts)} continuations identical"
    ]


def _step(validation: Validation) -> list[str]:
    found = validation.generation
    if found is None or found.engine_step_ms is None or found.fp32_step_ms is None:
        return []
    ratio = found.fp32_step_ms / found.engine_step_ms
    return [
        f"token by token: {milliseconds(found.engine_step_ms)}, FP32 {milliseconds(found.fp32_step_ms)} ({times(ratio)})"
    ]


def describe_output(name: str, metrics: OutputMetrics) -> str:
    """Return one output's accuracy in a few words."""
    if metrics.exact:
        return f"{name}: equal to FP32"
    parts = [f"SQNR {decibels(metrics.sqnr_db)}"] if metrics.sqnr_db is not None else []
    if metrics.cosine is not None:
        parts.append(f"cosine {metrics.cosine:.5f}")
    if metrics.exact_match is not None:
        parts.append(f"{percent(metrics.exact_match)} of values equal")
    if metrics.nonfinite:
        parts.append(f"{metrics.nonfinite} values are NaN or infinite on one side only")
    return f"{name}: {', '.join(parts) or 'not measured'}"
