"""Reference and candidate outputs compared batch by batch, in memory that does not grow with the samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import EngineError
from pipeline.types import Array
from pipeline.validation.measurement import OutputMetrics

_CHUNK_VALUES = 1 << 19
"""Values widened to float64 at once: a batch of language-model logits would otherwise need several times its size."""

_COSINE_EPSILON = 1e-12
"""Added to the product of the norms, so that a row of zeros against one of values has cosine 0."""


@dataclass(slots=True)
class _Sums:
    """Running sums of one output."""

    count: int = 0
    special: int = 0
    nonfinite: int = 0
    unequal: int = 0
    reference_energy: float = 0.0
    noise_energy: float = 0.0
    abs_sum: float = 0.0
    max_abs: float = 0.0
    dot: float = 0.0
    candidate_energy: float = 0.0
    rows: int = 0
    cosine_sum: float = 0.0
    cosine_min: float = math.inf
    top1_rows: int = 0
    top1_equal: int = 0


@dataclass(slots=True)
class _Output:
    """One output: what kind it is, and its sums."""

    exact_only: bool
    by_row: bool
    sums: _Sums = field(default_factory=_Sums)


class Comparison:
    """Adds up how far a candidate's outputs are from the reference's.

    An output ``[batch, seq, width]`` whose first two axes are those of the attention mask is compared only where the
    mask is not 0: nobody reads what a model computes for padding.
    """

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    def update(self, reference: Mapping[str, Array], candidate: Mapping[str, Array], mask: Array | None = None) -> None:
        """Add one batch.

        Args:
            reference: Output name to array.
            candidate: The same names and shapes; the float type may differ.
            mask: ``[batch, seq]``, 0 where there is padding.

        Raises:
            EngineError: An output is missing, or its shape or kind of type differs.
        """
        for name, ref in reference.items():
            if name not in candidate:
                raise EngineError(
                    "The candidate lacks an output that the reference has.",
                    where=f"output {name}",
                    fix=f"Its outputs are {', '.join(candidate) or 'none'}; quantize the same model.",
                )
            self._add(name, np.asarray(ref), np.asarray(candidate[name]), mask)

    def result(self) -> dict[str, OutputMetrics]:
        """Return the metrics of every output, in the reference's order."""
        return {name: _finish(output) for name, output in self._outputs.items()}

    def noise(self) -> dict[str, tuple[float, float]]:
        """Return ``(sum ref^2, sum (ref - out)^2)`` of every float output."""
        return {
            name: (output.sums.reference_energy, output.sums.noise_energy)
            for name, output in self._outputs.items()
            if not output.exact_only
        }

    def worst(self) -> tuple[float, float]:
        """Return :meth:`noise` of the output where noise over signal is greatest; zeros if none has a signal."""
        outputs = [(signal, noise) for signal, noise in self.noise().values() if signal > 0]
        return max(outputs, key=lambda item: item[1] / item[0], default=(0.0, 0.0))

    def _add(self, name: str, ref: Array, out: Array, mask: Array | None) -> None:
        if ref.shape != out.shape:
            raise EngineError(
                f"An output has shape {list(out.shape)}, and {list(ref.shape)} in the reference.",
                where=f"output {name}",
                fix="The two models must come from the same source.",
            )
        floating = _is_float(ref)
        if floating != _is_float(out):
            raise EngineError(
                f"An output is {out.dtype}, and {ref.dtype} in the reference.",
                where=f"output {name}",
                fix="The two models must come from the same source.",
            )
        output = self._outputs.setdefault(name, _Output(exact_only=not floating, by_row=ref.ndim > 1))
        if mask is not None and ref.ndim == 3 and ref.shape[:2] == mask.shape:
            keep = mask > 0
            ref, out = ref[keep], out[keep]
        if ref.size == 0:
            return
        if output.exact_only:
            output.sums.count += ref.size
            output.sums.unequal += int((ref != out).sum())
            return
        width = ref.shape[-1] if output.by_row else 1
        rows_ref, rows_out = ref.reshape(-1, width), out.reshape(-1, width)
        step = max(1, _CHUNK_VALUES // width)
        for start in range(0, len(rows_ref), step):
            with np.errstate(over="ignore", invalid="ignore"):  # float64 overflow becomes a figure that is None
                _add_rows(output, rows_ref[start : start + step], rows_out[start : start + step])


def _is_float(values: Array) -> bool:
    return bool(np.issubdtype(values.dtype, np.floating))


def _add_rows(output: _Output, ref: Array, out: Array) -> None:
    """Add rows ``[n, width]``."""
    sums = output.sums
    r, g = ref.astype(np.float64), out.astype(np.float64)
    sums.count += r.size
    if output.by_row and r.shape[1] > 1:
        sums.top1_rows += len(r)
        sums.top1_equal += int((r.argmax(1) == g.argmax(1)).sum())
    finite = np.isfinite(r) & np.isfinite(g)
    if not finite.all():
        # -inf in masked logits is normal: the same special value on both sides is agreement, not an error.
        same = (r == g) | (np.isnan(r) & np.isnan(g))
        sums.special += int((~finite).sum())
        sums.nonfinite += int((~finite & ~same).sum())
        r, g = np.where(finite, r, 0.0), np.where(finite, g, 0.0)
    difference = np.abs(r - g)
    sums.unequal += int(np.count_nonzero(difference))
    sums.noise_energy += float(np.square(difference).sum())
    sums.abs_sum += float(difference.sum())
    sums.max_abs = max(sums.max_abs, float(difference.max()))
    dot = np.einsum("ij,ij->i", r, g)
    rr, gg = np.einsum("ij,ij->i", r, r), np.einsum("ij,ij->i", g, g)
    sums.reference_energy += float(rr.sum())
    sums.candidate_energy += float(gg.sum())
    sums.dot += float(dot.sum())
    if output.by_row:
        cosine = dot / (np.sqrt(rr) * np.sqrt(gg) + _COSINE_EPSILON)
        cosine[(rr == 0) & (gg == 0)] = 1.0
        sums.rows += len(cosine)
        sums.cosine_sum += float(cosine.sum())
        sums.cosine_min = min(sums.cosine_min, float(cosine.min()))


def sqnr_db(reference_energy: float, noise_energy: float) -> float | None:
    """Return ``10 log10(reference / noise)`` in dB; ``None`` where it is not finite (no noise, or no signal)."""
    if not (reference_energy > 0 and noise_energy > 0):
        return None
    return _finite(10.0 * (math.log10(reference_energy) - math.log10(noise_energy)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finish(output: _Output) -> OutputMetrics:
    s = output.sums
    if s.count == 0:
        return OutputMetrics(count=0)
    exact = s.unequal == 0 and s.nonfinite == 0
    compared = s.count - s.special
    if output.exact_only:
        return OutputMetrics(count=s.count, exact=exact, exact_match=1.0 - s.unequal / s.count)
    if compared == 0:
        return OutputMetrics(count=s.count, nonfinite=s.nonfinite, exact=exact)
    if output.by_row:
        cosine, cosine_min = s.cosine_sum / s.rows, s.cosine_min
    else:
        norms = math.sqrt(s.reference_energy) * math.sqrt(s.candidate_energy)
        zero = s.reference_energy == 0 and s.candidate_energy == 0
        cosine = cosine_min = 1.0 if zero else s.dot / (norms + _COSINE_EPSILON)
    return OutputMetrics(
        count=s.count,
        nonfinite=s.nonfinite,
        exact=exact,
        sqnr_db=sqnr_db(s.reference_energy, s.noise_energy),
        cosine=_finite(cosine),
        cosine_min=_finite(cosine_min),
        max_abs=_finite(s.max_abs),
        mean_abs=_finite(s.abs_sum / compared),
        relative_l2=_finite(math.sqrt(s.noise_energy / s.reference_energy)) if s.reference_energy > 0 else None,
        top1_agreement=s.top1_equal / s.top1_rows if s.top1_rows else None,
    )
