"""What quantization schemes cost a model in accuracy, measured on simulations: a side line of the build that deploys nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrators.collector import Statistics
from calibrators.sketch import Sketch
from pipeline import model as models
from pipeline.errors import PolicyError, QuantizeError, RecipeError
from pipeline.graph.prepare import Prepared
from pipeline.graph.roles import find_roles
from pipeline.notices import notice
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import Evidence
from pipeline.policy.planning import plan as make_plan
from pipeline.policy.remarks import remark
from pipeline.policy.rules import candidates
from pipeline.policy.skip import outlier_ratios
from pipeline.quantize.schemes import SCHEMES, Scales, Scheme
from pipeline.quantize.simulate import products
from pipeline.quantize.simulate import simulate as write_simulation
from pipeline.recipe import METHODS, Preset, Recipe
from pipeline.sources.export import Exported
from pipeline.stages.run import Run
from pipeline.stages.validation import with_tokenizer
from pipeline.types import CalibrationData, Precision, Range, TensorInfo
from pipeline.validation.measurement import Measurements, Mode
from pipeline.validation.tasks import open_task
from pipeline.validation.validate import ValidateOptions
from pipeline.validation.validate import validate as measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """One scheme on one model.

    Attributes:
        scheme: What was simulated.
        quantized: How many products it quantized.
        products: Of how many.
        measurements: Against FP32; of a simulation, so neither latency nor size. ``None`` where the scheme quantizes nothing.
    """

    scheme: Scheme
    quantized: int
    products: int
    measurements: Measurements | None

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON; ``deployable`` and ``runs_on`` say what exists outside of the simulation."""
        weights, activations = self.scheme.in_words()
        return {
            "scheme": self.scheme.name,
            "weights": weights,
            "activations": activations,
            "deployable": self.scheme.deployable,
            "runs_on": self.scheme.runs_on,
            "quantized": self.quantized,
            "products": self.products,
            "measurements": None if self.measurements is None else self.measurements.to_dict(),
        }


def simulated_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe whose plan says which nodes schemes quantize: what the policy quantizes, all of it in INT8."""
    policy = recipe.policy
    # The schemes round and scale in their own ways.
    plain = [r.model_copy(update=dict.fromkeys(METHODS)) for r in policy.rules if r.precision is not None]
    rules = tuple(
        r.model_copy(update={"precision": Precision.INT8}) if r.precision and r.precision.quantized else r
        for r in plain
    )
    preset = policy.preset if policy.preset is Preset.INT8_ALL else Preset.INT8
    methods = {"smooth": "off", "rounding": "rtn", "block_size": None}
    update = {"preset": preset, "rules": rules, "activations": "static", "llm_int8_threshold": None, **methods}
    return recipe.model_copy(update={"policy": policy.model_copy(update=update), "targets": ("cpu",)})


def check_ranges(recipe: Recipe, schemes: Sequence[Scheme]) -> None:
    """Refuse schemes whose ranges nothing would tell.

    Raises:
        RecipeError: A scheme has static scales, and there is no calibration data.
    """
    static = [scheme.name for scheme in schemes if calibrated(scheme)]
    if static and recipe.calibration.data is None:
        others = " ".join(f"--scheme {scheme.name}" for scheme in SCHEMES.values() if not calibrated(scheme))
        raise RecipeError(
            f"Schemes with static scales need calibration data, and the recipe names none: {', '.join(static)}.",
            where="calibration.data",
            fix=f"Give --calibration DATA, or compare those that need none: {others}.",
        )


def simulate_schemes(
    run: Run, exported: Exported, canonical: Prepared, statistics: Statistics | None, schemes: Sequence[Scheme]
) -> tuple[Simulated, ...]:
    """Return what every scheme costs on held-out data, or on calibration's where there is no other.

    Each simulation is written, measured and removed before the next; only the measurements stay, in ``simulations/``.

    Raises:
        RecipeError: There is no data.
        PolicyError: The policy quantizes no product.
        QuantizeError: A scheme has static scales, and calibration saw no finite values of a tensor.
    """
    inputs = models.inputs(models.load(canonical.path))
    section, data = run.recipe.validate_, _data(run, exported, inputs)
    plan = _planned(run, canonical, statistics)
    ranges = _ranges(canonical, plan, statistics) if any(calibrated(s) for s in schemes) else {}
    options = ValidateOptions(
        mode=Mode.EMULATED,
        threads=run.recipe.threads,
        task=open_task(with_tokenizer(section, exported), inputs),
        latency=None,
    )
    key = {
        "model": canonical.path,
        "plan": plan.to_json(),
        "data": data.digest(),
        "labels": Path(section.labels) if section.labels else None,
        "section": section.model_dump(mode="json", include={"task", "labels", "stride"}),
        "threads": run.recipe.threads,
    }
    found = []
    for scheme in schemes:
        out = f"simulations/{scheme.name}.json"

        def produce(work: Path, scheme: Scheme = scheme, out: str = out) -> None:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                path = Path(folder) / "model.onnx"
                quantized, of = write_simulation(canonical.path, plan, scheme, ranges, path)
                measured = (
                    measure(canonical.path, path, data, options=options, progress=run.progress) if quantized else None
                )
            made = Simulated(scheme=scheme, quantized=quantized, products=of, measurements=measured)
            (work / out).write_text(json.dumps(made.to_dict(), indent=1) + "\n", encoding="utf-8")

        own = {"ranges": {t: [r.min, r.max] for t, r in ranges.items()} if calibrated(scheme) else None}
        path = run.stage(f"simulate/{scheme.name}", key | own | {"scheme": repr(scheme)}, [out], produce).paths[out]
        stored = json.loads(path.read_text(encoding="utf-8"))
        facts = stored["measurements"]
        measured = None if facts is None else Measurements.from_dict(facts, where=str(path))
        found.append(
            Simulated(scheme=scheme, quantized=stored["quantized"], products=stored["products"], measurements=measured)
        )
    return tuple(found)


def _data(run: Run, exported: Exported, inputs: tuple[TensorInfo, ...]) -> CalibrationData:
    heldout = run.open(run.recipe.validate_, exported, inputs)
    if heldout is not None:
        return heldout
    data = run.open(run.recipe.calibration, exported, inputs)
    if data is None:
        raise RecipeError(
            "There is no data to measure schemes on.", where="calibration.data", fix="Give --calibration DATA."
        )
    notice("simulated-on-calibration", "No held-out data was given, so schemes are measured on calibration data.")
    return data


def _planned(run: Run, canonical: Prepared, statistics: Statistics | None) -> PrecisionPlan:
    (family,) = run.families
    model, policy = models.load(canonical.path), run.policies[family]
    roles = find_roles(model)
    judged = policy.outlier_threshold is not None
    if judged and statistics is None:
        notice("outliers-unchecked", "Without calibration statistics nothing says which tensors have outliers.")
    spread = outlier_ratios(statistics) if judged and statistics is not None else {}
    plan = make_plan(model, roles, policy, family, Evidence(outliers=spread))
    remark(plan, candidates(model, roles), policy)
    if not products(model, plan):
        raise PolicyError(
            "The policy quantizes no product with a constant weight, so there is nothing to compare.",
            where="policy",
            fix="See which nodes stay high, and why: python -m pipeline build --dry-run.",
        )
    return plan


def _ranges(canonical: Prepared, plan: PrecisionPlan, statistics: Statistics | None) -> Mapping[str, Range]:
    """Return the least and largest value that calibration saw of everything that a product reads."""
    found = {}
    for node, _ in products(models.load(canonical.path), plan).values():
        value = node.inputs[0]
        assert value is not None
        sketch = statistics.get(value.name or "") if statistics is not None else None
        if not isinstance(sketch, Sketch) or not sketch.count or sketch.nonfinite:
            raise QuantizeError(
                "Calibration saw no values of the tensor, or some that are NaN or infinite.",
                where=f"tensor {value.name}",
                fix="Give --calibration DATA that is finite, or compare schemes with dynamic scales only (--scheme).",
            )
        found[value.name or ""] = Range(min=float(sketch.min), max=float(sketch.max))
    return found


def calibrated(scheme: Scheme) -> bool:
    """Whether the scheme has scales that calibration finds."""
    return scheme.activations is not None and scheme.scales is Scales.STATIC
