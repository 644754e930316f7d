"""Optimization profiles: derived from inputs and shapes, or given and checked."""

from __future__ import annotations

import numpy as np
import pytest

from engines.tensorrt.profiles import ShapeRange, check_profiles, derive
from pipeline.errors import RecipeError
from pipeline.types import TensorInfo

IDS = TensorInfo(name="ids", dtype=np.dtype(np.int64), shape=("batch", "tokens"))
IMAGE = TensorInfo(name="image", dtype=np.dtype(np.float32), shape=(None, 3, 32, 32))


def test_batches_reach_the_largest_and_other_dimensions_their_usual_size() -> None:
    (profile,) = derive([IDS, IMAGE], {"ids": (8, 128), "image": (8, 3, 32, 32)}, max_batch_size=32)
    assert profile["ids"] == ShapeRange(min=(1, 1), opt=(8, 128), max=(32, 128))
    assert profile["image"] == ShapeRange(min=(1, 3, 32, 32), opt=(8, 3, 32, 32), max=(32, 3, 32, 32))
    check_profiles([profile], [IDS, IMAGE], max_batch_size=32)


def test_the_usual_batch_is_cut_to_the_largest() -> None:
    (profile,) = derive([IDS], {"ids": (8, 16)}, max_batch_size=4)
    assert (profile["ids"].opt, profile["ids"].max) == ((4, 16), (4, 16))


def test_without_a_largest_batch_the_usual_one_is_it() -> None:
    assert derive([IDS], {"ids": (8, 16)})[0]["ids"].max == (8, 16)


def test_a_shape_that_is_not_known_is_an_error() -> None:
    with pytest.raises(RecipeError, match="'image'"):
        derive([IMAGE], {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"other": ShapeRange(min=(1, 1), opt=(1, 1), max=(1, 1))}, "disagree on the inputs ids, other"),
        ({"ids": ShapeRange(min=(1,), opt=(1,), max=(1,))}, "has 2 dimensions"),
        ({"ids": ShapeRange(min=(2, 1), opt=(1, 1), max=(4, 1))}, "min 2, opt 1, max 4 in dimension 0"),
        ({"ids": ShapeRange(min=(1, 1), opt=(2, 8), max=(4, 8))}, "No profile takes a batch of 16"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(given: dict[str, ShapeRange], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        check_profiles([given], [IDS], max_batch_size=16)


def test_a_fixed_dimension_stays_fixed() -> None:
    wrong = {"image": ShapeRange(min=(1, 3, 8, 32), opt=(1, 3, 32, 32), max=(1, 3, 32, 32))}
    with pytest.raises(RecipeError, match="fixed size of 32 in dimension 2"):
        check_profiles([wrong], [IMAGE])
