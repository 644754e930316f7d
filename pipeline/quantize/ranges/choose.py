"""Choose the range of every activation site from its statistics, and keep what the other calibrators would have cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from calibrators.calibrate import best, calibrator, quantization_error
from calibrators.collector import Statistics
from calibrators.sketch import Sketch
from pipeline.errors import QuantizeError
from pipeline.notices import notice
from pipeline.quantize.insertion.sites import Site
from pipeline.recipe import Method
from pipeline.types import QuantDType, QuantSpec, Range, Role

CANDIDATES = (Method.MINMAX, Method.PERCENTILE, Method.MSE, Method.ENTROPY)
"""What ``auto`` chooses from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRange:
    """The range of one activation site.

    Attributes:
        site: The tensor, its format, and who reads it.
        method: The calibrator whose range this is.
        range: The interval that is kept.
        errors: Calibrator to the mean squared quantization error on the calibration data.
        options: Calibrator to its range, what ``auto`` may still choose from.
    """

    site: Site
    method: str
    range: Range
    errors: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Range] = field(default_factory=dict)

    def use(self, method: str) -> SiteRange:
        """Return this site with another calibrator's range."""
        return replace(self, method=method, range=self.options[method])


def choose_ranges(
    found: Sequence[Site],
    statistics: Statistics,
    method: Method,
    *,
    percentile: float = 99.99,
) -> tuple[SiteRange, ...]:
    """Return a range for every site.

    Args:
        found: Activation sites, from :func:`pipeline.quantize.insertion.sites.sites`.
        statistics: A sketch for each tensor that a site observes.
        method: A calibrator; ``auto`` takes, per tensor, the candidate with the least squared error
            (:mod:`pipeline.quantize.ranges.tune` then checks the choice at the network's output).
        percentile: For ``percentile``.

    Raises:
        QuantizeError: The statistics lack a tensor, or one of them is not finite.
    """
    methods = list(CANDIDATES) if method is Method.AUTO else [method]
    chosen = []
    constant = []
    for site in found:
        sketch = sketch_of(statistics, site)
        if sketch.min == sketch.max:
            constant.append(site.tensor)
        options = {str(m): calibrator(m, percentile=percentile).range(sketch, site.spec) for m in methods}
        errors = {m: quantization_error(sketch, r, site.spec) / max(sketch.count, 1) for m, r in options.items()}
        name, limits, _ = best([(m, r, errors[m]) for m, r in options.items()], site.spec)
        chosen.append(SiteRange(site=site, method=name, range=limits, errors=errors, options=options))
    if constant:
        notice(
            "constant-activation",
            f"{len(constant)} quantized tensors had one single value on all calibration data, such as {constant[0]}; "
            "their range says nothing about other data",
        )
    return tuple(chosen)


def role_groups(ranges: Sequence[SiteRange]) -> dict[tuple[Role, ...], list[int]]:
    """Return the sites grouped by the roles that read them, in first-seen order.

    Sites that must have one scale stay together, with the roles of the first of them.
    """
    groups: dict[tuple[Role, ...], list[int]] = {}
    together: dict[tuple[str, ...], tuple[Role, ...]] = {}
    for index, item in enumerate(ranges):
        roles = together.setdefault(item.site.observed, item.site.roles)
        groups.setdefault(roles, []).append(index)
    return groups


def sketch_of(statistics: Statistics, site: Site) -> Sketch:
    """Return the sketch that a site's range comes from: of all tensors that must have its scale, merged.

    Raises:
        QuantizeError: The statistics lack one of them, or it has no finite values.
    """
    sketches = [_observed(statistics, tensor) for tensor in site.observed]
    if len(sketches) == 1:
        return sketches[0]
    total = Sketch()
    for sketch in sketches:
        total.merge(sketch)
    return total


def _observed(statistics: Statistics, tensor: str) -> Sketch:
    found = statistics.get(tensor)
    if not isinstance(found, Sketch):
        raise QuantizeError(
            "The statistics lack a tensor that the precision plan quantizes.",
            where=f"tensor {tensor}",
            fix="Run `python -m pipeline calibrate` again with this recipe.",
        )
    if found.nonfinite:
        raise QuantizeError(
            f"A tensor that the precision plan quantizes held NaN or infinity {found.nonfinite} times on the calibration "
            "data, so it has no range.",
            where=f"tensor {tensor}",
            fix="Check the calibration data, or keep the nodes that read it in high precision with a rule "
            "(`python -m pipeline inspect` names them).",
        )
    if found.count == 0:
        raise QuantizeError(
            "A tensor that the precision plan quantizes had no values on any calibration sample.",
            where=f"tensor {tensor}",
            fix="Check that the calibration data is not empty, or keep the nodes that read it in high precision with a "
            "rule (`python -m pipeline inspect` names them).",
        )
    return found


def to_json(ranges: Sequence[SiteRange]) -> str:
    """Return the ranges as JSON text; the same ranges give the same text."""
    return json.dumps([asdict(r) for r in ranges], indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> tuple[SiteRange, ...]:
    """Return what :func:`to_json` wrote."""
    return tuple(_site_range(raw) for raw in json.loads(text))


def _site_range(raw: dict[str, Any]) -> SiteRange:
    site = raw["site"]
    spec = site["spec"]
    return SiteRange(
        site=Site(
            tensor=site["tensor"],
            spec=QuantSpec(dtype=QuantDType(spec["dtype"]), symmetric=spec["symmetric"], axis=spec["axis"]),
            readers=None if site["readers"] is None else tuple((n, i) for n, i in site["readers"]),
            roles=tuple(Role(r) for r in site["roles"]),
            observed=tuple(site["observed"]),
        ),
        method=raw["method"],
        range=Range(**raw["range"]),
        errors=raw["errors"],
        options={m: Range(**r) for m, r in raw["options"].items()},
    )
