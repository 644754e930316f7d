"""Reader of ``.npz`` files and of folders of ``.npy``/``.npz`` files.

In a file, arrays with the input's rank are a batch (first axis samples), arrays with one axis less are one sample.
Files are read in the natural order of their names (``2.npy`` before ``10.npy``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from calibrators.data import npy
from calibrators.data.batches import Sample
from calibrators.data.fit import Fit
from pipeline.errors import DataError
from pipeline.model import sha256
from pipeline.notices import notice
from pipeline.types import Feeds

Arrays = dict[str, npy.StoredArray]


def natural(path: Path) -> tuple[list[tuple[int, int | str]], str]:
    """Return a sort key that orders ``2.npy`` before ``10.npy``."""
    parts = re.split(r"(\d+)", path.as_posix())
    # Unicode digits such as "²" are text: \d matches decimal digits only, which int() reads.
    return [(0, int(part)) if index % 2 else (1, part) for index, part in enumerate(parts)], path.as_posix()


class ArraySamples:
    """The samples of numpy files, in order.

    Args:
        files: The files.
        fit: The model's inputs; every file is checked against it by its headers.
        limit: At most this many samples.
        where: What to call the data in errors.

    Raises:
        DataError: A file cannot be read or its arrays do not fit the model.
    """

    def __init__(self, files: Sequence[Path], fit: Fit, *, limit: int, where: str) -> None:
        self.where = where
        self._fit = fit
        self._limit = limit
        self._files: list[tuple[Path, Arrays, int | None]] = []
        count = 0
        for path in files:
            arrays = _assign(npy.stored(path), fit, path)
            rows = self._rows(arrays, path)
            self._files.append((path, arrays, rows))
            count += 1 if rows is None else rows
            if count >= limit:
                break

    def _rows(self, arrays: Arrays, path: Path) -> int | None:
        """Return the number of samples in a file's arrays, ``None`` if they are one without a samples axis."""
        shapes = {name: array.shape for name, array in arrays.items()}
        several = self._fit.batched(shapes, str(path))
        for info in self._fit.inputs:
            array = arrays[info.name]
            self._fit.check(info, array.dtype, array.shape[1:] if several else array.shape, str(path))
        return next(iter(shapes.values()))[0] if several else None

    def kinds(self) -> Iterable[tuple[tuple[int, ...], ...]]:
        """Return every sample's shapes, from the headers."""
        return list(islice(self._kinds(), self._limit))

    def _kinds(self) -> Iterator[tuple[tuple[int, ...], ...]]:
        for _, arrays, rows in self._files:
            kind = tuple(array.shape if rows is None else array.shape[1:] for array in arrays.values())
            for _ in range(1 if rows is None else rows):
                yield kind

    def __iter__(self) -> Iterator[Sample]:
        """Read the samples."""
        return islice(self._read(), self._limit)

    def _read(self) -> Iterator[Sample]:
        for path, arrays, rows in self._files:
            if rows is None:
                yield self._sample({name: array.whole() for name, array in arrays.items()}, str(path))
                continue
            columns = zip(*(array.rows() for array in arrays.values()), strict=True)
            for index, row in enumerate(columns):
                yield self._sample(dict(zip(arrays, row, strict=True)), f"{path}: sample {index}")

    def _sample(self, arrays: Feeds, where: str) -> Sample:
        feeds = self._fit.sample(arrays, where)
        return Sample(where=where, feeds=feeds, kind=tuple(array.shape for array in feeds.values()))

    def digest(self) -> str:
        """Return the SHA-256 of the files' content and the number of samples taken."""
        facts = [[sha256(path) for path, _, _ in self._files], self._limit]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _assign(arrays: Arrays, fit: Fit, path: Path) -> Arrays:
    """Return the array of each input: by name, or the only one, or ``arr_0, arr_1, …`` by position."""
    names = [info.name for info in fit.inputs]
    unnamed = path.suffix.lower() == ".npy" or all(
        name == f"{npy.POSITIONAL}{index}" for index, name in enumerate(arrays)
    )
    if unnamed and len(arrays) == len(names) and not set(names) <= set(arrays):
        return dict(zip(names, arrays.values(), strict=True))
    if path.suffix.lower() == ".npy" and len(names) > 1:
        raise DataError(
            f"A .npy file holds one array without a name, but the model has {len(names)} inputs: {', '.join(names)}.",
            where=str(path),
            fix="Save each sample as .npz with an array per input.",
        )
    fit.names(arrays, str(path))
    extra = sorted(set(arrays) - set(names))
    if extra:
        notice("unused-arrays", f"The model has no input for {', '.join(extra)}; not used.", where=str(path))
    return {name: arrays[name] for name in names}
