"""The sketch against numpy on raw values, and its algebra."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from calibrators import sketch_kernels
from calibrators.channel_absmax import ChannelAbsmax
from calibrators.channel_range import ChannelRange
from calibrators.sketch import Sketch
from calibrators.statistic import Statistic
from pipeline.errors import DataError

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
ARRAYS = npst.arrays(np.float32, st.tuples(st.integers(0, 5), st.just(3)), elements=ANY_FLOAT)


def statistic_bytes(statistic: Statistic) -> list[bytes]:
    return [name.encode() + array.tobytes() for name, array in statistic.arrays().items()]


def sketch_of(*batches: np.ndarray) -> Sketch:
    sketch = Sketch()
    for batch in batches:
        sketch.update(batch)
    return sketch


@given(st.lists(ARRAYS, min_size=1, max_size=6), st.randoms())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("make", [Sketch, ChannelAbsmax, ChannelRange])
def test_split_and_order_do_not_matter(make: type[Statistic], batches: list[np.ndarray], random: object) -> None:
    whole = make()
    for batch in batches:
        whole.update(batch)
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    cut = random.randint(0, len(shuffled))  # type: ignore[attr-defined]
    left, right = make(), make()
    for part, some in ((left, shuffled[:cut]), (right, shuffled[cut:])):
        for batch in some:
            part.update(batch)
    left.merge(right)
    assert statistic_bytes(left) == statistic_bytes(whole)
    assert statistic_bytes(make.from_arrays(whole.arrays())) == statistic_bytes(whole)
    assert left.count == whole.count == sum(int(np.isfinite(batch).sum()) for batch in batches)
    assert left.nonfinite == sum(int((~np.isfinite(batch)).sum()) for batch in batches)


@given(npst.arrays(np.float32, st.integers(1, 40), elements=ANY_FLOAT))
@settings(max_examples=200, deadline=None)
def test_counts_extremes_and_sums_are_exact(values: np.ndarray) -> None:
    sketch = sketch_of(values)
    finite = values[np.isfinite(values)]
    bins = finite.view(np.uint32) >> 16
    wanted_bins, wanted_counts = np.unique(np.where(bins == 0x8000, 0, bins), return_counts=True)
    arrays = sketch.arrays()
    assert np.array_equal(arrays["bins"], wanted_bins)
    assert np.array_equal(arrays["counts"], wanted_counts)
    assert sketch.total == sum((Fraction(float(value)) for value in finite), Fraction(0))
    if finite.size:
        assert (sketch.min, sketch.max) == (finite.min(), finite.max())
        assert sketch.amax == np.abs(finite).max()
        exact = sum((abs(Fraction(float(value))) for value in finite), Fraction(0)) / finite.size
        if (np.abs(finite[bins % 0x8000 == 0]) == 0).all():
            assert sketch.absolute_mean == float(exact)


def test_intervals_hold_their_values() -> None:
    values = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    found = sketch_of(values).distribution()
    assert found.count.sum() == values.size
    assert (np.diff(found.mean) > 0).all()
    assert (found.low >= values.min()).all()
    assert (found.high <= values.max()).all()
    assert (found.count * found.mean).sum() == pytest.approx(values.astype(np.float64).sum(), rel=1e-12)
    assert ((found.high - found.low) <= np.abs(found.mean) * 2**-6.9).all()


def test_minus_zero_is_zero() -> None:
    one, other = (sketch_of(np.array(values, np.float32)) for values in ([0.0, -0.0], [-0.0, 0.0]))
    assert statistic_bytes(one) == statistic_bytes(other)
    assert one.arrays()["bins"].tolist() == [0]
    assert not np.signbit([one.min, one.max]).any()


def test_subnormals_are_kept() -> None:
    values = np.array([1e-40, -3e-39, 1e-45], np.float32)
    sketch = sketch_of(values)
    assert sketch.count == 3
    assert (sketch.min, sketch.max) == (values[1], values[0])
    assert sketch.total == sum(Fraction(float(value)) for value in values)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_seen_as_float32(dtype: type) -> None:
    values = np.random.default_rng(2).standard_normal((7, 11)).astype(dtype)
    assert statistic_bytes(sketch_of(values)) == statistic_bytes(sketch_of(values.astype(np.float32)))
    assert sketch_of(np.array([1e300])).nonfinite == 1


def test_integers_are_refused() -> None:
    with pytest.raises(DataError, match="int64"):
        sketch_of(np.arange(3))


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4095, 4096, 4097, 9001])
def test_any_length_alignment_and_stride(size: int, offset: int) -> None:
    base = np.random.default_rng(3).standard_normal(2 * size + 8).astype(np.float32)
    for values in (base[offset : offset + size], base[offset : offset + 2 * size : 2]):
        bins, counts = np.unique(values.copy().view(np.uint32) >> 16, return_counts=True)
        arrays = sketch_of(values).arrays()
        assert np.array_equal(arrays["bins"], bins)
        assert np.array_equal(arrays["counts"], counts)


def test_counters_are_emptied_before_they_overflow() -> None:
    values = np.random.default_rng(4).standard_normal((3, 4, 10, 5)).astype(np.float32)
    keep = np.random.default_rng(5).random((3, 10)) < 0.5
    wanted = statistic_bytes(sketch_of(values, values, values[:, :, ::2]))
    partly = Sketch()
    partly.update(values, keep)
    with mock.patch.object(sketch_kernels, "LIMIT", 101):
        assert statistic_bytes(sketch_of(values, values, values[:, :, ::2])) == wanted
        limited = Sketch()
        limited.update(values, keep)
    assert statistic_bytes(limited) == statistic_bytes(partly)
    assert sketch_kernels.LIMIT * 0xFFFF < 1 << sketch_kernels.COUNT_SHIFT
    assert sketch_kernels.LIMIT << sketch_kernels.COUNT_SHIFT < 1 << 64


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), st.randoms())
@settings(max_examples=60, deadline=None)
def test_padding_is_left_out(batch: int, positions: int, heads: int, width: int, random: object) -> None:
    source = np.random.default_rng(random.randint(0, 99))  # type: ignore[attr-defined]
    keep = source.random((batch, positions)) < 0.6
    shapes = [(batch, positions), (batch, positions, width), (batch, positions, width, heads, 2)]
    shapes += [(batch, heads + positions, positions, width)]
    if positions > 1:
        shapes.append((batch * positions, width + positions))
    for shape in shapes:
        values = source.standard_normal(shape).astype(np.float32)
        values[..., :1] *= source.choice([1.0, np.nan], p=[0.8, 0.2])
        rows = values
        if len(shape) == 4:
            rows = np.moveaxis(values, 2, 1)
        elif shape[0] != batch:
            rows = values.reshape(batch, positions, -1)
        sketch = Sketch()
        sketch.update(values, keep)
        assert statistic_bytes(sketch) == statistic_bytes(sketch_of(rows[keep])), shape


def test_padding_that_cannot_be_told_is_kept() -> None:
    keep = np.array([[True, False, False]])
    for shape in [(1, 3, 3, 4), (5, 7), (), (3,), (1, 4, 4), (1, 3, 0)]:
        values = np.ones(shape, np.float32)
        sketch = Sketch()
        sketch.update(values, keep)
        assert sketch.count == values.size


def test_stored_nonsense_is_refused() -> None:
    arrays = sketch_of(np.arange(9, dtype=np.float32)).arrays()
    with pytest.raises(DataError, match="no sketch"):
        Sketch.from_arrays({"bins": arrays["bins"]})
    with pytest.raises(DataError, match="contradicts"):
        Sketch.from_arrays({**arrays, "bins": arrays["bins"][::-1]})
    with pytest.raises(DataError, match="contradicts"):
        Sketch.from_arrays({**arrays, "counts": arrays["counts"][1:]})


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_channels_are_exact(axis: int) -> None:
    values = np.random.default_rng(6).standard_normal((4, 5, 6)).astype(np.float32) * 3 - 1
    absmax, ends = ChannelAbsmax(axis), ChannelRange(axis)
    for half in (values, values * 2):
        absmax.update(half)
        ends.update(half)
    others = tuple(i for i in range(3) if i != axis % 3)
    assert np.array_equal(absmax.amax, np.abs(values * 2).max(others))
    assert np.array_equal(ends.min, np.minimum(values, values * 2).min(others))
    assert np.array_equal(ends.max, np.maximum(values, values * 2).max(others))
    assert absmax.count == ends.count == 2 * values.size


def test_channels_leave_out_padding() -> None:
    values = np.random.default_rng(8).standard_normal((2, 3, 4, 5)).astype(np.float32)
    keep = np.array([[True, True, False, False], [True, False, False, False]])
    absmax = ChannelAbsmax()
    absmax.update(values, keep)
    assert np.array_equal(absmax.amax, np.abs(np.moveaxis(values, 2, 1)[keep]).max((0, 1)))


def test_channels_that_do_not_fit_are_refused() -> None:
    absmax = ChannelAbsmax()
    absmax.update(np.ones((2, 3), np.float32))
    with pytest.raises(DataError, match="3 channels"):
        absmax.update(np.ones((2, 4), np.float32))
    with pytest.raises(DataError, match="no axis"):
        ChannelRange(2).update(np.ones((2, 3), np.float32))
    with pytest.raises(DataError, match="axis"):
        absmax.merge(ChannelAbsmax(0))


def test_importing_calibrators_is_light() -> None:
    code = (
        "import sys, calibrators, calibrators.sketch; sys.exit('numba' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
