from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from triton_models import SAMPLE, tokens_model
from tritonclient.grpc import model_config_pb2 as pb

from pipeline import notices
from pipeline.errors import MissingError, PublishError, StoreError
from pipeline.recipe import DynamicBatching, TritonConfig
from pipeline.triton.checker import check_repository
from pipeline.triton.config import configured
from pipeline.triton.repository import republish, write_repository
from pipeline.triton.rollback import rollback
from pipeline.triton.served import ServedModel, onnx_model
from pipeline.types import TensorInfo


def read(folder: Path) -> pb.ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), pb.ModelConfig())


def served(path: Path, **options: object) -> ServedModel:
    return onnx_model(path, **({"name": "tiny", "sample": SAMPLE} | options))  # type: ignore[arg-type]


def test_config_says_what_was_asked(tmp_path: Path) -> None:
    model = served(tokens_model(tmp_path / "m.onnx"), threads=3)
    asked = TritonConfig(
        max_batch_size=16,
        instances=2,
        dynamic_batching=DynamicBatching(max_queue_delay_us=500, preferred_batch_sizes=(8, 4)),
    )
    config = read(write_repository(tmp_path / "repo", model=model, config=asked))
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 16)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [
        ("ids", pb.TYPE_INT64, [-1]),
        ("gain", pb.TYPE_FP32, [1]),
    ]
    # ONNX Runtime infers 8 for the declared symbol "width", and the backend demands what ONNX Runtime reports.
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [
        ("hidden", pb.TYPE_FP32, [-1, 8]),
        ("score", pb.TYPE_FP32, [1]),
    ]
    assert [t.HasField("reshape") for t in (*config.input, *config.output)] == [False, True, False, True]
    assert list(config.input[1].reshape.shape) == []
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert [(g.kind, g.count) for g in config.instance_group] == [(pb.ModelInstanceGroup.KIND_CPU, 2)]
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    assert not config.HasField("version_policy")
    (warmup,) = config.model_warmup
    assert warmup.batch_size == 1
    assert {n: (i.data_type, list(i.dims), i.zero_data) for n, i in warmup.inputs.items()} == {
        "ids": (pb.TYPE_INT64, [16], True),
        "gain": (pb.TYPE_FP32, [1], True),
    }


def test_written_repository_passes_the_checker_and_computes_the_same(tmp_path: Path) -> None:
    source = tokens_model(tmp_path / "src" / "odd name.onnx", external=True)
    folder = write_repository(tmp_path / "repo", model=served(source), config=TritonConfig())
    assert check_repository(tmp_path / "repo") == []
    assert sorted(p.name for p in (folder / "1").iterdir()) == ["manifest.json", "model.onnx", "odd name.onnx.data"]
    feeds = {"ids": np.array([[1, 2], [3, 4]]), "gain": np.array([1, 2], np.float32)}
    for one, other in zip(
        ort.InferenceSession(source).run(None, feeds),
        ort.InferenceSession(folder / "1" / "model.onnx").run(None, feeds),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert not [p for p in (tmp_path / "repo").iterdir() if p.name.startswith(".")]


def test_no_dynamic_batching_and_no_threads_leave_the_fields_out(tmp_path: Path) -> None:
    model = served(tokens_model(tmp_path / "m.onnx"))
    config = read(write_repository(tmp_path / "repo", model=model, config=TritonConfig(dynamic_batching=None)))
    assert not config.HasField("dynamic_batching")
    assert not config.parameters


def test_fixed_batch_turns_batching_off_and_says_so(tmp_path: Path) -> None:
    model = served(tokens_model(tmp_path / "m.onnx", batch=2), sample={"ids": (2, 5)})
    with notices.collecting() as said:
        config = read(write_repository(tmp_path / "repo", model=model, config=TritonConfig()))
    assert [n.code for n in said] == ["batching-off"]
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [list(t.dims) for t in config.input] == [[2, -1], [2]]
    assert {n: list(i.dims) for n, i in config.model_warmup[0].inputs.items()} == {"ids": [2, 5], "gain": [2]}
    assert check_repository(tmp_path / "repo") == []


def test_max_batch_size_zero_keeps_the_batch_dimension(tmp_path: Path) -> None:
    model = served(tokens_model(tmp_path / "m.onnx"))
    config = read(write_repository(tmp_path / "repo", model=model, config=TritonConfig(max_batch_size=0)))
    assert [list(t.dims) for t in config.input] == [[-1, -1], [-1]]
    assert check_repository(tmp_path / "repo") == []


def test_scalar_input_is_served_without_batching(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["y"])],
        "scaled",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("k", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    model = onnx_model(tmp_path / "m.onnx", name="scaled", sample={"x": (2, 3)})
    config = read(write_repository(tmp_path / "repo", model=model, config=TritonConfig()))
    assert (config.max_batch_size, [list(t.dims) for t in config.input]) == (0, [[-1, 3], [1]])
    assert check_repository(tmp_path / "repo") == []


def test_open_dimensions_without_a_sample_give_no_warm_up(tmp_path: Path) -> None:
    model = served(tokens_model(tmp_path / "m.onnx"), sample=None)
    with notices.collecting() as said:
        config = read(write_repository(tmp_path / "repo", model=model, config=TritonConfig()))
    assert [n.code for n in said] == ["no-warm-up"]
    assert not config.model_warmup


def test_same_model_same_text(tmp_path: Path) -> None:
    model = served(tokens_model(tmp_path / "m.onnx"), threads=2)
    assert configured(model, TritonConfig()) == configured(model, TritonConfig())
    assert str(tmp_path) not in configured(model, TritonConfig()).text


def test_publishing_again_changes_nothing_and_a_new_engine_is_a_new_version(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    first = tokens_model(tmp_path / "a.onnx")
    folder = write_repository(root, model=served(first), config=TritonConfig())
    write_repository(root, model=served(first), config=TritonConfig(max_batch_size=4))
    assert sorted(p.name for p in folder.iterdir()) == [".configs", "1", "config.pbtxt"]
    assert read(folder).max_batch_size == 4
    old = (folder / "1" / "model.onnx").read_bytes()
    second = tokens_model(tmp_path / "b.onnx", seed=1)
    write_repository(root, model=served(second), config=TritonConfig())
    assert sorted(p.name for p in folder.iterdir()) == [".configs", "1", "2", "config.pbtxt"]
    assert (folder / "1" / "model.onnx").read_bytes() == old
    assert (folder / "2" / "model.onnx").read_bytes() == second.read_bytes()


def test_a_rollback_serves_the_version_before_with_its_configuration(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    sizes = (4, 8, 16)
    for seed, size in enumerate(sizes):
        model = served(tokens_model(tmp_path / f"{seed}.onnx", seed=seed))
        folder = write_repository(root, model=model, config=TritonConfig(max_batch_size=size))
    config = (folder / ".configs/2.pbtxt").read_bytes()
    assert rollback(root) == {"tiny": (3, 2)}
    assert sorted(p.name for p in folder.iterdir()) == [".configs", ".rolled_back", "1", "2", "config.pbtxt"]
    assert (read(folder).max_batch_size, (folder / "config.pbtxt").read_bytes()) == (8, config)
    assert [p for p in check_repository(root) if p.severity == "error"] == []
    # A number is not used twice: clients and metrics would take one for the other.
    write_repository(root, model=served(tokens_model(tmp_path / "3.onnx", seed=3)), config=TritonConfig())
    assert (folder / "4").is_dir()
    assert rollback(folder) == {"tiny": (4, 2)}
    assert rollback(folder) == {"tiny": (2, 1)}
    assert read(folder).max_batch_size == 4
    with pytest.raises(PublishError, match="tiny has no version before 1"):
        rollback(root)
    with pytest.raises(PublishError, match="There is no model here"):
        rollback(tmp_path)


def test_a_rollback_touches_no_model_unless_all_can_go_back(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    for seed in (0, 1):
        write_repository(root, model=served(tokens_model(tmp_path / f"{seed}.onnx", seed=seed)), config=TritonConfig())
    single = served(tokens_model(tmp_path / "2.onnx"), name="single")
    write_repository(root, model=single, config=TritonConfig())
    with pytest.raises(PublishError, match="single has no version before 1"):
        rollback(root)
    assert (root / "tiny/2").is_dir()
    (root / "tiny/.configs/1.pbtxt").unlink()
    with notices.collecting() as said:
        assert rollback(root / "tiny") == {"tiny": (2, 1)}
    assert [n.code for n in said] == ["config-kept"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "repo"
    folder = write_repository(root, model=served(tokens_model(tmp_path / "a.onnx")), config=TritonConfig())
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(StoreError, match="No space left"):
        write_repository(root, model=served(tokens_model(tmp_path / "b.onnx", seed=1)), config=TritonConfig())
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    assert [p.name for p in root.iterdir()] == ["tiny"]


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 129, "naïve"])
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    model = served(tokens_model(tmp_path / "m.onnx"), name=name)
    with pytest.raises(PublishError) as caught:
        write_repository(tmp_path / "repo", model=model, config=TritonConfig())
    assert caught.value.where == "triton.name"
    assert not (tmp_path / "repo").exists()


def test_preferred_batch_beyond_the_maximum_is_refused(tmp_path: Path) -> None:
    model = served(tokens_model(tmp_path / "m.onnx"))
    asked = TritonConfig(max_batch_size=4, dynamic_batching=DynamicBatching(preferred_batch_sizes=(4, 8)))
    with pytest.raises(PublishError, match=r"\[8\]"):
        configured(model, asked)


def test_types_and_backends_that_triton_lacks_are_refused(tmp_path: Path) -> None:
    import ml_dtypes

    info = TensorInfo(name="x", dtype=np.dtype(ml_dtypes.bfloat16), shape=("n", 2))
    parts = {"name": "m", "engine": tmp_path / "m.onnx", "inputs": (info,), "outputs": (info,)}
    with pytest.raises(PublishError, match="bfloat16"):
        configured(ServedModel(backend="onnxruntime", **parts), TritonConfig())  # type: ignore[arg-type]
    with pytest.raises(PublishError, match="tensorrt"):
        configured(ServedModel(backend="tensorrt", **parts), TritonConfig())  # type: ignore[arg-type]


def test_zero_size_dimension_is_refused(tmp_path: Path) -> None:
    info = TensorInfo(name="x", dtype=np.dtype("float32"), shape=("n", 0))
    model = ServedModel(name="m", backend="onnxruntime", engine=tmp_path / "m.onnx", inputs=(info,), outputs=(info,))
    with pytest.raises(PublishError, match="size 0"):
        configured(model, TritonConfig())


def test_leftovers_of_a_killed_run_go_away(tmp_path: Path) -> None:
    left = tmp_path / "repo" / ".tiny.tmp" / "1"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"half")
    write_repository(tmp_path / "repo", model=served(tokens_model(tmp_path / "m.onnx")), config=TritonConfig())
    assert [p.name for p in (tmp_path / "repo").iterdir()] == ["tiny"]
    assert check_repository(tmp_path / "repo") == []


def test_without_tritonclient_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = served(tokens_model(tmp_path / "m.onnx"))
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(MissingError) as caught:
        write_repository(tmp_path / "repo", model=model, config=TritonConfig())
    assert "'.[triton]'" in caught.value.fix
    assert not (tmp_path / "repo").exists()


def test_republishing_takes_the_newest_version_and_what_it_names_and_no_older_one(tmp_path: Path) -> None:
    model = tmp_path / "from" / "m"
    for name in ("1/model.onnx", "2/model.onnx", "2/a/b", ".configs/2.pbtxt", ".rolled_back/3/model.onnx", "warmup/x"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    (model / "config.pbtxt").write_text("name: 'm'")
    for _ in range(2):  # the same again is no new version
        out = republish(model, tmp_path / "to")
        assert {p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.is_file()} == {
            "config.pbtxt": "name: 'm'",
            ".configs/1.pbtxt": "name: 'm'",
            "1/model.onnx": "2/model.onnx",
            "1/a/b": "2/a/b",
            "warmup/x": "warmup/x",
        }
