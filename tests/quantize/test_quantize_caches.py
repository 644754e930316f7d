"""Calibration caches: another tool's becomes ranges, ours is written beside them."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import pytest

from calibrators import cache_file
from pipeline.errors import QuantizeError
from pipeline.quantize.insertion.sites import Site
from pipeline.quantize.ranges.choose import SiteRange
from pipeline.quantize.ranges.foreign_cache import cached_ranges, ranges_from_cache
from pipeline.quantize.ranges.own_cache import write_cache
from pipeline.types import QuantDType, QuantSpec, Range, Role

INT8 = QuantSpec(dtype=QuantDType.INT8)
UINT8 = QuantSpec(dtype=QuantDType.UINT8, symmetric=False)


def site(tensor: str, *observed: str, spec: QuantSpec = INT8) -> Site:
    return Site(tensor=tensor, spec=spec, readers=None, roles=(Role.LINEAR,), observed=observed or (tensor,))


def test_scales_become_ranges_and_what_does_not_match_is_listed() -> None:
    cache = {"a": 0.5, "layer: 1": 0.25, "gone": 1.0, "zero": 0.0}
    found, coverage = ranges_from_cache(cache, [site("a"), site("layer: 1"), site("new"), site("zero")])
    assert [(r.site.tensor, r.range.min, r.range.max) for r in found] == [
        ("a", -63.5, 63.5),
        ("layer: 1", -31.75, 31.75),
    ]
    assert found[0].range.scale_zero_point(INT8) == (0.5, 0)
    assert (coverage.covered, coverage.lacking) == (("a", "layer: 1"), ("new", "zero"))
    assert coverage.unused == ("gone",)
    assert str(coverage) == (
        "the calibration cache covers 2 of 4 quantized tensors; it lacks 2 (new, zero); it has without use 1 (gone)"
    )


def test_sites_with_one_scale_take_the_largest() -> None:
    cache = {"left": 0.1, "right": 0.4}
    found, _ = ranges_from_cache(cache, [site("left", "left", "right"), site("right", "left", "right")])
    assert {r.range.max for r in found} == {127 * 0.4}


def test_a_tensor_that_only_rearranges_another_takes_its_range() -> None:
    found, coverage = ranges_from_cache({"x": 0.1}, [site("reshaped", "x")])
    assert found[0].range.max == pytest.approx(12.7)
    assert coverage.unused == ()


def test_what_the_cache_lacks_is_calibrated_in_the_sites_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "foreign.cache"
    cache_file.write(path, {"b": 1.0})

    def choose(some: object) -> list[SiteRange]:
        assert some == [site("a"), site("c")]
        return [SiteRange(site=site(n), method="minmax", range=Range(min=-1, max=1)) for n in ("a", "c")]

    with caplog.at_level(logging.WARNING, logger="pipeline.notice"):
        made = cached_ranges(path, [site("a"), site("b"), site("c")], choose)
    assert [(r.site.tensor, r.method) for r in made] == [("a", "minmax"), ("b", "cache"), ("c", "minmax")]
    assert "covers 1 of 3 quantized tensors; it lacks 2 (a, c)" in caplog.text


def test_what_the_cache_lacks_is_an_error_without_statistics(tmp_path: Path) -> None:
    path = tmp_path / "foreign.cache"
    cache_file.write(path, {"b": 1.0})
    with pytest.raises(QuantizeError, match=r"(?s)lacks 1 of the tensors.*\(a\).*calibration\.data"):
        cached_ranges(path, [site("a"), site("b")], None)


def test_our_cache_holds_symmetric_int8_scales_as_tensorrt_writes_them(tmp_path: Path) -> None:
    ranges = [
        SiteRange(site=site("block: 1/x"), method="entropy", range=Range(min=-3.0, max=12.7)),
        SiteRange(site=site("u", spec=UINT8), method="minmax", range=Range(min=0, max=1)),
    ]
    write_cache(tmp_path / "auto.cache", ranges)
    digits = struct.pack(">f", 12.7 / 127).hex()
    text = (tmp_path / "auto.cache").read_text(encoding="utf-8")
    assert text == f"TRT-101600-EntropyCalibration2\nblock: 1/x: {digits}\n"


def test_our_cache_read_back_gives_our_scales(tmp_path: Path) -> None:
    ranges = [SiteRange(site=site(n), method="minmax", range=Range(min=-h, max=h)) for n, h in (("a", 3.0), ("b", 0.7))]
    write_cache(tmp_path / "minmax.cache", ranges)
    assert cache_file.read_header(tmp_path / "minmax.cache").algorithm == "MinMaxCalibration"
    again = cached_ranges(tmp_path / "minmax.cache", [r.site for r in ranges], None)
    assert [r.range.scale_zero_point(INT8) for r in again] == [r.range.scale_zero_point(INT8) for r in ranges]
