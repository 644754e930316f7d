"""What looks wrong with calibration or held-out data, as notices; nothing here stops a build.

==================  ====================================================================================
code                said when
==================  ====================================================================================
few-samples         fewer than the guide for this kind of model: 100 for vision and encoders, 1,000 for LLMs
random-data         values look like noise, not like what the model will see
constant-input      an input is the same in every sample
identical-samples   more than a tenth of the samples are copies of others
nonfinite-input     NaN or infinity in an input
overlap             held-out samples are among the calibration samples
beyond-range        held-out values lie outside what calibration saw
==================  ====================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

import numpy as np

from calibrators.data.digests import batch_digests, sample_digests
from calibrators.data.randomness import ids_look_random, values_look_random
from pipeline.notices import notice
from pipeline.types import Array, CalibrationData, Feeds, Range

SAMPLES_LOOKED_AT = 64
_MAY_BE_CONSTANT = {"attention_mask", "token_type_ids", "position_ids"}
_COPIES_SHARE = 0.1


class ModelKind(StrEnum):
    """What the guide for the number of samples goes by."""

    VISION = "vision"
    ENCODER = "encoder"
    LLM = "llm"


GUIDE: Mapping[ModelKind, tuple[int, int]] = {
    ModelKind.VISION: (100, 500),
    ModelKind.ENCODER: (100, 500),
    ModelKind.LLM: (1000, 5000),
}
"""Fewest and most samples that calibration usually needs."""


def check_data(data: CalibrationData, *, kind: ModelKind | None = None, name: str = "calibration data") -> None:
    """Give a notice for each thing that looks wrong; reads at most 64 samples.

    Args:
        data: The samples.
        kind: The kind of model, for the number of samples; ``None`` leaves that check out (held-out data).
        name: What to call the data.
    """
    if kind is not None:
        _few(len(data), kind, name)
    batches = list(_first(data, SAMPLES_LOOKED_AT))
    if not batches:
        return
    _copies([digest for batch in batches for digest in batch_digests(batch)], name)
    for key in batches[0]:
        arrays = [batch[key] for batch in batches]
        masks = [batch["attention_mask"] for batch in batches] if "attention_mask" in batches[0] else None
        if _nonfinite(arrays, key, name) or _constant(arrays, key, name) or key in _MAY_BE_CONSTANT:
            continue
        random = values_look_random(arrays) if arrays[0].dtype.kind == "f" else _ids_random(arrays, masks)
        if random:
            notice(
                "random-data",
                f"The {name} looks random in {key!r}: {random}. Ranges found on noise do not fit real inputs; "
                "use samples of what the model will be given.",
                where=key,
            )


def overlap(calibration: Iterable[Feeds], heldout: Iterable[Feeds]) -> int:
    """Return how many distinct held-out samples are among the calibration samples, with a notice if any are."""
    known = sample_digests(calibration)
    measured = sample_digests(heldout)
    shared = len(known & measured)
    if shared:
        notice(
            "overlap",
            f"{shared} of {len(measured)} held-out samples are also calibration samples, so the measured accuracy is "
            "too good; take them out of one of the two.",
        )
    return shared


@dataclass(frozen=True, slots=True, kw_only=True)
class BeyondRange:
    """A tensor whose held-out values leave the calibrated range.

    Attributes:
        tensor: Its name.
        heldout: Smallest and largest held-out value.
        calibrated: The range.
        excess: How far beyond, as a share of the range's width (``inf`` for a range of width 0).
    """

    tensor: str
    heldout: tuple[float, float]
    calibrated: tuple[float, float]
    excess: float


def beyond_range(
    heldout: Mapping[str, tuple[float, float]],
    ranges: Mapping[str, Range],
    *,
    tolerance: float = 0.05,
    worst: int = 3,
) -> tuple[BeyondRange, ...]:
    """Return the tensors whose held-out values leave the calibrated range, worst first, with one notice for all.

    Give the range that calibration *saw* (its minimum and maximum): a range that a calibrator clipped on purpose is
    left by held-out values on purpose too.

    Args:
        heldout: Smallest and largest held-out value of each tensor.
        ranges: The calibrated range of each tensor; tensors in only one of the two are left out.
        tolerance: Excess, as a share of the range's width, that is not worth a notice.
        worst: How many tensors the notice names.
    """
    found = []
    for tensor in sorted(heldout.keys() & ranges.keys()):
        low, high = heldout[tensor]
        kept = ranges[tensor]
        out = max(kept.min - low, high - kept.max, 0.0)
        if out > 0:
            width = kept.max - kept.min
            excess = out / width if width > 0 else float("inf")
            item = BeyondRange(tensor=tensor, heldout=(low, high), calibrated=(kept.min, kept.max), excess=excess)
            found.append(item)
    found.sort(key=lambda item: (-item.excess, item.tensor))
    far = [item for item in found if item.excess > tolerance]
    if far:
        named = "; ".join(
            f"{item.tensor} [{item.heldout[0]:.4g}, {item.heldout[1]:.4g}] against "
            f"[{item.calibrated[0]:.4g}, {item.calibrated[1]:.4g}]"
            for item in far[:worst]
        )
        notice(
            "beyond-range",
            f"Held-out values leave the calibrated range in {len(found)} of {len(heldout.keys() & ranges.keys())} "
            f"tensors, by more than {tolerance:.0%} of its width in {len(far)}. Worst: {named}. "
            "Calibrate on samples that are closer to these, or on more.",
            where=far[0].tensor,
        )
    return tuple(found)


def _first(data: Iterable[Feeds], limit: int) -> Iterator[Feeds]:
    """Yield batches up to ``limit`` samples; the batch that reaches it is cut."""
    left = limit
    for batch in data:
        rows = {array.shape[0] if array.ndim else None for array in batch.values()}
        size = next(iter(rows)) if len(rows) == 1 else None
        yield batch if size is None else {name: array[:left] for name, array in batch.items()}
        left -= size or 1
        if left <= 0:
            return


def _few(samples: int, kind: ModelKind, name: str) -> None:
    fewest, most = GUIDE[kind]
    if samples < fewest:
        notice(
            "few-samples",
            f"The {name} has {samples} samples; {fewest:,} to {most:,} are usual for {kind} models, and with fewer "
            "the ranges miss values that occur.",
        )


def _copies(digests: list[str], name: str) -> None:
    copies = sum(count - 1 for count in Counter(digests).values())
    if copies > _COPIES_SHARE * len(digests):
        notice(
            "identical-samples",
            f"{copies} of the first {len(digests)} samples of the {name} are copies of others, so they add nothing.",
        )


def _nonfinite(arrays: list[Array], key: str, name: str) -> bool:
    if arrays[0].dtype.kind != "f":
        return False
    bad = sum(int(array.size - np.isfinite(array).sum()) for array in arrays)
    if bad:
        notice("nonfinite-input", f"The {name} holds {bad} NaN or infinite values in {key!r}.", where=key)
    return bad > 0


def _constant(arrays: list[Array], key: str, name: str) -> bool:
    """Say that an input is the same in every sample, unless it is one that often is, a scalar, or empty (a cache)."""
    rows = [row for array in arrays if array.ndim for row in array]
    if key in _MAY_BE_CONSTANT or len(rows) < 2 or not rows[0].size:
        return False
    constant = all(row.shape == rows[0].shape and np.array_equal(row, rows[0]) for row in islice(rows, 1, None))
    if constant:
        notice("constant-input", f"The input {key!r} is the same in every sample of the {name} looked at.", where=key)
    return constant


def _ids_random(arrays: list[Array], masks: list[Array] | None) -> str:
    if arrays[0].dtype.kind not in "iu" or arrays[0].ndim != 2:
        return ""
    rows = [row for array in arrays for row in array]
    kept = [mask for array in masks for mask in array] if masks else [np.ones(row.shape, bool) for row in rows]
    if any(row.shape != mask.shape for row, mask in zip(rows, kept, strict=True)):
        return ""
    return ids_look_random([row[mask.astype(bool)] for row, mask in zip(rows, kept, strict=True)])
