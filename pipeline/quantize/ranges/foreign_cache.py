"""A calibration cache that another tool wrote, as ranges for our own Q/DQ pairs.

TensorRT 10's calibrators leave a scale for every tensor of a network; TensorRT 11 reads none of them. Here each quantized
activation takes its range from the cache, and what does not match is said: tensors that the cache lacks, and tensors
of the cache that the graph does not quantize or does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibrators import cache_file
from pipeline.errors import QuantizeError
from pipeline.notices import notice
from pipeline.quantize.insertion.sites import Site
from pipeline.quantize.ranges.choose import SiteRange
from pipeline.types import QuantDType, Range

METHOD = "cache"
"""What a :class:`SiteRange` from a cache names as its calibrator."""
_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How a cache and a graph match.

    Attributes:
        covered: Quantized tensors whose range the cache gives.
        lacking: Quantized tensors that the cache lacks, or gives a scale of 0.
        unused: Tensors of the cache that the graph does not quantize or does not have.
    """

    covered: tuple[str, ...]
    lacking: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.covered) + len(self.lacking)
        return (
            f"the calibration cache covers {len(self.covered)} of {total} quantized tensors{_such(self.lacking, 'lacks')}"
            f"{_such(self.unused, 'has without use')}"
        )


def _such(names: Sequence[str], verb: str) -> str:
    shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return f"; it {verb} {len(names)} ({shown})" if names else ""


def ranges_from_cache(cache: Mapping[str, float], sites: Sequence[Site]) -> tuple[tuple[SiteRange, ...], Coverage]:
    """Return the ranges that a cache gives, and what it covers.

    A scale stands for the range ±127 scale. Sites that must have one scale (concatenated or rearranged tensors) take the
    largest of theirs; a tensor that only rearranges another one takes that one's range if it has none itself.

    Args:
        cache: Tensor to scale, from :func:`calibrators.cache_file.read`.
        sites: Activation sites; those that are not covered are left out of the result.
    """
    found, lacking = [], []
    groups: dict[tuple[str, ...], list[float]] = {}
    for site in sites:
        groups.setdefault(site.observed, []).extend(
            cache[name] for name in {site.tensor, *site.observed} if cache.get(name, 0.0) > 0
        )
    for site in sites:
        scales = groups[site.observed]
        if not scales:
            lacking.append(site.tensor)
            continue
        amax = QuantDType.INT8.qmax * max(scales)
        limits = Range(min=-amax, max=amax)
        found.append(SiteRange(site=site, method=METHOD, range=limits, options={METHOD: limits}))
    read = {name for site in sites for name in (site.tensor, *site.observed)}
    coverage = Coverage(
        covered=tuple(dict.fromkeys(item.site.tensor for item in found)),
        lacking=tuple(dict.fromkeys(lacking)),
        unused=tuple(name for name in cache if name not in read),
    )
    return tuple(found), coverage


def cached_ranges(
    path: Path, sites: Sequence[Site], others: Callable[[Sequence[Site]], Sequence[SiteRange]] | None
) -> tuple[SiteRange, ...]:
    """Return a range for every site: the cache's, and our own where it lacks one. Says what the cache covers.

    Args:
        path: The calibration cache.
        sites: Every activation site.
        others: Chooses ranges from statistics; ``None`` if there are none.

    Raises:
        DataError: The cache cannot be read.
        QuantizeError: The cache lacks a tensor and there are no statistics.
    """
    found, coverage = ranges_from_cache(cache_file.read(path), sites)
    if coverage.lacking and others is None:
        raise QuantizeError(
            f"The calibration cache lacks {len(coverage.lacking)} of the tensors that the precision plan quantizes"
            f"{_such(coverage.lacking, 'lacks')}.",
            where=str(path),
            fix="Give calibration.data for them too, or keep the nodes that read them in high precision with a rule.",
        )
    notice("calibration-cache", f"{str(coverage)[:1].upper()}{str(coverage)[1:]}.", where=str(path))
    known = {(item.site.tensor, item.site.spec): item for item in found}
    left = [site for site in sites if (site.tensor, site.spec) not in known]
    known |= {(item.site.tensor, item.site.spec): item for item in (others(left) if left and others else ())}
    return tuple(known[site.tensor, site.spec] for site in sites)
