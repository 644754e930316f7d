"""Mixed precision: a draft of every variant is measured node by node, and what costs too much goes back to high precision."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pipeline import model as models
from pipeline.errors import RecipeError
from pipeline.graph.roles import find_roles
from pipeline.notices import notice
from pipeline.policy.mixed import Choice, Unit, choose, ranked
from pipeline.policy.rules import candidates
from pipeline.policy.sharing import merged_projections
from pipeline.quantize.emulate import emulate
from pipeline.recipe import MixedPrecision
from pipeline.stages.run import Run, step
from pipeline.stages.tuning_samples import first_batches
from pipeline.stages.variants import Variants
from pipeline.types import CalibrationData, Feeds, Progress, Role
from pipeline.validation.feeds import mask_of
from pipeline.validation.metrics import Comparison, sqnr_db
from pipeline.validation.switch import SwitchedRunner, switched
from pipeline.validation.transplant import Pairing
from pipeline.validation.work import Work, count_work

HIGH = "mixed_precision.json"
OVERFLOW = 1e30
"""Noise over signal where quantized nodes make an output NaN or infinite that is finite without: -300 dB."""


def wants_mixed(run: Run) -> bool:
    """Whether variants are drafted and measured before they are planned for good.

    Raises:
        RecipeError: There is no data to measure on.
    """
    if run.recipe.policy.mixed_precision is None:
        return False
    if run.options.dry_run:
        notice("mixed-not-chosen", "A dry run measures nothing, so the plan is that before mixed precision.")
        return False
    if run.recipe.calibration.data is None:
        raise RecipeError(
            "Mixed precision is chosen on calibration data, and the recipe names none.",
            where="policy.mixed_precision",
            fix="Give --calibration DATA, or leave policy.mixed_precision out.",
        )
    return True


@step
def mixed(run: Run, draft: Variants | None) -> dict[str, dict[str, str]]:
    """For each family the nodes that go back to high precision, and what they cost; nothing without a draft."""
    section = run.recipe.policy.mixed_precision
    if draft is None or section is None:
        if not run.options.dry_run:
            # What an earlier run measured must not be taken for this build's.
            shutil.rmtree(run.directory / "draft", ignore_errors=True)
            for name in run.families:
                run.forget("mixed", name)
        return {}
    inputs = models.inputs(models.load(draft.canonical.path))
    data = run.open(run.recipe.calibration, draft.exported, inputs)
    assert data is not None  # wants_mixed has seen to it
    found = {}
    for name, plan in draft.plans.items():
        if not plan.quantized():
            notice(
                "mixed-precision-unused",
                f"The variant {name} has no quantized node that could go back to high precision.",
            )
            run.forget("mixed", name)
            continue
        out = f"{run.folder(name)}/{HIGH}"

        def produce(work: Path, name: str = name, out: str = out, data: CalibrationData = data) -> None:
            feeds = first_batches(data, section.samples, inputs)
            measured = _measured(draft, name, feeds, section, run.recipe.threads, run.progress)
            (work / out).write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

        key = {
            "model": draft.floats[name].path,
            "draft": draft.variants[name],
            "plan": plan.to_json(),
            "data": data.digest(),
            "section": section.model_dump(mode="json"),
        }
        path = run.stage(run.part("mixed", name), key, [out], produce).paths[out]
        result = json.loads(path.read_text(encoding="utf-8"))
        found[name] = _told(result, section, where=out)
    return found


def _told(result: Mapping[str, Any], section: MixedPrecision, *, where: str) -> dict[str, str]:
    """Say what was chosen; return node to reason."""
    high = [u for u in result["units"] if u["high"]]
    after, before = result["sqnr_db_after"], result["low_share_before"]
    nodes = [node for unit in high for node in unit["nodes"]]
    notice(
        "mixed-precision",
        f"{len(nodes)} of {sum(len(u['nodes']) for u in result['units'])} quantized nodes go back to high precision: "
        f"{_db(result['sqnr_db_before'])} to {_db(after)} on {result['samples']} calibration samples, "
        f"{result['low_share_after']:.1%} of the products stay narrow ({before:.1%} before)",
        where=where,
    )
    if before < section.low_share:
        notice(
            "mixed-precision-share",
            f"No node goes back: the plan leaves {before:.1%} of the products narrow, less than low_share ({section.low_share:.1%}) already.",
            where=where,
        )
    elif section.sqnr_db is not None and after is not None and after < section.sqnr_db:
        notice(
            "mixed-precision-short",
            f"{section.sqnr_db:g} dB are not reached with a low_share of {section.low_share:.1%}: {_db(after)} is what it leaves room for.",
            where=where,
        )
    return {node: f"mixed precision: {_why(unit)}" for unit in high for node in unit["nodes"]}


def _why(unit: Mapping[str, Any]) -> str:
    return f"{unit['noise_share']:.1%} of the noise for {unit['products_share']:.1%} of the products"


def _db(value: float | None) -> str:
    if value is None:
        return "no noise"
    return "overflow" if value <= -10 * math.log10(OVERFLOW) else f"{value:.1f} dB"


@dataclass(frozen=True, slots=True)
class _Trials:
    """The float model with any of its nodes quantized, on some batches."""

    live: SwitchedRunner
    feeds: Sequence[Feeds]
    expected: Sequence[Feeds]

    def noise(self, nodes: Sequence[str]) -> float:
        """Return noise over signal of the worst output with these nodes quantized; ``OVERFLOW`` where they make NaN or infinity."""
        comparison, on = Comparison(), frozenset(nodes)
        for feeds, wanted in zip(self.feeds, self.expected, strict=True):
            comparison.update(wanted, self.live.infer(feeds, on), mask_of(feeds))
        if any(output.nonfinite for output in comparison.result().values()):
            return OVERFLOW
        signal, noise = comparison.worst()
        return min(noise / signal, OVERFLOW) if signal > 0 else 0.0


def _measured(
    draft: Variants, family: str, feeds: Sequence[Feeds], section: MixedPrecision, threads: int, progress: Progress
) -> dict[str, Any]:
    plan, own = draft.plans[family], draft.floats[family].path
    names = [n.node for n in plan.quantized() if n.role is not Role.KV_CACHE]
    work = count_work(draft.canonical.path, feeds[0], names, threads=threads)
    total = sum(w.products for w in work.values())
    low = sum(work[name].products for name in names)
    with tempfile.TemporaryDirectory() as folder:
        path = draft.variants[family]
        quantized = models.load(emulate(path, Path(folder) / "model.onnx", like=own) if plan.emulated else path)
        reference = models.load(own)
        nodes = [name for name in names if Pairing(reference, quantized).quantized(name) is not None]
        groups = _groups(models.load(draft.canonical.path), nodes)
        with switched(reference, quantized, nodes, threads=threads) as live:
            trials = _Trials(live, feeds, [live.infer(batch) for batch in feeds])
            units = _units(groups, work, trials, progress)
            chosen = choose(
                units,
                lambda some: trials.noise([node for unit in some for node in unit.nodes]),
                most_noise=None if section.sqnr_db is None else 10 ** (-section.sqnr_db / 10),
                spare=low - section.low_share * total,
                progress=progress,
            )
    return _written(units, chosen, low, total, sum(len(next(iter(f.values()))) for f in feeds))


def _groups(canonical: ir.Model, nodes: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the nodes in graph order, those that TensorRT merges together."""
    merged = [
        tuple(c.name for c in group) for group in merged_projections(candidates(canonical, find_roles(canonical)))
    ]
    group_of = {node: tuple(n for n in group if n in nodes) for group in merged for node in group}
    return list(dict.fromkeys(group_of.get(node, (node,)) for node in nodes))


def _units(
    groups: Sequence[tuple[str, ...]], work: Mapping[str, Work], trials: _Trials, progress: Progress
) -> list[Unit]:
    units = []
    for index, nodes in enumerate(groups):
        progress("sensitivity", index, len(groups))
        units.append(
            Unit(
                nodes=nodes,
                products=sum(work[n].products for n in nodes),
                elements=sum(work[n].elements for n in nodes),
                noise=trials.noise(nodes),
            )
        )
    progress("sensitivity", len(groups), len(groups))
    return units


def _written(units: Sequence[Unit], chosen: Choice, low: int, total: int, samples: int) -> dict[str, Any]:
    high = {unit.nodes for unit in chosen.high}
    noise = sum(unit.noise for unit in units)
    total = total or 1
    return {
        "samples": samples,
        "sqnr_db_before": sqnr_db(1.0, chosen.before),
        "sqnr_db_after": sqnr_db(1.0, chosen.after),
        "low_share_before": low / total,
        "low_share_after": (low - sum(unit.products for unit in chosen.high)) / total,
        "units": [
            {
                "nodes": list(unit.nodes),
                "high": unit.nodes in high,
                "sqnr_db_alone": sqnr_db(1.0, unit.noise),
                "noise_share": unit.noise / noise if noise else 0.0,
                "products_share": unit.products / total,
            }
            for unit in ranked(units)
        ],
    }
