"""Flattening, resizing, comparing: the parts of an export that need no torch."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.sources import samples, sizes, structure
from pipeline.sources.check import relative_difference

LEAVES = st.integers() | st.none() | st.booleans()
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@given(NESTED)
def test_rebuild_visits_the_leaves_in_the_order_of_flatten(value: Any) -> None:
    leaves = [leaf for _, leaf in structure.flatten(value)]
    left = iter(leaves)
    assert structure.rebuild(value, lambda _: next(left)) == value
    assert list(left) == []


def test_flat_names_are_paths() -> None:
    point = namedtuple("point", "x y")
    value = {"a": (1, [2, 3]), "p": point(4, 5)}
    expected = [("a_0", 1), ("a_1_0", 2), ("a_1_1", 3), ("p_x", 4), ("p_y", 5)]
    assert list(structure.flatten(value)) == expected
    assert structure.rebuild(value, lambda leaf: -leaf) == {"a": (-1, [-2, -3]), "p": point(-4, -5)}


def test_axis_0_of_inputs_of_the_first_ones_size_is_the_batch() -> None:
    sample = {"x": np.zeros((3, 5)), "table": np.zeros((7, 5)), "mask": np.zeros((3,)), "k": np.zeros(())}
    assert sizes.default_dims(sample) == {"x": {0: "batch"}, "mask": {0: "batch"}}


def test_other_sizes_share_names_and_keep_their_values() -> None:
    sample = {"x": np.arange(12).reshape(3, 4), "y": np.arange(8).reshape(2, 4)}
    dims = {"x": {0: "batch", 1: "t"}, "y": {1: "t"}}
    other = sizes.others(sample, dims)
    assert {name: value.shape for name, value in other.items()} == {"x": (1, 7), "y": (2, 7)}
    assert set(other["y"].ravel()) == set(sample["y"].ravel())


def test_a_dynamic_axis_of_one_is_doubled() -> None:
    sample = {"x": np.ones((1, 1, 2), np.float32)}
    assert sizes.at_least_two(sample, {"x": {0: "batch"}})["x"].shape == (2, 1, 2)


@pytest.mark.parametrize(
    ("given_dims", "message"),
    [
        ([{}], "list"),
        ({"z": {0: "b"}}, "the inputs are x"),
        ({"x": {2: "b"}}, "has 2 axes"),
        ({"x": {-1: "b"}}, "axis -1"),
        ({"x": [0]}, "no dict of axes"),
    ],
)
def test_wrong_dynamic_shapes_are_named(given_dims: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        sizes.parse(given_dims, {"x": np.zeros((2, 3))}, "here")


def test_relative_difference_by_hand() -> None:
    wanted = np.array([1.0, -4.0, np.inf], np.float32)
    assert relative_difference(np.array([1.0, -3.0, np.inf], np.float32), wanted) == 0.25
    assert relative_difference(np.array([1.0, -4.0, 5.0], np.float32), wanted) == np.inf
    assert relative_difference(wanted[:2], wanted) == np.inf
    assert relative_difference(wanted.astype(np.float64), wanted) == np.inf
    assert relative_difference(np.array([3]), np.array([4])) == 0.25
    assert relative_difference(np.array([True]), np.array([False])) == 1.0
    assert relative_difference(np.zeros((0, 2)), np.zeros((0, 2))) == 0.0
    assert relative_difference(np.array([1e-3]), np.zeros(1)) == 1e-3


@given(pad=st.integers(0, 60000), longest=st.integers(4, 600), vocabulary=st.integers(2, 1000))
def test_text_samples_pad_where_the_mask_says_and_nowhere_else(pad: int, longest: int, vocabulary: int) -> None:
    names = ["input_ids", "attention_mask", "token_type_ids"]
    for batch in samples.text(names, vocabulary=vocabulary, pad=pad % vocabulary, longest=longest):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape[1] <= longest
        assert ((ids == pad % vocabulary) == (mask == 0)).all()
        assert 0 < mask.mean() < 1
        assert ids.min() >= 0
        assert ids.max() < vocabulary
