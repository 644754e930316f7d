"""Calibration on raw values in plain numpy, written without a look at the package: what its results are held against."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from scipy.special import erf
from scipy.stats import entropy as kl_divergence

COUNT = 60_000


def samples(count: int = COUNT) -> dict[str, np.ndarray]:
    """Return activations of the kinds that networks have, float32 ``[count]``."""
    random = np.random.default_rng(7)
    normal = random.standard_normal(count)
    signs = random.choice([-1.0, 1.0], count)
    zeros = random.standard_normal(count)
    zeros[::3] = -0.0
    mask = random.standard_normal(count)
    found = {
        "gaussian": normal,
        "heavy_tailed": random.standard_t(2.5, count),
        "laplace": random.laplace(size=count) * 3,
        "gelu": normal * 0.5 * (1 + erf(normal / math.sqrt(2))),
        "relu": np.maximum(normal, 0),
        "softmax": np.exp(2 * mask) / np.exp(2 * mask).reshape(-1, 100).sum(1).repeat(100),
        "bimodal": signs * 4 + random.standard_normal(count) * 0.3,
        "shifted": 5 + random.standard_normal(count),
        "negative": -np.abs(normal) - 0.5,
        "constant": np.full(count, 0.3),
        "negative_zeros": zeros,
        "tiny": random.standard_normal(count) * 1e-30,
        "outlier": np.concatenate([normal[1:], [60.0]]),
    }
    return {name: values.astype(np.float32) for name, values in found.items()}


def integer_error(values: np.ndarray, scale: float, zero: int, qmin: int, qmax: int) -> float:
    values = values.astype(np.float64)
    quantized = np.clip(np.rint(values / scale) + zero, qmin, qmax)
    return float((((quantized - zero) * scale - values) ** 2).sum())


def symmetric_int8_error(values: np.ndarray, amax: float) -> float:
    return integer_error(values, amax / 127, 0, -128, 127)


def e4m3_error(values: np.ndarray, amax: float) -> float:
    scaled = np.clip(values.astype(np.float64) / (amax / 448), -448, 448).astype(np.float32)
    restored = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * (amax / 448)
    return float(((restored - values) ** 2).sum())


def asymmetric_uint8_error(values: np.ndarray, low: float, high: float) -> float:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    return integer_error(values, scale, int(np.clip(round(-low / scale), 0, 255)), 0, 255)


def least_symmetric(values: np.ndarray, error) -> float:
    """Return the least error that any of many symmetric ranges makes."""
    amax = float(np.abs(values).max())
    return min(error(values, amax * share) for share in np.geomspace(0.02, 1.0, 250))


def least_asymmetric(values: np.ndarray) -> float:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    shares = np.concatenate([[0.0], np.geomspace(0.05, 1.0, 36)])
    lows = [low * share for share in shares] if low < 0 else [0.0]
    highs = [high * share for share in shares] if high > 0 else [0.0]
    few = values[:: 1 + values.size // 20_000]
    ranked = sorted((asymmetric_uint8_error(few, a, b), a, b) for a in lows for b in highs if b > a)
    return min(asymmetric_uint8_error(values, a, b) for _, a, b in ranked[:12])


def divergence(histogram: np.ndarray, start: int, stop: int, levels: int) -> float:
    """Return KL(P || Q) of the kept bins; what is clipped goes to P's end bins only, a tenth of everything at most."""
    kept = histogram[start:stop].astype(np.float64)
    if kept.sum() < 0.9 * histogram.sum():
        return math.inf
    reference = kept.copy()
    reference[0] += histogram[:start].sum()
    reference[-1] += histogram[stop:].sum()
    level = np.arange(len(kept)) * levels // len(kept)
    quantized = np.zeros_like(kept)
    for one in np.unique(level):
        inside = (level == one) & (reference > 0)
        if inside.any():
            quantized[inside] = kept[level == one].sum() / inside.sum()
    # An empty level with clipped values in it: a millionth of everything stands for it.
    quantized[(quantized == 0) & (reference > 0)] = histogram.sum() * 1e-6
    present = reference > 0
    p = reference[present] / reference.sum()
    q = quantized[present] / kept.sum()
    return float((p * np.log(p / q)).sum())


def tensorrt_divergences(magnitudes: np.ndarray, levels: int) -> np.ndarray:
    """Return the divergence of each limit of 128 to 2048 bins, as pytorch-quantization computes it."""
    histogram, _ = np.histogram(magnitudes, 2048, (0, float(magnitudes.max())))
    histogram = histogram.astype(np.float64)
    histogram[0] = histogram[1]
    found = []
    for limit in range(128, 2049):
        kept = histogram[:limit]
        level = np.digitize(np.arange(limit), np.linspace(0, limit, levels + 1)) - 1
        sums = np.bincount(level, kept, levels)
        filled = np.maximum(np.bincount(level, kept > 0, levels), 1)
        quantized = np.where(kept > 0, (sums / filled)[level], 0)
        reference = kept.copy()
        reference[-1] += histogram[limit:].sum()
        found.append(kl_divergence(reference, quantized))
    return np.array(found)
