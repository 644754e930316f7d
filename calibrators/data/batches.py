"""Samples into batches: the one implementation of :class:`pipeline.types.CalibrationData` that all readers share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from calibrators.data.fit import Fit
from pipeline.errors import DataError
from pipeline.notices import notice
from pipeline.types import Feeds, TensorInfo

T = TypeVar("T")
FORMAT = 1
"""Counts changes to how samples are made; part of every digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample.

    Attributes:
        where: Where it came from: file, and line or row.
        feeds: An array for each input, without the batch axis.
        kind: What neighbouring samples must share to be in one batch: their shapes, for most readers.
    """

    where: str
    feeds: Feeds
    kind: Hashable


class Samples(Protocol):
    """What a reader gives: samples one at a time, the same ones in the same order every time."""

    where: str

    def __iter__(self) -> Iterator[Sample]:
        """Read the samples, one at a time."""
        ...

    def kinds(self) -> Iterable[Hashable]:
        """Return every sample's kind, without reading the samples where that is possible."""
        ...

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the samples' content and of the reader's options."""
        ...


def stack(samples: Sequence[Sample]) -> Feeds:
    """Return samples of equal shapes as one batch."""
    return {name: np.stack([sample.feeds[name] for sample in samples]) for name in samples[0].feeds}


class Batches:
    """Batches of neighbouring samples that share a kind (shape); order is kept and nothing is held but one batch.

    The last batch of a run of equal shapes may be smaller. Where the model's batch dimension is fixed, samples that
    do not fill a batch are left out and a notice says how many.

    Args:
        samples: The reader.
        fit: The model's inputs.
        batch_size: Samples per batch, where the model leaves it open.
        collate: Makes one batch of samples of one kind.

    Raises:
        DataError: There are no samples, or not enough for one batch.
    """

    def __init__(
        self, samples: Samples, fit: Fit, *, batch_size: int, collate: Callable[[Sequence[Sample]], Feeds] = stack
    ) -> None:
        self._samples, self._fit, self._collate = samples, fit, collate
        self._size = fit.batch_size(batch_size)
        kinds = list(samples.kinds())
        self._length = sum(len(group) for group in self._grouped((kind, None) for kind in kinds))
        self._digest = ""
        if not kinds:
            raise DataError("The data holds no samples.", where=samples.where, fix="Give at least one sample.")
        self._say_dropped(len(kinds))

    def _say_dropped(self, available: int) -> None:
        dropped = available - self._length
        if not self._length:
            raise DataError(
                f"{available} samples do not fill one batch: the model's batch dimension is fixed at {self._fit.batch}.",
                where=self._samples.where,
                fix="Give more samples of one shape, or export the model with a dynamic batch dimension.",
            )
        if dropped:
            notice(
                "dropped-samples",
                f"{dropped} of {available} samples do not fill the model's fixed batch of {self._fit.batch} "
                "and are left out.",
                where=self._samples.where,
            )

    def __len__(self) -> int:
        """Return the number of samples that the batches hold together."""
        return self._length

    def __iter__(self) -> Iterator[Feeds]:
        """Yield the batches."""
        for group in self._grouped((sample.kind, sample) for sample in self._samples):
            yield dict(group[0].feeds) if self._fit.complete else self._collate(group)

    def _grouped(self, items: Iterable[tuple[Hashable, T]]) -> Iterator[list[T]]:
        whole = self._fit.batch is not None
        group: list[T] = []
        last: Hashable = None
        for kind, item in items:
            if group and kind != last:
                if not whole:
                    yield group
                group = []
            group.append(item)
            last = kind
            if len(group) == self._size:
                yield group
                group = []
        if group and not whole:
            yield group

    def digest(self) -> str:
        """Return the SHA-256 (hex) of everything that decides the batches."""
        if not self._digest:
            inputs = [[info.name, str(info.dtype), list(info.shape)] for info in self._fit.inputs]
            facts = [FORMAT, self._samples.digest(), inputs, self._size]
            self._digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return self._digest


class InMemory:
    """Ready batches as calibration data, for programs that make their own.

    Args:
        batches: An array for each input per batch; not copied.
        inputs: The model's inputs.

    Raises:
        DataError: There are no samples, an input is missing, or a batch's arrays disagree on their number.
    """

    def __init__(self, batches: Sequence[Feeds], inputs: Sequence[TensorInfo]) -> None:
        fit = Fit.of(inputs)
        self._batches: list[Feeds] = []
        self._length = 0
        for index, batch in enumerate(batches):
            fit.names(batch, f"batch {index}")
            self._batches.append({info.name: batch[info.name] for info in fit.inputs})
            self._length += 1 if fit.complete else self._rows(self._batches[-1], f"batch {index}")
        if not self._length:
            raise DataError("The data holds no samples.", fix="Give at least one batch.")

    @staticmethod
    def _rows(batch: Feeds, where: str) -> int:
        rows = {name: array.shape[0] if array.ndim else 0 for name, array in batch.items()}
        if len(set(rows.values())) > 1:
            raise DataError(f"The inputs hold different numbers of samples: {rows}.", where=where)
        return next(iter(rows.values()))

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._length

    def __iter__(self) -> Iterator[Feeds]:
        """Yield the batches."""
        return iter(self._batches)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the arrays."""
        digest = hashlib.sha256()
        for batch in self._batches:
            update(digest, batch)
        return digest.hexdigest()


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def update(digest: _Hash, feeds: Feeds) -> None:
    """Add the arrays' names, types, shapes and values to a hash, whatever their order."""
    for name in sorted(feeds):
        array = np.ascontiguousarray(feeds[name])
        digest.update(f"{name}\0{array.dtype.str}\0{feeds[name].shape}\0".encode())
        digest.update(array.tobytes())
