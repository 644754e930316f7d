"""Numpy readers against the arrays that were written, and every misfit by what its error names."""

from __future__ import annotations

import contextlib
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibrators.data.batches import Batches, InMemory, Sample
from calibrators.data.fit import Fit
from calibrators.data.open import open_data
from calibrators.data.spec import DataSpec
from pipeline.errors import DataError
from pipeline.notices import collecting
from pipeline.types import CalibrationData, TensorInfo


def info(name: str, shape: tuple[int | str | None, ...], dtype: Any = np.float32) -> TensorInfo:
    return TensorInfo(name=name, dtype=np.dtype(dtype), shape=shape)


X = info("x", ("batch", 3))


def read(path: Path, *inputs: TensorInfo, **options: Any) -> CalibrationData:
    return open_data(DataSpec(data=str(path), **options), inputs or (X,))


def rows(data: CalibrationData, name: str = "x") -> np.ndarray[Any, Any]:
    return np.concatenate([batch[name] for batch in data])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_sample_survives_and_the_last_batch_is_smaller(tmp_path: Path, save: Any) -> None:
    values = np.arange(30, dtype=np.float32).reshape(10, 3)
    save(tmp_path / "d.npz", x=values)
    data = read(tmp_path / "d.npz", batch_size=4)
    assert [len(batch["x"]) for batch in data] == [4, 4, 2]
    assert len(data) == 10
    np.testing.assert_array_equal(rows(data), values)
    np.testing.assert_array_equal(rows(data), values)  # readable again


def test_batches_are_not_overwritten_by_later_ones(tmp_path: Path) -> None:
    values = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.savez(tmp_path / "d.npz", x=values)
    held = list(read(tmp_path / "d.npz", batch_size=1))
    assert len({batch["x"].tobytes() for batch in held}) == 10


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=20), size=st.integers(1, 5))
def test_batches_join_to_the_samples_whatever_their_shapes(lengths: list[int], size: int) -> None:
    class Listed:
        where = "list"

        def __iter__(self) -> Any:
            for index, length in enumerate(lengths):
                yield Sample(where="", feeds={"x": np.full(length, index)}, kind=length)

        def kinds(self) -> list[int]:
            return lengths

        def digest(self) -> str:
            return "d"

    data = Batches(Listed(), Fit.of([info("x", ("batch", "n"), np.int64)]), batch_size=size)
    batches = [batch["x"] for batch in data]
    assert [(int(row[0]), len(row)) for batch in batches for row in batch] == list(enumerate(lengths))
    assert len(data) == len(lengths)
    assert all(len(batch) <= size for batch in batches)
    for one, two in itertools.pairwise(batches):  # no batch ends early without a reason
        assert len(one) == size or one.shape[1] != two.shape[1]


def test_sample_limit_takes_the_first(tmp_path: Path) -> None:
    values = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.savez(tmp_path / "d.npz", x=values)
    data = read(tmp_path / "d.npz", samples=5, batch_size=3)
    assert len(data) == 5
    np.testing.assert_array_equal(rows(data), values[:5])


def test_folder_mixes_single_samples_batches_and_shapes_in_natural_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "10.npz", x=np.full((2, 4), 10.0, np.float32))
    np.savez(tmp_path / "2.npz", x=np.full(4, 2.0, np.float32))
    np.save(tmp_path / "1.npy", np.full(3, 1.0, np.float32))
    data = read(tmp_path, info("x", ("batch", "n")))
    assert [(batch["x"].shape, float(batch["x"][0, 0])) for batch in data] == [((1, 3), 1.0), ((3, 4), 2.0)]
    assert len(data) == 4


def test_fixed_batch_wins_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(30, dtype=np.float32).reshape(10, 3))
    with collecting() as notices:
        data = read(tmp_path / "d.npz", info("x", (4, 3)), batch_size=3)
    assert [len(batch["x"]) for batch in data] == [4, 4]
    assert len(data) == 8
    assert [n.code for n in notices] == ["dropped-samples"]
    assert "2 of 10" in notices[0].message
    with pytest.raises(DataError, match="fixed at 16"):
        read(tmp_path / "d.npz", info("x", (16, 3)))


def test_inputs_without_a_common_batch_axis_are_fed_whole(tmp_path: Path) -> None:
    inputs = (info("x", (4, 3)), info("y", (2,)), info("k", (), np.int64))
    np.savez(
        tmp_path / "d.npz",
        x=np.ones((5, 4, 3), np.float32),
        y=np.ones((5, 2), np.float32),
        k=np.arange(5, dtype=np.int64),
    )
    batches = list(read(tmp_path / "d.npz", *inputs))
    assert [tuple(a.shape for a in batch.values()) for batch in batches] == [((4, 3), (2,), ())] * 5
    assert [int(batch["k"]) for batch in batches] == list(range(5))


def test_a_fixed_batch_of_zero_is_fed_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((2, 0, 3), np.float32))
    assert [batch["x"].shape for batch in read(tmp_path / "d.npz", info("x", (0, 3)))] == [(0, 3)] * 2


def test_types_convert_where_no_value_is_lost(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([[0.1], [2.0]]), i=np.array([[1], [2**31 - 1]], np.int64))
    batch = next(iter(read(tmp_path / "d.npz", info("x", (None, 1)), info("i", (None, 1), np.int32))))
    assert batch["x"].dtype == np.float32
    assert batch["i"].dtype == np.int32
    np.testing.assert_array_equal(batch["x"], np.array([[0.1], [2.0]], np.float32))
    np.savez(tmp_path / "e.npz", i=np.array([[1], [2**31]], np.int64))
    with pytest.raises(DataError, match="2147483648") as caught:
        list(read(tmp_path / "e.npz", info("i", (None, 1), np.int32)))
    assert "sample 1" in caught.value.where
    np.savez(tmp_path / "f.npz", x=np.array([[1e300]]))
    with pytest.raises(DataError, match="1e"):
        list(read(tmp_path / "f.npz", info("x", (None, 1))))


def test_big_endian_and_fortran_arrays_read_right(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(tmp_path / "b.npz", x=values.astype(">f4"))
    np.testing.assert_array_equal(rows(read(tmp_path / "b.npz")), values)
    np.savez(tmp_path / "f.npz", x=np.asfortranarray(values))
    with collecting() as notices:
        np.testing.assert_array_equal(rows(read(tmp_path / "f.npz")), values)
    assert [n.code for n in notices] == ["fortran-order"]


@pytest.mark.parametrize(
    ("arrays", "inputs", "said"),
    [
        ({"y": np.ones((2, 3), np.float32), "z": np.ones(2)}, [X], ["'x'", "'y'"]),
        ({"input_idz": np.ones((2, 3), np.int64)}, [info("input_ids", ("b", "s"), np.int64)], ["Rename 'input_idz'"]),
        ({"x": np.ones((2, 3), np.int64)}, [X], ["int64", "float32"]),
        ({"x": np.ones((2, 3), np.float16)}, [X], ["float16"]),
        ({"x": np.ones((2, 4), np.float32)}, [X], ["dimension 0 is 4", "fixed at 3"]),
        ({"x": np.ones((2, 3, 1), np.float32)}, [X], ["3 dimensions"]),
        (
            {"x": np.ones((2, 3), np.float32), "y": np.ones((3, 3), np.float32)},
            [X, info("y", (None, 3))],
            ["'x' 2", "'y' 3"],
        ),
        (
            {"x": np.ones((2, 3), np.float32), "y": np.ones(3, np.float32)},
            [X, info("y", (None, 3))],
            ["'y' is one sample"],
        ),
        ({"x": np.ones((0, 3), np.float32)}, [X], ["no samples"]),
    ],
)
def test_misfits_are_named_before_anything_is_read(
    tmp_path: Path, arrays: dict[str, Any], inputs: list[TensorInfo], said: list[str]
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "d.npz", *inputs)
    for part in said:
        assert part in str(caught.value)
    assert "d.npz" in caught.value.where


def test_unnamed_and_unused_arrays(tmp_path: Path) -> None:
    values = np.ones((2, 3), np.float32)
    np.savez(tmp_path / "p.npz", values)
    np.testing.assert_array_equal(rows(read(tmp_path / "p.npz")), values)
    np.savez(tmp_path / "u.npz", x=values, labels=np.ones(2))
    with collecting() as notices:
        read(tmp_path / "u.npz")
    assert [n.code for n in notices] == ["unused-arrays"]
    np.save(tmp_path / "one.npy", values)
    with pytest.raises(DataError, match="2 inputs"):
        read(tmp_path / "one.npy", X, info("y", (None, 3)))


@pytest.mark.parametrize("keep", [0, 10, 100, 300])
def test_truncated_files_are_data_errors(tmp_path: Path, keep: int) -> None:
    for name, save in (("d.npz", np.savez), ("d.npy", np.save)):
        save(tmp_path / name, np.ones((40, 3), np.float32))
        data = (tmp_path / name).read_bytes()[:keep]
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError):
            list(read(tmp_path / name))


def test_corrupt_npz_member_is_a_data_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((40, 3), np.float32))
    data = bytearray((tmp_path / "d.npz").read_bytes())
    data[300] ^= 0xFF  # inside the values: found by the zip's checksum
    (tmp_path / "d.npz").write_bytes(data)
    with pytest.raises(DataError, match="CRC"):
        list(read(tmp_path / "d.npz"))


def test_a_header_that_claims_too_much_allocates_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.ones((4000, 3), np.float32))
    data = (tmp_path / "d.npy").read_bytes()
    (tmp_path / "d.npy").write_bytes(data.replace(b"(4000, 3)", b"(9**9, 3)").replace(b"9**9", b"9999"))
    with pytest.raises(DataError, match="more than the file holds"):
        read(tmp_path / "d.npy")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_files_give_samples_or_a_data_error(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    for name, save in (("d.npz", np.savez_compressed), ("d.npy", np.save)):
        save(tmp_path / name, np.ones((40, 3), np.float32))
        data = bytearray((tmp_path / name).read_bytes())
        for place, value in changes:
            data[place % len(data)] = value
        (tmp_path / name).write_bytes(data)
        with contextlib.suppress(DataError):
            list(read(tmp_path / name))


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read(tmp_path / ("x" * 300 + ".npz"))
    np.savez(tmp_path / "ünï.npz", **{"ünïcode/" + "x" * 300: np.ones((2, 3), np.float32)})
    assert len(read(tmp_path / "ünï.npz", info("ünïcode/" + "x" * 300, (None, 3)))) == 2


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, Any]:
            return (Path.touch, (tmp_path / "boom",))

    np.savez(tmp_path / "d.npz", x=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match="pickled"):
        list(read(tmp_path / "d.npz"))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_samples(tmp_path: Path, save: Any) -> None:
    peaks = []
    for count in (16, 256):
        save(tmp_path / f"{count}.npz", x=np.ones((count, 3, 4096), np.float32))  # 48 kB a sample, 12 MB in all
        tracemalloc.start()
        for _ in read(tmp_path / f"{count}.npz", info("x", (None, 3, 4096))):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 200_000


def test_digest_follows_content_and_options_only(tmp_path: Path) -> None:
    values = np.arange(30, dtype=np.float32).reshape(10, 3)
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, x=values)
    one = read(tmp_path / "a.npz").digest()
    assert len(one) == 64
    assert read(tmp_path / "b.npz").digest() == one
    assert read(tmp_path / "a.npz", samples=5).digest() != one
    assert read(tmp_path / "a.npz", batch_size=5).digest() != one
    np.savez(tmp_path / "b.npz", x=values + 1)
    assert read(tmp_path / "b.npz").digest() != one


def test_folders_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no"):
        read(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert "a.jsonl" in caught.value.fix
    np.save(tmp_path / "a.npy", np.ones(3, np.float32))
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match="both"):
        read(tmp_path)


def test_unknown_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(DataError, match="csv"):
        read(tmp_path / "a.csv")
    with pytest.raises(DataError, match="no such"):
        read(tmp_path / "none.npz")
    with pytest.raises(DataError, match="no inputs"):
        open_data(DataSpec(data=str(tmp_path)), ())
    with pytest.raises(DataError, match="batch_size"):
        DataSpec(data="d", batch_size=0)


def test_in_memory_batches() -> None:
    batches = [{"x": np.ones((2, 3), np.float32)}, {"x": np.ones((1, 3), np.float32)}]
    data = InMemory(batches, [X])
    assert isinstance(data, CalibrationData)
    assert len(data) == 3
    assert len(list(data)) == len(list(data)) == 2
    assert data.digest() != InMemory(batches[:1], [X]).digest()
    with pytest.raises(DataError, match="'x'"):
        InMemory([{"y": np.ones((2, 3))}], [X])
    with pytest.raises(DataError, match="no samples"):
        InMemory([], [X])
