"""SmoothQuant on the graph: choose, for every tensor that quantized GEMMs read, what to move into their weights.

A few outlier channels stretch the one scale that a tensor has. Dividing channel ``j`` of the activation by ``s_j`` and
multiplying row ``j`` of the weights by it changes nothing in float, and evens the channels out: ``s_j = max|x_j|^alpha /
max|w_j|^(1 - alpha)`` (Xiao et al. 2023, section 4). No alpha fits every layer, so each group of GEMMs that read one
tensor gets the one with the least error of its outputs on calibration samples, or none.

Where the format is symmetric, a one-sided tensor (GELU, SiLU, ReLU) wastes half of the steps. Subtracting ``z_j`` first
makes it two-sided; the product ``z @ W`` is a constant that is added back (Outlier Suppression+, Wei et al. 2023).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.policy.plan import Format, PrecisionPlan
from pipeline.quantize.transforms.groups import Group
from pipeline.quantize.weights.fake import fake_quantize, fake_quantize_weight
from pipeline.types import QuantDType, Range

F32 = npt.NDArray[np.float32]

ALPHAS = (0.4, 0.55, 0.7, 0.85, 1.0)
"""What ``auto`` tries beside none, before it looks closer around the best; below 0.3 too little moves to matter."""
CLOSER = (-0.1, -0.05, 0.05, 0.1)
WORTH = 0.9
"""Smoothing costs an elementwise pass, so it must bring the squared error below this share of the plain one's."""
APART = 2.5
"""How far a channel's largest product must stand above what is usual for the largest to be tried apart."""
USUAL = 0.75
"""Share of the channels that smoothing takes for alike; from 0.5 to 0.9 it hardly matters which."""
MOST_APART = (1, 2, 4)
"""How many channels are tried apart: the builder unrolls so few into the next elementwise kernel; eight are a GEMM."""
WORTH_APART = 0.8
"""A product beside the GEMM reads the float tensor again, so it must bring the squared error below this share."""
WORTH_EXPLICIT = 0.7
"""What a convolution's Mul must bring it below where nothing absorbs it: it writes a whole feature map."""
WEIGHT_COST = 2.0
"""What a weight's rounding counts against an activation's, which differs from token to token and averages out in attention."""
_TINY = np.float32(1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceOptions:
    """How to choose.

    Attributes:
        alphas: What to try.
        forced: Take the best of ``alphas`` even where none gains anything.
        apart: A few channels may be multiplied in high precision beside the GEMM.
        shifts: Channels may be shifted: nothing reads zeros from beside the tensor.
        worth: The share of the plain squared error that smoothing must stay below.
    """

    alphas: Sequence[float] = ALPHAS
    forced: bool = False
    apart: bool = False
    shifts: bool = True
    worth: float = WORTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """What was chosen for one group.

    Attributes:
        group: Who reads the tensor.
        alpha: The exponent; ``None`` leaves the group as it is.
        shifted: Whether a shift makes the tensor two-sided.
        scale: ``s``, float32 ``[channels]``: the activation is divided by it.
        shift: ``z``, float32 ``[channels]``: what is subtracted before.
        outliers: Channels whose products are computed beside the quantized GEMM, in high precision.
        error: Squared error of the GEMMs' outputs over their energy, with this choice.
        plain_error: The same without smoothing.
    """

    group: Group
    alpha: float | None
    shifted: bool
    scale: F32
    shift: F32
    error: float
    plain_error: float
    outliers: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what people read: without the scales, which are in the graph."""
        return {
            "tensor": self.group.tensor,
            "nodes": list(self.group.nodes),
            "alpha": self.alpha,
            "shifted": self.shifted,
            "outliers": list(self.outliers),
            "error": self.error,
            "plain_error": self.plain_error,
        }


def to_json(chosen: Sequence[Smoothing]) -> str:
    """Return the choices as JSON text; the same choices give the same text."""
    return json.dumps([c.to_dict() for c in chosen], indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one or more nodes of a group multiply.

    Attributes:
        samples: Some rows, float32 ``[groups, rows, products summed]``.
        weight: float32 ``[groups, products summed, outputs]``; some outputs of a large weight.
        largest: The largest magnitude of every row of the weight, of all outputs, float32 ``[groups, products summed]``.
        channels: The tensor's channel that each row of the weight multiplies, ``[groups, products summed]``.
    """

    samples: F32
    weight: F32
    largest: F32
    channels: npt.NDArray[np.int64]

    @classmethod
    def of_gemm(cls, samples: F32, weight: F32, largest: F32 | None = None) -> Part:
        """Return the part of GEMMs that read ``samples`` ``[rows, channels]``."""
        most = np.abs(weight).max(axis=1) if largest is None else largest
        return cls(
            samples=samples[None], weight=weight[None], largest=most[None], channels=np.arange(len(weight))[None]
        )


def choose(
    group: Group,
    plan: PrecisionPlan,
    parts: Sequence[Part],
    extremes: tuple[F32, F32],
    *,
    options: ChoiceOptions = ChoiceOptions(),
) -> Smoothing:
    """Return what keeps the outputs of a group's GEMMs closest to float.

    Args:
        group: Who reads the tensor.
        plan: The formats.
        parts: What they multiply.
        extremes: Smallest and largest value of every channel on all calibration data, float32 ``[channels]``.
        options: What to try, and how the weights will be rounded.
    """
    form = plan.formats[group.precision]
    assert form.activations is not None
    ones, zeros = np.ones(len(extremes[0]), np.float32), np.zeros(len(extremes[0]), np.float32)
    trial = _Trial(parts, extremes, form)
    plain = sum(trial.errors(ones, zeros))
    unchanged = Smoothing(
        group=group, alpha=None, shifted=False, scale=ones, shift=zeros, error=plain, plain_error=plain
    )
    best = _best(unchanged, trial, options)
    if options.apart and form.activations.dtype in (QuantDType.INT8, QuantDType.UINT8):
        for outliers in _outliers(extremes, trial.largest):
            found = _best(unchanged, trial, options, outliers)
            if found.error < WORTH_APART * best.error:
                best = found
    return best if options.forced or best.error <= options.worth * plain else unchanged


def _best(unchanged: Smoothing, whole: _Trial, options: ChoiceOptions, outliers: tuple[int, ...] = ()) -> Smoothing:
    """Return the alpha and shift of least error, with the products of ``outliers`` left to high precision."""
    kept = np.setdiff1d(np.arange(len(whole.largest)), outliers)
    trial = whole.of(kept) if outliers else whole
    one_sided = trial.activations.symmetric and trial.activations.dtype is QuantDType.INT8
    kinds = range(3 if one_sided and options.shifts else 1)

    def tried(alpha: float, kind: int) -> tuple[float, float, float, int, F32, F32]:
        scale = _scale(trial.extremes, trial.largest, alpha)
        shift = (np.zeros_like(scale), *_shifts(trial.extremes, scale))[kind]
        activation, weights = trial.errors(scale, shift)
        return activation + WEIGHT_COST * weights, activation + weights, alpha, kind, scale, shift

    best = min((tried(alpha, kind) for alpha in options.alphas for kind in kinds), key=lambda t: t[0])
    if len(options.alphas) > 1:
        nearby = [round(best[2] + step, 2) for step in CLOSER]
        best = min([best, *(tried(alpha, best[3]) for alpha in nearby if alpha <= 1)], key=lambda t: t[0])
    _, error, alpha, kind, scale, shift = best
    if outliers:
        scale, shift = _with_outliers(whole.extremes, kept, scale, shift)
    return replace(unchanged, alpha=alpha, shifted=kind > 0, scale=scale, shift=shift, error=error, outliers=outliers)


def _outliers(extremes: tuple[F32, F32], largest: F32) -> list[tuple[int, ...]]:
    """Return the sets of channels worth leaving out: those whose largest product stands far above the others'.

    Smoothing moves a large activation into its weights; a channel whose weights are large too has nowhere to go.
    """
    products = np.maximum(-extremes[0], extremes[1]) * largest
    order = np.argsort(-products, kind="stable")
    usual = min(np.quantile(products, 0.99), products[order[min(2 * MOST_APART[-1], len(order) - 1)]])
    far = int((products > APART * usual).sum())
    return [tuple(sorted(int(c) for c in order[:count])) for count in MOST_APART if count <= far]


def _with_outliers(extremes: tuple[F32, F32], kept: npt.NDArray[np.int64], scale: F32, shift: F32) -> tuple[F32, F32]:
    """Return scale and shift of all channels; an outlier, which no weight multiplies, is scaled into the others' range."""
    low, high = extremes
    reach = np.maximum(shift - low[kept], high[kept] - shift) / scale
    scales = np.maximum(np.maximum(-low, high), _TINY) / np.float32(max(float(reach.max()), 1e-30))
    shifts = np.zeros_like(scales)
    scales[kept], shifts[kept] = scale, shift
    return scales.astype(np.float32), shifts.astype(np.float32)


def _scale(extremes: tuple[F32, F32], weights: F32, alpha: float) -> F32:
    """Return ``s`` of channels whose largest weights are ``weights``, its geometric mean 1, so that neither side's values leave what FP16 holds.

    Channels below the :data:`USUAL` quantile count as that large: the tensor's range is not theirs to make, and
    a maximum that calibration seldom saw would be scaled up to be cut off on other data.
    """
    largest = np.maximum(np.maximum(-extremes[0], extremes[1]), _TINY).astype(np.float64)
    largest = np.maximum(largest, np.quantile(largest, USUAL))
    rows = np.maximum(weights, _TINY).astype(np.float64)
    logs = alpha * np.log(largest) - (1 - alpha) * np.log(rows)
    scale: F32 = np.exp(logs - logs.mean()).astype(np.float32)
    return scale


def _shifts(extremes: tuple[F32, F32], scale: F32) -> tuple[F32, F32]:
    """Return the shifts worth trying, ``[channels]`` each.

    One puts every channel's middle at zero, as the paper does. The other puts the middle of the whole scaled tensor
    there, which is what a zero point would do: it keeps small channels, where most values lie, as they are.
    """
    low, high = extremes
    middle = np.float32((float((high / scale).max()) + float((low / scale).min())) / 2)
    return ((low + high) / np.float32(2)).astype(np.float32), (middle * scale).astype(np.float32)


class _Trial:
    """The error of a group's outputs for one choice after the other: the activation's rounding, and the weights'."""

    def __init__(
        self, parts: Sequence[Part], extremes: tuple[F32, F32], form: Format, energy: float | None = None
    ) -> None:
        self.parts, self.extremes, self.form = parts, extremes, form
        assert form.activations is not None
        self.activations = form.activations
        self.energy = max(sum(_energy(p.samples @ p.weight) for p in parts), 1e-30) if energy is None else energy
        self.largest = np.zeros(len(extremes[0]), np.float32)
        """The largest weight of every channel."""
        for part in parts:
            np.maximum.at(self.largest, part.channels.reshape(-1), part.largest.reshape(-1))

    def of(self, kept: npt.NDArray[np.int64]) -> _Trial:
        """Return the trial of some channels of GEMMs alone; errors stay relative to the whole output."""
        low, high = self.extremes
        parts = [Part.of_gemm(p.samples[0][:, kept], p.weight[0][kept], p.largest[0][kept]) for p in self.parts]
        return _Trial(parts, (low[kept], high[kept]), self.form, self.energy)

    def errors(self, scale: F32, shift: F32) -> tuple[float, float]:
        """Return what the activation's and the weights' rounding cost, each over the output's energy."""
        low, high = ((e - shift) / scale for e in self.extremes)
        limits = Range(min=float(min(low.min(), 0.0)), max=float(max(high.max(), 0.0)))
        activation = weights = 0.0
        for part in self.parts:
            scales, shifts = scale[part.channels], shift[part.channels]
            moved, rows = (part.samples - shifts[:, None]) / scales[:, None], part.weight * scales[:, :, None]
            activation += _energy((fake_quantize(moved, limits, self.activations) - moved) @ rows)
            weights += _energy(moved @ (fake_quantize_weight(rows, self.form.weights) - rows))
        return activation / self.energy, weights / self.energy


def _energy(values: F32) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def by_tensor(chosen: Sequence[Smoothing]) -> Mapping[str, Smoothing]:
    """Return the choices that change something, by the tensor they change."""
    return {c.group.tensor: c for c in chosen if c.alpha is not None}
