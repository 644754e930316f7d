"""TensorRT's calibration cache file.

The first line is ``TRT-<version>-EntropyCalibration2`` (or ``MinMaxCalibration``); every other line is
``<tensor>: <8 hex digits>``, the big-endian float32 of the tensor's scale (amax / 127). A tensor's name may hold ``: ``.
Source: TensorRT developer guide, "Post-Training Quantization Using Calibration", and files that TensorRT 10 wrote.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibrators.atomic import write_whole
from pipeline.errors import DataError

ALGORITHMS = ("EntropyCalibration2", "MinMaxCalibration")
"""What TensorRT writes for its entropy and its min/max calibrator, whose caches it reads back."""

_HEADER = re.compile(r"TRT-([0-9A-Za-z.]+)-([A-Za-z0-9_]+)")
_SCALE = re.compile(r"[0-9a-fA-F]{8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first line of a cache."""

    trt_version: str
    algorithm: str


def read(path: Path) -> dict[str, float]:
    """Return each tensor's scale, in the file's order.

    Raises:
        DataError: The file cannot be read, or a line is malformed; names the line.
    """
    return dict(_parse(path)[1])


def read_header(path: Path) -> Header:
    """Return which TensorRT and which calibrator wrote the cache.

    Raises:
        DataError: The file cannot be read, or a line is malformed; names the line.
    """
    return _parse(path)[0]


def write(
    path: Path, scales: Mapping[str, float], *, algorithm: str = "EntropyCalibration2", trt_version: str = "101600"
) -> None:
    """Write a cache; the same scales in the same order give the same bytes.

    Args:
        path: The file; its folder is made.
        scales: Each tensor's scale; rounded to float32.
        algorithm: One of :data:`ALGORITHMS`.
        trt_version: Digits as TensorRT writes them, such as ``101600`` for 10.16.

    Raises:
        DataError: A name with a line break, a scale that float32 cannot hold as a positive number, or a wrong header.
        StoreError: The file cannot be written.
    """
    header = f"TRT-{trt_version}-{algorithm}"
    if algorithm not in ALGORITHMS or not _HEADER.fullmatch(header):
        raise DataError(f"{header!r} is no header of a calibration cache.", fix=f"Use {' or '.join(ALGORITHMS)}.")
    text = "\n".join([header, *(_line(name, scale) for name, scale in scales.items())]) + "\n"
    write_whole(path, text.encode("utf-8", "surrogateescape"))


def _line(name: str, scale: float) -> str:
    if not name or "\n" in name or "\r" in name:
        raise DataError("A calibration cache cannot hold this tensor name.", where=f"tensor {name!r}", fix="Rename it.")
    try:
        digits = struct.pack(">f", scale).hex()
    except OverflowError:
        digits = "7f800000"
    if not 0 < struct.unpack(">f", bytes.fromhex(digits))[0] < math.inf:
        raise DataError(f"A scale must be a positive float32, not {scale}.", where=f"tensor {name}")
    return f"{name}: {digits}"


def _parse(path: Path) -> tuple[Header, dict[str, float]]:
    try:
        # Line by line at "\n" only: a tensor's name may hold other characters that str.splitlines breaks at.
        lines = path.read_bytes().decode("utf-8", "surrogateescape").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise DataError(
            f"The calibration cache cannot be read: {error.strerror or error}.", where=str(path), fix="Check the path."
        ) from error
    head = _HEADER.fullmatch(lines[0])
    if head is None:
        raise _malformed(path, 1, "the first line must be like TRT-101600-EntropyCalibration2")
    scales: dict[str, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        name, separator, digits = line.rpartition(": ")
        if not separator or not name:
            raise _malformed(path, number, "a line must be `tensor: 8 hex digits`")
        if not _SCALE.fullmatch(digits):
            raise _malformed(path, number, f"{digits[:20]!r} is not 8 hex digits")
        if name in scales:
            raise _malformed(path, number, f"tensor {name!r} is there twice")
        scale = float(struct.unpack(">f", bytes.fromhex(digits))[0])
        if not 0 <= scale < math.inf:
            raise _malformed(path, number, f"{digits} is {scale}, which is no scale")
        scales[name] = scale
    return Header(trt_version=head[1], algorithm=head[2]), scales


def _malformed(path: Path, line: int, what: str) -> DataError:
    return DataError(
        f"The calibration cache is malformed: {what}.", where=f"{path}, line {line}", fix="Calibrate again."
    )
