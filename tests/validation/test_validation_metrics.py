from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import EngineError
from pipeline.validation.metrics import Comparison


def compare_py(ref: np.ndarray, got: np.ndarray, mask: np.ndarray | None) -> dict[str, float]:
    """The formulas of the project's benchmark script, on whole arrays."""
    r, g = ref.astype(np.float64), got.astype(np.float64)
    if mask is not None and r.ndim == 3 and r.shape[:2] == mask.shape:
        r, g = r[mask > 0], g[mask > 0]
    r2, g2 = r.reshape(-1, r.shape[-1]), g.reshape(-1, g.shape[-1])
    num, den = (r**2).sum(), ((r - g) ** 2).sum()
    cos = (r2 * g2).sum(1) / (np.linalg.norm(r2, axis=1) * np.linalg.norm(g2, axis=1) + 1e-12)
    return {
        "sqnr_db": 10 * np.log10(num / den),
        "cosine": cos.mean(),
        "cosine_min": cos.min(),
        "top1_agreement": (r2.argmax(1) == g2.argmax(1)).mean(),
        "max_abs": np.abs(r - g).max(),
        "mean_abs": np.abs(r - g).mean(),
        "relative_l2": np.linalg.norm(r - g) / np.linalg.norm(r),
    }


def one(ref, got, mask=None):
    comparison = Comparison()
    comparison.update({"y": np.asarray(ref)}, {"y": np.asarray(got)}, mask)
    return comparison.result()["y"]


@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(1, 15), max_size=4), masked=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_batch_split_gives_the_formula_on_the_whole(seed: int, cuts: list[int], masked: bool) -> None:
    rng = np.random.default_rng(seed)
    ref = rng.standard_normal((16, 5, 7)).astype(np.float32) * 10 ** rng.uniform(-3, 3)
    got = (ref + rng.standard_normal(ref.shape) * np.abs(ref).mean() * 0.1).astype(np.float32)
    mask = rng.integers(0, 2, (16, 5)) if masked else None
    if mask is not None:
        mask[0, 0] = 1
    comparison = Comparison()
    edges = [0, *sorted(set(cuts)), 16]
    for start, end in pairwise(edges):
        comparison.update({"y": ref[start:end]}, {"y": got[start:end]}, mask[start:end] if mask is not None else None)
    found = comparison.result()["y"]
    for name, value in compare_py(ref, got, mask).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    assert found.count == (ref.size if mask is None else int(mask.sum()) * 7)


def test_large_batches_are_summed_in_pieces() -> None:
    rng = np.random.default_rng(0)
    ref = rng.standard_normal((3, 300_000)).astype(np.float32)
    got = ref + rng.standard_normal(ref.shape).astype(np.float32) * 0.01
    expected = compare_py(ref, got, None)
    found = one(ref, got)
    assert found.sqnr_db == pytest.approx(expected["sqnr_db"])
    assert found.cosine_min == pytest.approx(expected["cosine_min"])


def test_memory_does_not_grow_with_samples() -> None:
    rng = np.random.default_rng(0)
    ref = rng.standard_normal((4, 1000)).astype(np.float32)

    def peak(batches: int) -> int:
        comparison = Comparison()
        tracemalloc.start()
        for _ in range(batches):
            comparison.update({"y": ref}, {"y": ref + np.float32(0.1)})
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(2)
    assert peak(100) <= peak(5) * 1.1


def test_padding_is_left_out_only_of_batch_seq_width() -> None:
    ref = np.ones((2, 3, 4), np.float32)
    got = ref.copy()
    got[:, 2] = 1e6
    mask = np.array([[1, 1, 0], [1, 1, 0]])
    assert one(ref, got, mask).exact
    assert not one(ref[:, 0], got[:, 2], mask).exact  # [batch, width]
    assert one(ref, got, np.ones((2, 2), np.int64)).max_abs == pytest.approx(1e6)  # another sequence length


def test_identical_outputs_are_exact_and_have_no_sqnr() -> None:
    found = one([[1.0, 2.0]], [[1.0, 2.0]])
    assert (found.exact, found.sqnr_db, found.relative_l2, found.max_abs) == (True, None, 0.0, 0.0)
    assert found.cosine == pytest.approx(1.0)


def test_zero_rows_on_both_sides_agree_and_on_one_side_do_not() -> None:
    found = one([[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert (found.cosine, found.cosine_min) == (0.5, 0.0)


def test_zero_reference_has_no_ratio() -> None:
    found = one([[0.0, 0.0]], [[0.0, 0.5]])
    assert (found.exact, found.sqnr_db, found.relative_l2, found.max_abs) == (False, None, None, 0.5)


def test_special_values_count_only_where_they_differ() -> None:
    ref = np.array([[1.0, -np.inf, np.nan, 2.0]], np.float32)
    assert one(ref, ref).exact
    got = np.array([[1.0, -np.inf, np.nan, np.nan]], np.float32)
    found = one(ref, got)
    assert (found.nonfinite, found.exact, found.mean_abs) == (1, False, 0.0)
    assert one(ref, np.array([[1.0, np.inf, 0.0, 2.0]], np.float32)).nonfinite == 2


def test_all_values_special() -> None:
    found = one(np.full((2, 2), np.nan), np.zeros((2, 2)))
    assert (found.count, found.nonfinite, found.mean_abs, found.cosine) == (4, 4, None, None)


def test_float64_overflow_is_no_figure_and_no_crash() -> None:
    found = one(np.full((1, 2), 1e200), np.full((1, 2), -1e200))
    assert found.sqnr_db is None
    assert found.max_abs == pytest.approx(2e200)


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.str_])
def test_other_types_have_only_a_share_of_equal_values(dtype: type) -> None:
    ref = np.array([[0, 1, 1, 1]]).astype(dtype)
    got = np.array([[0, 1, 1, 0]]).astype(dtype)
    found = one(ref, got)
    assert (found.exact_match, found.sqnr_db, found.cosine, found.exact) == (0.75, None, None, False)


def test_vector_outputs_are_one_row() -> None:
    rng = np.random.default_rng(0)
    ref, got = rng.standard_normal((2, 10))
    comparison = Comparison()
    comparison.update({"y": ref[:4]}, {"y": got[:4]})
    comparison.update({"y": ref[4:]}, {"y": got[4:]})
    found = comparison.result()["y"]
    assert found.cosine == pytest.approx(compare_py(ref, got, None)["cosine"])
    assert found.top1_agreement is None


def test_no_values() -> None:
    found = one(np.zeros((0, 4)), np.zeros((0, 4)))
    assert (found.count, found.sqnr_db, found.exact) == (0, None, False)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({}, "lacks an output"),
        ({"y": np.zeros((2, 3), np.float32)}, "shape"),
        ({"y": np.zeros((2, 2), np.int64)}, "int64"),
    ],
)
def test_different_models_are_refused(candidate: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Comparison().update({"y": np.zeros((2, 2), np.float32)}, candidate)


def test_half_precision_candidate_is_compared_in_float64() -> None:
    ref = np.array([[1.0, 2.0, 3.0001]], np.float32)
    found = one(ref, ref.astype(np.float16))
    assert found.max_abs == pytest.approx(1e-4, rel=0.01)
