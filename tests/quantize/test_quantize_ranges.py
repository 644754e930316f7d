"""Ranges: the affine map's algebra, which statistics a site uses, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators.statistics import Request, Statistics
from pipeline.errors import QuantizeError
from pipeline.notices import collecting
from pipeline.quantize.insertion.sites import Site
from pipeline.quantize.ranges import choose as files
from pipeline.quantize.ranges.choose import SiteRange, choose_ranges, role_groups
from pipeline.recipe import Method
from pipeline.types import QuantDType, QuantSpec, Range, Role
from tests.quantize.planning import plan_for, sites_of, sketch
from tests.quantize.test_quantize_sites import concat

UINT8 = QuantSpec(dtype=QuantDType.UINT8, symmetric=False)
SPECS = [
    UINT8,
    QuantSpec(dtype=QuantDType.INT8, symmetric=False),
    QuantSpec(dtype=QuantDType.INT8),
    QuantSpec(dtype=QuantDType.UINT8),
]
ENDS = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@given(a=ENDS, b=ENDS, part=st.floats(0, 1))
def test_zero_is_exact_and_what_is_inside_the_range_is_off_by_half_a_step(
    spec, a: float, b: float, part: float
) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero_point = Range(min=low, max=high).scale_zero_point(spec)
    assert np.float32(scale) == scale
    assert 0 < scale < np.inf
    assert spec.dtype.qmin <= zero_point <= spec.dtype.qmax
    if spec.symmetric:
        assert zero_point == (128 if spec.dtype is QuantDType.UINT8 else 0)

    def there_and_back(x: float) -> float:
        q = np.clip(np.rint(x / scale) + zero_point, spec.dtype.qmin, spec.dtype.qmax)
        return float((q - zero_point) * scale)

    assert there_and_back(0.0) == 0.0
    low, high = min(low, 0.0), max(high, 0.0)
    for x in (low, high, low + part * (high - low)):
        assert abs(there_and_back(x) - x) <= scale * 0.5 * (1 + 1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (3.5, 3.5), (-3.5, -3.5), (2.0, 9.0), (-9.0, -2.0)])
def test_constant_and_one_sided_tensors_keep_their_values(spec: QuantSpec, low: float, high: float) -> None:
    scale, zero_point = Range(min=low, max=high).scale_zero_point(spec)
    for x in (low, high):
        q = np.clip(np.rint(x / scale) + zero_point, spec.dtype.qmin, spec.dtype.qmax)
        assert abs((q - zero_point) * scale - x) <= scale / 2 + 1e-6


def statistics(**tensors: np.ndarray) -> Statistics:
    return Statistics({Request(n): sketch(v) for n, v in tensors.items()}, model_sha256="0" * 64, samples=1)


def site(tensor: str, *observed: str, spec: QuantSpec = UINT8, roles: tuple[Role, ...] = (Role.CONV,)) -> Site:
    return Site(tensor=tensor, spec=spec, readers=None, roles=roles, observed=observed or (tensor,))


def test_auto_takes_the_least_squared_error_of_each_tensor() -> None:
    rng = np.random.default_rng(0)
    flat = rng.uniform(-1, 1, 20000).astype(np.float32)
    outlier = np.append(rng.normal(size=200000), 300.0).astype(np.float32)
    chosen = choose_ranges([site("flat"), site("outlier")], statistics(flat=flat, outlier=outlier), Method.AUTO)

    def mean_squared_error(x: np.ndarray, kept: Range) -> float:
        scale, zero = kept.scale_zero_point(UINT8)
        q = np.clip(np.rint(x / scale) + zero, 0, 255)
        return float(np.mean(np.square((q - zero) * scale - x)))

    for item, values in zip(chosen, (flat, outlier), strict=True):
        measured = {m: mean_squared_error(values, r) for m, r in item.options.items()}
        for method, error in item.errors.items():
            assert error == pytest.approx(measured[method], rel=0.05)
        assert measured[item.method] <= min(measured.values()) * 1.05
        assert item.range == item.options[item.method]
    assert chosen[1].range.max < 290


def test_concat_inputs_get_the_range_of_all_that_meets(tmp_path: Path) -> None:
    path = concat(tmp_path)
    found = sites_of(path, plan_for(path, "gpu-int8", {"first", "second", "third"}))
    seen = statistics(x=np.array([1.0]), r=np.array([0.0, 9.0]), k=np.array([-4.0, 9.0]))
    kept = {r.site.tensor: r.range for r in choose_ranges(found, seen, Method.MINMAX)}
    assert kept["r"] == kept["k"]
    assert kept["r"].min <= -4.0
    assert kept["r"].max >= 9.0


def test_sites_of_one_scale_stay_in_one_group() -> None:
    places = [
        site("r", roles=(Role.CONV,)),
        site("p", "r", roles=(Role.LINEAR,)),
        site("q", roles=(Role.LINEAR,)),
    ]
    chosen = choose_ranges(places, statistics(r=np.arange(9.0), q=np.arange(9.0)), Method.MINMAX)
    assert role_groups(chosen) == {(Role.CONV,): [0, 1], (Role.LINEAR,): [2]}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.array([1.0, np.nan]), "NaN or infinity"),
        (np.array([1.0, np.inf]), "NaN or infinity"),
        (np.zeros(0), "no values"),
    ],
)
def test_what_has_no_range_is_refused_by_name(values: np.ndarray, what: str) -> None:
    with pytest.raises(QuantizeError, match=what) as caught:
        choose_ranges([site("/layer/act")], statistics(**{"/layer/act": values}), Method.AUTO)
    assert "/layer/act" in caught.value.where
    with pytest.raises(QuantizeError, match="lack a tensor"):
        choose_ranges([site("other")], statistics(x=values), Method.AUTO)


def test_a_constant_tensor_is_said() -> None:
    with collecting() as notices:
        choose_ranges([site("x")], statistics(x=np.full(50, 2.5)), Method.AUTO)
    assert [n.code for n in notices] == ["constant-activation"]


def test_the_file_holds_everything_and_is_the_same_every_time() -> None:
    places = [site("x"), Site(tensor="ü: y", spec=SPECS[2], readers=(("n", 1),), roles=(), observed=("x", "ü: y"))]
    chosen = choose_ranges(places, statistics(x=np.linspace(-1, 3, 99), **{"ü: y": np.arange(5.0)}), Method.AUTO)
    text = files.to_json(chosen)
    assert files.from_json(text) == chosen
    assert files.to_json(files.from_json(text)) == text
    assert all(isinstance(r, SiteRange) for r in files.from_json(text))
