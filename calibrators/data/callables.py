"""Reader of ``package.module:callable``: the user's own code that gives samples or batches as dicts of arrays."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.data.batches import Sample, update
from calibrators.data.fit import Fit, Shape
from pipeline.errors import DataError
from pipeline.types import Array, Feeds


class CallableSamples:
    """The samples that a callable gives, called again for every reading.

    It is read once when made: that counts and checks the samples. Every later reading must give the same ones.

    Args:
        name: ``package.module:callable``.
        fit: The model's inputs.
        limit: At most this many samples are taken, so an endless generator is fine.

    Raises:
        DataError: The name cannot be imported, is a used-up generator, fails, or gives what does not fit the model.
    """

    def __init__(self, name: str, fit: Fit, *, limit: int) -> None:
        self.where = name
        self._fit = fit
        self._limit = limit
        self._source = _source(name)
        self._kinds: list[tuple[Shape, ...]] = []
        digest = hashlib.sha256()
        for sample in islice(self._read(), limit):
            update(digest, sample.feeds)
            self._kinds.append(tuple(array.shape for array in sample.feeds.values()))
        self._digest = digest.hexdigest()
        if self._kinds and next(self._read(), None) is None:
            raise _used_up(name)

    def kinds(self) -> Iterable[tuple[Shape, ...]]:
        """Return every sample's shapes, seen in the first reading."""
        return self._kinds

    def __iter__(self) -> Iterator[Sample]:
        """Call the callable and read its samples.

        Raises:
            DataError: They differ from the first reading's.
        """
        digest = hashlib.sha256()
        count = 0
        for sample in islice(self._read(), self._limit):
            update(digest, sample.feeds)
            count += 1
            if count > len(self._kinds):
                break
            yield sample
        if digest.hexdigest() != self._digest:
            raise DataError(
                f"Read again, it gave other samples ({count}, first {len(self._kinds)}).",
                where=self.where,
                fix="Return a new iterable on every call, with a fixed order and a fixed seed.",
            )

    def _read(self) -> Iterator[Sample]:
        for index, item in enumerate(_items(self._source, self.where)):
            where = f"{self.where}: item {index}"
            if not isinstance(item, Mapping):
                raise DataError(
                    f"It gave a {type(item).__name__}, not a dict of arrays.",
                    where=where,
                    fix="Yield {input name: array}.",
                )
            self._fit.names((str(key) for key in item), where)
            arrays = {info.name: _array(item[info.name], f"{where}: {info.name}") for info in self._fit.inputs}
            yield from self._samples(arrays, where)

    def _samples(self, arrays: Feeds, where: str) -> Iterator[Sample]:
        several = self._fit.batched({name: array.shape for name, array in arrays.items()}, where)
        rows = next(iter(arrays.values())).shape[0] if several else 1
        for row in range(rows):
            # Copied: the caller may fill the same buffer again for its next item.
            one = {name: np.array(array[row] if several else array) for name, array in arrays.items()}
            place = f"{where}, sample {row}" if several else where
            feeds = self._fit.sample(one, place)
            yield Sample(where=place, feeds=feeds, kind=tuple(array.shape for array in feeds.values()))

    def digest(self) -> str:
        """Return the SHA-256 of the samples' arrays."""
        return self._digest


def _source(name: str) -> Callable[[], Iterable[Any]]:
    module_name, _, attribute = name.partition(":")
    folder = str(Path.cwd())  # not on the path by itself: only code that the user trusts is looked for there
    try:
        if folder not in sys.path and "" not in sys.path:
            sys.path.insert(0, folder)
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # the user's module may fail in any way while it is imported
        raise DataError(
            f"It cannot be imported: {type(error).__name__}: {error}",
            where=name,
            fix="Write package.module:callable, and run from the folder that holds the package (or install it).",
        ) from error
    if callable(found):
        return lambda: _call(found, name)
    if isinstance(found, Iterable) and iter(found) is not found:
        return lambda: found
    raise (
        _used_up(name)
        if isinstance(found, Iterator)
        else DataError(
            f"It is a {type(found).__name__}, neither callable nor iterable.", where=name, fix="Name a function."
        )
    )


def _used_up(name: str) -> DataError:
    return DataError(
        "It is one generator object, which can be read only once.",
        where=name,
        fix="Name a function that makes a new generator on every call: `def samples(): yield {...}`.",
    )


def _call(function: Callable[[], Any], name: str) -> Any:
    try:
        result = function()
    except Exception as error:  # the user's code
        raise DataError(f"The call failed: {type(error).__name__}: {error}", where=name) from error
    if not isinstance(result, Iterable):
        raise DataError(
            f"It returned a {type(result).__name__}, nothing to iterate over.",
            where=name,
            fix="Return dicts of arrays.",
        )
    return result


def _items(source: Callable[[], Iterable[Any]], name: str) -> Iterator[Any]:
    iterator = iter(source())
    index = 0
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # the user's code
            raise DataError(f"It failed: {type(error).__name__}: {error}", where=f"{name}: item {index}") from error
        index += 1
        yield item


def _array(value: Any, where: str) -> Array:
    try:
        array: Array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"No array: {error}", where=where, fix="Give numpy arrays.") from error
    if array.dtype.hasobject:
        raise DataError("It holds Python objects, no numbers.", where=where, fix="Give numeric numpy arrays.")
    return array
