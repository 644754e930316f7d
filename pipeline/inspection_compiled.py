"""What a compiler made of a build's variant for one target: requested against actual, and two builds side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.compiled_layers import CompiledLayers
from engines.roofline import estimate_ms
from engines.target import target as find_target
from pipeline.errors import PipelineError
from pipeline.policy.actual import actual_precisions
from pipeline.policy.plan import PrecisionPlan
from pipeline.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compiled:
    name: str
    layers: CompiledLayers
    fp16: CompiledLayers | None
    plan: PrecisionPlan


def compiled_tables(directory: Path, target: str, *, against: Path | None = None, verbose: bool = False) -> list[Table]:
    """Return what ``target``'s compiled layers show: figures beside FP16 (and another build), then the quantized nodes.

    Args:
        directory: A build directory.
        target: A target of that build.
        against: Another build directory, compared column by column.
        verbose: A row for every kernel, too.

    Raises:
        PipelineError: The build has no compiled layers for the target; says why.
    """
    device = find_target(target)
    found = _load(directory, device.name)
    columns: dict[str, CompiledLayers] = {str(directory): found.layers}
    if found.fp16 is not None:
        columns["same model in FP16"] = found.fp16
    if against is not None:
        columns[str(against)] = _load(against, device.name).layers
    figures = [(name, *(figure(c) for c in columns.values())) for name, figure in _FIGURES.items()]
    estimates = ("estimate, ms (roofline)", *(_number(estimate_ms(c, device)) for c in columns.values()))
    tables = [
        Table(
            title=f"{device.title}: {found.layers.builder}, compiled for {found.layers.compute_capability}",
            columns=("figure", *columns),
            rows=(*figures, estimates),
        ),
        _nodes(found),
    ]
    return [*tables, _kernels(found.layers)] if verbose else tables


_FIGURES: dict[str, Callable[[CompiledLayers], str]] = {
    "kernels": lambda c: str(c.kernels),
    "kinds": lambda c: ", ".join(f"{n} {k}" for k, n in c.kinds.items()),
    "fused attention": lambda c: str(c.fused_attention),
    "FLOPs in low precision": lambda c: (
        "-" if c.low_precision_flops_share is None else f"{c.low_precision_flops_share:.1%}"
    ),
    "moved per batch, MB": lambda c: f"{c.bytes_moved / 1e6:.1f}",
    "engine, MB": lambda c: f"{c.engine_bytes / 1e6:.1f}",
}


def _nodes(found: _Compiled) -> Table:
    actual = actual_precisions(found.plan, found.layers)
    met = sum(a.met is True for a in actual)
    return Table(
        title=f"{met} of {len(actual)} quantized matrix products run on quantized operands",
        columns=("node", "requested", "actual", "kernel"),
        rows=tuple((a.node, a.requested, a.actual or "not visible", a.kernel) for a in actual),
    )


def _kernels(layers: CompiledLayers) -> Table:
    return Table(
        title="every kernel",
        columns=("kernel", "kind", "reads", "writes", "MB", "GFLOP"),
        rows=tuple(
            (
                k.name,
                k.kind,
                ", ".join(f"{t.dtype}{list(t.shape)}" for t in (*k.inputs, *k.constants) if len(t.shape) > 1),
                ", ".join(f"{t.dtype}{list(t.shape)}" for t in k.outputs),
                f"{k.bytes_moved / 1e6:.2f}",
                f"{k.flops / 1e9:.3g}" if k.flops else "",
            )
            for k in layers
        ),
    )


def _load(directory: Path, name: str) -> _Compiled:
    file = directory / "checks" / name / "compiled.json"
    if not file.is_file():
        raise PipelineError(
            f"The build has no compiled layers for {name}{_reason(directory, name)}.",
            where=str(directory),
            fix=f"Build with --target {name} where TensorRT for RTX is installed: pip install '.[rtx]'.",
        )
    beside = file.with_name("compiled.fp16.json")
    targets = _targets(directory)
    if name not in targets:
        raise PipelineError(
            f"The build's report does not speak of {name}, so nothing says which variant was compiled.",
            where=str(directory),
            fix=f"Run `python -m pipeline build` with --target {name}; what was compiled is kept.",
        )
    variant = targets[name]["variant"]
    plan = (directory / f"variants/{variant}/precision_plan.json").read_text(encoding="utf-8")
    return _Compiled(
        name=name,
        layers=CompiledLayers.from_json(file.read_text(encoding="utf-8")),
        fp16=CompiledLayers.from_json(beside.read_text(encoding="utf-8")) if beside.is_file() else None,
        plan=PrecisionPlan.from_json(plan),
    )


def _reason(directory: Path, name: str) -> str:
    targets = _targets(directory)
    if not targets:
        return ", nor a report"
    if name not in targets:
        return f"; its targets are {', '.join(targets)}"
    return f" ({targets[name]['status']}: {targets[name]['reason']})" if targets[name]["reason"] else ""


def _targets(directory: Path) -> dict[str, Any]:
    """Return what the report says of each target; nothing where the build did not come to its report."""
    report = directory / "report.json"
    targets: dict[str, Any] = {}
    if report.is_file():
        targets = json.loads(report.read_text(encoding="utf-8"))["targets"]
    return targets


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
