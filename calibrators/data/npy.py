"""Arrays in ``.npy`` and ``.npz`` files, read row by row, never unpickled.

Rows are read from the file (through the zip stream for ``.npz``, compressed or not) and not memory-mapped: mapped
pages stay in the process's resident memory, which would then grow with the number of samples.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from pipeline.errors import DataError
from pipeline.notices import notice
from pipeline.types import Array

SUFFIXES = (".npy", ".npz")
POSITIONAL = "arr_"
"""What ``numpy.savez`` names arrays that were given none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """An array in a file, known by its header.

    Attributes:
        path: The file.
        name: Its name in the ``.npz``; the file's stem for a ``.npy``.
        dtype: Its type, in this machine's byte order.
        shape: Its shape.
        fortran: Whether it is stored column by column.
    """

    path: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool

    def whole(self) -> Array:
        """Return the whole array."""
        with _errors(self.path, self.name), _stream(self.path, self.name) as stream:
            array: Array = np.lib.format.read_array(stream, allow_pickle=False)
            return array.astype(self.dtype, copy=False)

    def rows(self) -> Iterator[Array]:
        """Yield ``array[0], array[1], …``; one row is in memory at a time (read-only)."""
        if self.fortran and len(self.shape) > 1:
            notice(
                "fortran-order",
                f"{self.name!r} is stored column by column, so it is read whole; save it with numpy.ascontiguousarray.",
                where=str(self.path),
            )
            yield from self.whole()
            return
        shape = self.shape[1:]
        size = math.prod(shape) * self.dtype.itemsize
        with _errors(self.path, self.name), _stream(self.path, self.name) as stream:
            stored = _header(stream)[2]
            for _ in range(self.shape[0]):
                data = stream.read(size)
                if len(data) != size:
                    raise EOFError("the array is shorter than its header says")
                yield np.frombuffer(data, stored).reshape(shape).astype(self.dtype, copy=False)


def stored(path: Path) -> dict[str, StoredArray]:
    """Return the arrays of a ``.npy`` or ``.npz`` file by name, reading headers only.

    Raises:
        DataError: The file is missing, truncated, no numpy file, or holds pickled objects.
    """
    with _errors(path):
        if path.suffix.lower() == ".npy":
            return {path.stem: _describe(path, path.stem)}
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        return {name: _describe(path, name) for name in names}


def _describe(path: Path, name: str) -> StoredArray:
    with _errors(path, name), _stream(path, name) as stream:
        shape, fortran, dtype = _header(stream)
        # Before anything allocates what a broken header claims.
        if not dtype.hasobject and math.prod(shape) * dtype.itemsize > _size(path, name):
            raise EOFError(f"the header says {list(shape)} {dtype}, which is more than the file holds")
    if dtype.hasobject:
        raise DataError(
            "The array holds pickled Python objects, which are never loaded.",
            where=f"{path}: {name}",
            fix="Save it again with a numeric dtype.",
        )
    return StoredArray(path=path, name=name, dtype=dtype.newbyteorder("="), shape=shape, fortran=fortran)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"unsupported .npy version {version}")


@contextlib.contextmanager
def _stream(path: Path, name: str) -> Iterator[IO[bytes]]:
    if path.suffix.lower() == ".npy":
        with path.open("rb", buffering=io.DEFAULT_BUFFER_SIZE) as stream:
            yield stream
        return
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        yield member


def _size(path: Path, name: str) -> int:
    if path.suffix.lower() == ".npy":
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{name}.npy").file_size


@contextlib.contextmanager
def _errors(path: Path, name: str = "") -> Iterator[None]:
    where = f"{path}: {name}" if name else str(path)
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The file cannot be read: {error.strerror or error}.", where=where, fix="Check the path."
        ) from error
    except (
        ValueError,
        TypeError,
        EOFError,
        KeyError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
        TokenError,
    ) as error:
        # RuntimeError: zipfile's for an encrypted member, and NotImplementedError for an unknown compression.
        # TypeError, TokenError: numpy's, while it parses a broken header.
        raise DataError(
            f"The file is truncated or is no numpy file: {error}.", where=where, fix="Write it again with numpy."
        ) from error
