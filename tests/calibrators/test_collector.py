"""The collector against numpy, and its promises: shards, memory, padding, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from collector_models import Memory, batches, numpy_tensors, two_layers
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators import exposure
from calibrators.channel_absmax import ChannelAbsmax
from calibrators.channel_range import ChannelRange
from calibrators.collector import CollectOptions, Request, Statistics, collect
from calibrators.sketch import Sketch
from pipeline.errors import DataError, EngineError, ModelError, StoreError

TENSORS = ["x", "up", "act", "split", "turned", "y", "w1"]
REQUESTS = [
    *(Request(name) for name in TENSORS),
    Request("act", "channel_absmax"),
    Request("act", "channel_range", 1),
    Request("w1", "channel_absmax", 0),
]
DATA = batches(3, 2, 3, 1, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers(tmp_path_factory.mktemp("model") / "two_layers.onnx")


@pytest.fixture(scope="module")
def whole(model: Path) -> Statistics:
    return collect(model, REQUESTS, Memory(DATA))


def file_bytes(statistics: Statistics, folder: Path) -> bytes:
    path = folder / "statistics.safetensors"
    statistics.save(path)
    return path.read_bytes()


def test_statistics_are_those_of_numpy(model: Path, whole: Statistics) -> None:
    assert sorted(whole) == sorted(TENSORS)
    assert whole.samples == 12
    for name in set(TENSORS) - {"w1"}:
        values = np.concatenate([numpy_tensors(model, batch["x"])[name].ravel() for batch in DATA])
        sketch = whole[name]
        assert sketch.count == values.size
        assert sketch.max == pytest.approx(values.max(), rel=1e-6)
        assert sketch.min == pytest.approx(values.min(), rel=1e-6)
        assert sketch.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-5)
    acts = np.concatenate([numpy_tensors(model, batch["x"])["act"] for batch in DATA])
    absmax, ends = whole.of(Request("act", "channel_absmax")), whole.of(Request("act", "channel_range", 1))
    assert isinstance(absmax, ChannelAbsmax)
    assert isinstance(ends, ChannelRange)
    assert absmax.amax == pytest.approx(np.abs(acts).max((0, 1)), rel=1e-6)
    assert ends.max == pytest.approx(acts.max((0, 2)), rel=1e-6)
    weight = whole.of(Request("w1", "channel_absmax", 0))
    assert isinstance(weight, ChannelAbsmax)
    assert np.array_equal(weight.amax, np.abs(numpy_tensors(model, DATA[0]["x"])["w1"]).max(1))


def test_a_constant_counts_once(whole: Statistics) -> None:
    assert whole["w1"].count == 48


def test_rearranged_tensors_share_one_sketch(whole: Statistics) -> None:
    assert whole["turned"] is whole["act"]
    assert whole["split"] is whole["act"]


def test_measurements_are_recorded(whole: Statistics) -> None:
    assert whole.seconds is not None
    assert whole.fp32_forward_seconds is not None
    assert 0 < whole.fp32_forward_seconds < whole.seconds
    assert whole.peak_rss_bytes is not None
    assert whole.peak_rss_bytes > 1 << 24


@pytest.mark.parametrize("memory_bytes", [1, 400, 800])
def test_passes_give_the_same_bytes(model: Path, whole: Statistics, tmp_path: Path, memory_bytes: int) -> None:
    data = Memory(DATA)
    steps: list[tuple[int, int]] = []
    found = collect(
        model,
        REQUESTS,
        data,
        CollectOptions(memory_bytes=memory_bytes),
        lambda stage, done, total: steps.append((done, total)),
    )
    assert data.read > 2
    assert file_bytes(found, tmp_path) == file_bytes(whole, tmp_path)
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert len(steps) == 5 * (data.read - 1)
    assert all(done <= total for done, total in steps)


@pytest.mark.parametrize("shape", ["fixed", "external", "large"])
def test_other_models(whole: Statistics, tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two_layers(tmp_path / "m.onnx", batch=2 if shape == "fixed" else "batch", external=shape == "external")
    if shape == "large":
        monkeypatch.setattr(exposure, "_LARGE_BYTES", 0)
    data = batches(2, 2)
    found = collect(path, REQUESTS, Memory(data), CollectOptions(threads=1))
    values = np.concatenate([numpy_tensors(path, batch["x"])["y"].ravel() for batch in data])
    assert found["y"].count == values.size
    assert found["y"].max == pytest.approx(values.max(), rel=1e-6)


def test_external_data_is_part_of_the_hash(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "m.onnx", external=True)
    first = collect(path, [Request("y")], Memory(DATA)).model_sha256
    weights = bytearray((tmp_path / "weights.bin").read_bytes())
    weights[2] ^= 1
    (tmp_path / "weights.bin").write_bytes(weights)
    assert collect(path, [Request("y")], Memory(DATA)).model_sha256 != first


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_shards_merge_to_the_same_bytes(model: Path, whole: Statistics, tmp_path: Path, shards: int) -> None:
    parts = []
    for index in reversed(range(shards)):
        part = collect(model, REQUESTS, Memory(DATA), CollectOptions(shard=(index, shards)))
        part.save(tmp_path / "part.safetensors")
        parts.append(Statistics.load(tmp_path / "part.safetensors"))
    merged = Statistics.merge(parts)
    assert merged.samples == whole.samples
    assert merged.seconds is None
    assert file_bytes(merged, tmp_path) == file_bytes(whole, tmp_path)


@given(order=st.permutations(range(5)), cut=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_any_split_and_order_give_the_same_bytes(
    order: list[int], cut: int, model: Path, whole: Statistics, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ordered = [DATA[index] for index in order]
    parts = [collect(model, REQUESTS, Memory(some)) for some in (ordered[:cut], ordered[cut:])]
    folder = tmp_path_factory.mktemp("split")
    assert file_bytes(Statistics.merge(parts), folder) == file_bytes(whole, folder)


def test_saving_and_loading(whole: Statistics, tmp_path: Path) -> None:
    saved = file_bytes(whole, tmp_path)
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    assert file_bytes(loaded, tmp_path) == saved
    assert loaded.requests == whole.requests
    assert loaded.samples == 12
    assert loaded["turned"] is loaded["act"]
    assert loaded.seconds is None
    assert list(tmp_path.iterdir()) == [tmp_path / "statistics.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "empty", "noise", "other", "format"])
def test_files_that_hold_no_statistics_are_refused(whole: Statistics, tmp_path: Path, damage: str) -> None:
    from safetensors.numpy import save

    path = tmp_path / "s.safetensors"
    content = {
        "empty": b"",
        "noise": b"\x07" * 999,
        "other": save({"a.b": np.zeros(3)}, metadata={"statistics": "[1"}),
        "format": save({}, metadata={"statistics": json.dumps({"format": 99})}),
    }
    if damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(DataError, match=r"statistics|format") as caught:
        Statistics.load(path)
    assert str(path) in caught.value.where


def test_unwritable_places_are_store_errors(whole: Statistics, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        whole.save(tmp_path / "file" / "s.safetensors")


def test_merging_what_does_not_belong_together_is_refused(model: Path, whole: Statistics, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no statistics"):
        Statistics.merge([])
    with pytest.raises(DataError, match="different requests") as caught:
        Statistics.merge([whole, collect(model, REQUESTS[:-1], Memory(DATA))])
    assert "w1" in caught.value.where
    other = two_layers(tmp_path / "other.onnx", batch=3)
    with pytest.raises(DataError, match="different models"):
        Statistics.merge([whole, collect(other, REQUESTS, Memory(batches(3)))])


def test_padding_positions_are_left_out(model: Path) -> None:
    keep = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    data = [{**DATA[0], "mask": keep}, {**DATA[2], "mask": np.ones((3, 4), np.int64)}]

    class Masked(Memory):
        """The model has no mask input, so it is only seen by the collector."""

    proto_path = with_mask_input(model)
    found = collect(proto_path, REQUESTS[:6], Masked(data), CollectOptions(mask="mask"))
    first = numpy_tensors(model, DATA[0]["x"])["up"][keep != 0]
    second = numpy_tensors(model, DATA[2]["x"])["up"]
    assert found["up"].count == first.size + second.size
    assert found["up"].max == pytest.approx(max(first.max(), second.max()), rel=1e-6)
    assert found["turned"].count == found["up"].count
    with pytest.raises(DataError, match="no such input"):
        collect(model, REQUESTS[:1], Memory(DATA), CollectOptions(mask="attention_mask"))


def with_mask_input(path: Path) -> Path:
    import onnx

    proto = onnx.load(path)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.INT64, ["batch", "seq"]))
    masked = path.with_name("masked.onnx")
    onnx.save(proto, masked)
    return masked


def test_no_samples(model: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        collect(model, REQUESTS, Memory([]))
    with pytest.raises(DataError, match="shard has no batches"):
        collect(model, REQUESTS, Memory(DATA), CollectOptions(shard=(7, 8)))
    with pytest.raises(DataError, match="no shard 3 of 3"):
        collect(model, REQUESTS, Memory(DATA), CollectOptions(shard=(3, 3)))


def test_unknown_tensors_name_the_nearest(model: Path) -> None:
    with pytest.raises(ModelError, match="no such tensor") as caught:
        collect(model, [Request("turnt")], Memory(DATA))
    assert "turned" in caught.value.fix
    with pytest.raises(DataError, match="no statistic 'sketchy'"):
        collect(model, [Request("y", "sketchy")], Memory(DATA))


@pytest.mark.parametrize("tensor", ["dims", "heads"])
def test_tensors_without_floats_are_refused(model: Path, tensor: str) -> None:
    with pytest.raises(DataError, match="int64") as caught:
        collect(model, [Request(tensor)], Memory(DATA))
    assert tensor in caught.value.where


def test_nan_and_infinity_are_refused_by_name(model: Path) -> None:
    data = [{"x": np.abs(DATA[0]["x"])}, {"x": np.abs(DATA[2]["x"])}]
    data[1]["x"][0, 0, :2] = [0, -1]  # log gives -inf and NaN
    with pytest.raises(DataError, match="2 NaN or infinite") as caught:
        collect(model, [Request("log")], Memory(data))
    assert "tensor log" in caught.value.where
    lenient = collect(model, [Request("log")], Memory(data), CollectOptions(refuse_nonfinite=False))
    assert lenient["log"].nonfinite == 2
    with pytest.raises(DataError, match="2 NaN or infinite"):
        lenient["log"].distribution()


def test_a_channel_axis_that_does_not_exist_names_the_tensor(model: Path) -> None:
    with pytest.raises(DataError, match="no axis 5") as caught:
        collect(model, [Request("y", "channel_range", 5)], Memory(DATA))
    assert "tensor y" in caught.value.where


def test_data_that_does_not_fit_is_an_engine_error(model: Path) -> None:
    with pytest.raises(EngineError, match="failed while running"):
        collect(model, [Request("y")], Memory([{"x": np.zeros((2, 4, 7), np.float32)}]))
    with pytest.raises(DataError, match="does not provide"):
        collect(model, [Request("x")], Memory([{"z": np.zeros((2, 4, 7), np.float32)}]))


def test_a_tensor_that_was_not_collected_is_named(whole: Statistics) -> None:
    assert isinstance(whole.sketch("y"), Sketch)
    with pytest.raises(DataError, match="Nothing was collected") as caught:
        whole.sketch("log")
    assert "log" in caught.value.where
    with pytest.raises(KeyError):
        whole["log"]
