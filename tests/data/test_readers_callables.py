"""The reader of the user's own code."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.data.open import open_data
from calibrators.data.spec import DataSpec
from pipeline.errors import DataError
from pipeline.types import CalibrationData, TensorInfo

X = TensorInfo(name="x", dtype=np.dtype(np.float32), shape=("batch", 2))
_count = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a module of a new name and read one of its names as data."""

    def write(code: str, name: str = "samples", **options: Any) -> CalibrationData:
        stem = f"user_module_{next(_count)}"
        (tmp_path / f"{stem}.py").write_text("import numpy as np\n" + code)
        monkeypatch.syspath_prepend(str(tmp_path))
        return open_data(DataSpec(data=f"{stem}:{name}", **{"trust_data": True, **options}), [X])

    return write


GENERATOR = """
def samples():
    for i in range(5):
        yield {"x": np.full(2, i, np.float32)}
"""


def values(data: CalibrationData) -> list[float]:
    return [float(row[0]) for batch in data for row in batch["x"]]


def test_function_is_called_again_for_every_reading(module: Any) -> None:
    data = module(GENERATOR, batch_size=2)
    assert len(data) == 5
    assert [len(batch["x"]) for batch in data] == [2, 2, 1]
    assert values(data) == values(data) == [0, 1, 2, 3, 4]


def test_batches_are_cut_into_samples_and_a_shared_buffer_is_copied(module: Any) -> None:
    data = module(
        """
def samples():
    buffer = np.zeros((2, 2), np.float32)
    for i in range(3):
        buffer[:] = [[2 * i] * 2, [2 * i + 1] * 2]
        yield {"x": buffer}
""",
        batch_size=4,
    )
    assert values(data) == [0, 1, 2, 3, 4, 5]


def test_endless_generator_stops_at_the_limit(module: Any) -> None:
    data = module(GENERATOR.replace("range(5)", "iter(int, 1)"), samples=7)
    assert len(data) == len(values(data)) == 7


def test_list_is_read_as_it_is(module: Any) -> None:
    assert values(module('samples = [{"x": np.ones(2, np.float32)}] * 3')) == [1, 1, 1]


def test_needs_trust(module: Any) -> None:
    with pytest.raises(DataError, match="code") as caught:
        module("raise SystemExit", trust_data=False)
    assert "trust_data: true" in caught.value.fix


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ('samples = ({"x": np.ones(2, np.float32)} for _ in range(3))', "only once"),
        (
            'one = ({"x": np.ones(2, np.float32)} for _ in range(3))\ndef samples(): return one',
            "only once",
        ),
        ("samples = 3", "int"),
        ("def samples(): return 3", "int"),
        ("def samples(): return [3]", "no(t)? a dict"),
        ("def samples(): return [{'y': np.ones(2, np.float32)}]", "'x'"),
        ("def samples(): return [{'x': np.ones(2, np.int32)}]", "int32"),
        ("def samples(): return [{'x': np.ones(3, np.float32)}]", "fixed at 2"),
        ("def samples(): return [{'x': [[1], [2, 3]]}]", "array"),
        ("def samples(): return [{'x': None}]", "objects"),
        ("def samples(): return []", "no samples"),
        ("def samples(): raise KeyError('k')", "KeyError"),
        ("def samples():\n yield {'x': np.ones(2, np.float32)}\n raise KeyError('k')", "KeyError"),
        ("other = 1", "imported"),
        ("import no_such_package_at_all", "no_such_package_at_all"),
    ],
)
def test_what_does_not_work_says_why(module: Any, code: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        module(code)


def test_other_samples_when_read_again_are_refused(module: Any) -> None:
    data = module(
        """
state = np.random.default_rng()
def samples():
    for _ in range(3):
        yield {"x": state.normal(size=2).astype(np.float32)}
"""
    )
    with pytest.raises(DataError, match="other samples"):
        list(data)


def test_more_or_fewer_samples_when_read_again_are_refused(module: Any) -> None:
    for change in ("+ len(calls)", "- len(calls)"):
        data = module(
            f"""
calls = []
def samples():
    calls.append(1)
    for i in range(9 {change}):
        yield {{"x": np.full(2, i, np.float32)}}
"""
        )
        with pytest.raises(DataError, match="other samples"):
            list(data)


def test_stopping_early_is_no_error(module: Any) -> None:
    data = module(GENERATOR, batch_size=1)
    iterator: Iterator[Any] = iter(data)
    assert float(next(iterator)["x"][0, 0]) == 0
