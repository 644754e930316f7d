"""Each notice: on data that has the fault, and not on data that has not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from calibrators.data.checks import ModelKind, beyond_range, check_data, overlap
from calibrators.data.digests import sample_digests
from pipeline.notices import collecting
from pipeline.types import Feeds, Range

RNG = np.random.default_rng(0)


class Listed:
    """Batches in a list; counts the samples that were read."""

    def __init__(self, *batches: Feeds) -> None:
        self.batches = batches
        self.read = 0

    def __len__(self) -> int:
        return sum(len(next(iter(batch.values()))) for batch in self.batches)

    def __iter__(self) -> Iterator[Feeds]:
        for batch in self.batches:
            self.read += len(next(iter(batch.values())))
            yield batch

    def digest(self) -> str:
        return ""


def codes(data: Listed, kind: ModelKind | None = None) -> list[str]:
    with collecting() as notices:
        check_data(data, kind=kind)
    return [n.code for n in notices]


def zipf_ids(rows: int, length: int) -> np.ndarray[Any, Any]:
    return np.minimum(RNG.zipf(1.3, (rows, length)), 30000).astype(np.int64)


def smooth_pictures(count: int) -> np.ndarray[Any, Any]:
    waves = np.cumsum(np.cumsum(RNG.normal(size=(count, 3, 32, 32)), axis=-1), axis=-2)
    return waves.astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "samples", "few"),
    [("vision", 99, True), ("vision", 100, False), ("encoder", 64, True), ("llm", 999, True), ("llm", 1000, False)],
)
def test_few_samples(kind: str, samples: int, few: bool) -> None:
    data = Listed({"ids": zipf_ids(samples, 20)})
    assert ("few-samples" in codes(data, ModelKind(kind))) is few
    assert codes(data) == []


@pytest.mark.parametrize(
    "values",
    [
        RNG.random((16, 3, 32, 32)),
        RNG.normal(size=(16, 3, 32, 32)),
        RNG.normal(3, 7, size=(64, 256)),
        (RNG.integers(0, 256, (16, 3, 32, 32)) / 255 - np.reshape([0.485, 0.456, 0.406], (3, 1, 1)))
        / np.reshape([0.229, 0.224, 0.225], (3, 1, 1)),
    ],
)
def test_noise_is_noticed(values: np.ndarray[Any, Any]) -> None:
    assert codes(Listed({"x": values.astype(np.float32)})) == ["random-data"]


@pytest.mark.parametrize(
    "values",
    [
        smooth_pictures(16),
        np.maximum(RNG.normal(size=(16, 512)), 0),  # sparse
        RNG.lognormal(size=(16, 512)),  # skewed
        np.sin(np.linspace(0, 50, 16 * 512)).reshape(16, 512),
        RNG.random((4, 10)),  # too few values to say
    ],
)
def test_real_shapes_of_data_are_not(values: np.ndarray[Any, Any]) -> None:
    assert codes(Listed({"x": values.astype(np.float32)})) == []


def test_digits_are_not_noise() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels = datasets.load_digits().images[:64, None].astype(np.float32)
    assert codes(Listed({"pixels": pixels})) == []


def test_random_token_ids() -> None:
    random = RNG.integers(0, 30522, (16, 128))
    assert codes(Listed({"input_ids": random})) == ["random-data"]
    assert codes(Listed({"input_ids": zipf_ids(16, 128)})) == []


def test_padding_does_not_hide_random_ids() -> None:
    ids = RNG.integers(1000, 2000, (16, 128))
    mask = np.ones_like(ids)
    ids[:, 64:] = mask[:, 64:] = 0
    assert codes(Listed({"input_ids": ids, "attention_mask": mask})) == ["random-data"]


def test_constant_inputs() -> None:
    ids = zipf_ids(8, 64)
    side = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    assert codes(Listed({"input_ids": ids, **side})) == []
    assert codes(Listed({"input_ids": ids, "bias": np.ones((8, 2), np.float32)})) == ["constant-input"]


def test_copies() -> None:
    ids = zipf_ids(20, 64)
    assert codes(Listed({"input_ids": np.concatenate([ids, ids[:2]])})) == []
    assert codes(Listed({"input_ids": np.concatenate([ids, ids[:5]])})) == ["identical-samples"]


def test_nonfinite() -> None:
    values = smooth_pictures(4)
    values[0, 0, 0, 0] = np.nan
    assert codes(Listed({"x": values})) == ["nonfinite-input"]


def test_looks_at_64_samples_only() -> None:
    data = Listed(*({"ids": zipf_ids(10, 16)} for _ in range(50)))
    codes(data)
    assert data.read == 70


def test_scalars_and_complete_feeds_pass() -> None:
    feeds = [{"x": smooth_pictures(2), "k": np.array(i)} for i in range(3)]

    class Complete(Listed):
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[Feeds]:
            return iter(self.batches)

    assert codes(Complete(*feeds)) == []


def test_overlap_is_found_whatever_the_batch_and_padding() -> None:
    ids = np.array([[5, 6, 7, 0], [8, 9, 0, 0], [4, 4, 4, 4]])
    mask = (ids > 0).astype(np.int64)
    left = np.array([[0, 8, 9], [1, 2, 3]])
    calibration = [{"input_ids": ids, "attention_mask": mask}]
    heldout = [{"input_ids": left.astype(np.int32), "attention_mask": (left > 0).astype(np.int32)}]
    with collecting() as notices:
        assert overlap(calibration, heldout) == 1
    assert [n.code for n in notices] == ["overlap"]
    assert "1 of 2" in notices[0].message
    with collecting() as notices:
        assert overlap(calibration, [{"input_ids": left[1:], "attention_mask": left[1:]}]) == 0
    assert notices == []


def test_sample_digests_split_batches() -> None:
    values = RNG.normal(size=(6, 3)).astype(np.float32)
    whole = sample_digests([{"x": values}])
    assert len(whole) == 6
    assert whole == sample_digests([{"x": values[:4]}, {"x": values[4:]}])
    assert not whole & sample_digests([{"x": values + 1}])
    assert len(sample_digests([{"x": values, "k": np.array(1)}])) == 1


def test_beyond_range() -> None:
    ranges = {"a": Range(min=-1, max=1), "b": Range(min=0, max=10), "c": Range(min=0, max=0), "d": Range(min=0, max=1)}
    heldout = {"a": (-2.0, 1.0), "b": (0.0, 10.1), "c": (0.0, 0.0), "e": (0.0, 9.0)}
    with collecting() as notices:
        found = beyond_range(heldout, ranges)
    assert [(item.tensor, round(item.excess, 6)) for item in found] == [("a", 0.5), ("b", 0.01)]
    assert [n.code for n in notices] == ["beyond-range"]
    assert "2 of 3 tensors" in notices[0].message
    assert notices[0].where == "a"
    with collecting() as notices:
        assert len(beyond_range(heldout, ranges, tolerance=0.6)) == 2
    assert notices == []
    assert beyond_range({"c": (0.0, 1e-9)}, ranges)[0].excess == float("inf")
