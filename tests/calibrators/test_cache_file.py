"""TensorRT's calibration cache: a known file, round trips, and refusals that name the line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators import cache_file
from pipeline.errors import DataError, StoreError

# 3c010a14 is 1/127 as float32, 3f800000 is 1.
KNOWN = "TRT-8601-EntropyCalibration2\ninput: 3c010a14\n(Unnamed Layer* 1) [Activation]_output: a: 3f800000\n"

NAMES = st.text(min_size=1).filter(lambda name: "\n" not in name and "\r" not in name)
SCALES = st.floats(min_value=0, exclude_min=True, width=32, allow_infinity=False)


def test_a_known_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    path.write_text(KNOWN)
    assert cache_file.read(path) == {
        "input": float(np.array([0x3C010A14], ">u4").view(">f4")[0]),
        "(Unnamed Layer* 1) [Activation]_output: a": 1.0,
    }
    header = cache_file.read_header(path)
    assert (header.trt_version, header.algorithm) == ("8601", "EntropyCalibration2")
    cache_file.write(path, cache_file.read(path), algorithm=header.algorithm, trt_version=header.trt_version)
    assert path.read_text() == KNOWN


@given(st.dictionaries(NAMES, SCALES), st.sampled_from(cache_file.ALGORITHMS))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, scales: dict[str, float], algorithm: str) -> None:
    path = tmp_path_factory.mktemp("cache") / "new" / "c.cache"
    cache_file.write(path, scales, algorithm=algorithm, trt_version="101600")
    found = cache_file.read(path)
    assert list(found.items()) == list(scales.items())
    assert cache_file.read_header(path).algorithm == algorithm
    first, *lines = path.read_bytes().split(b"\n")
    assert first == f"TRT-101600-{algorithm}".encode()
    for line, scale in zip(lines, scales.values(), strict=False):
        assert bytes.fromhex(line[-8:].decode()) == np.array(scale, ">f4").tobytes()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("input: 3c010a14\n", 1),
        ("TRT-8601-EntropyCalibration2\ninput 3c010a14\n", 2),
        ("TRT-8601-EntropyCalibration2\nin: 3c010a14\nout: 3c010a1\n", 3),
        ("TRT-8601-EntropyCalibration2\n\nin: 3c010a1g\n", 3),
        ("TRT-8601-EntropyCalibration2\nin: 3c010a14\nin: 3c010a14\n", 3),
        ("TRT-8601-EntropyCalibration2\nin: 7f800000\n", 2),
        ("TRT-8601-EntropyCalibration2\nin: 7fc00000\n", 2),
        ("TRT-8601-EntropyCalibration2\nin: bf800000\n", 2),
        ("TRT-8601-EntropyCalibration2\n: 3f800000\n", 2),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "c.cache"
    path.write_text(text)
    with pytest.raises(DataError, match="malformed") as caught:
        cache_file.read(path)
    assert caught.value.where == f"{path}, line {line}"


def test_any_bytes_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.cache"
    path.write_bytes(bytes(range(256)) * 9)
    with pytest.raises(DataError, match="malformed"):
        cache_file.read(path)
    with pytest.raises(DataError, match="cannot be read"):
        cache_file.read(tmp_path / "missing")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 1e39, 1e-50])
def test_scales_that_are_none_are_not_written(tmp_path: Path, scale: float) -> None:
    with pytest.raises(DataError, match="positive float32"):
        cache_file.write(tmp_path / "c", {"a": scale})
    assert not list(tmp_path.iterdir())


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot hold"):
        cache_file.write(tmp_path / "c", {"a\nb": 1.0})
    with pytest.raises(DataError, match="no header"):
        cache_file.write(tmp_path / "c", {}, algorithm="Guess")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        cache_file.write(tmp_path / "file" / "c", {"a": 1.0})
