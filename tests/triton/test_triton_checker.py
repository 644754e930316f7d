"""Every rule of the checker, each shown by a repository in which one thing was broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from triton_models import SAMPLE, tokens_model
from tritonclient.grpc import model_config_pb2 as pb

from pipeline.recipe import DynamicBatching, TritonConfig
from pipeline.triton.checker import check_repository
from pipeline.triton.problem import RULES, Problem
from pipeline.triton.repository import write_repository
from pipeline.triton.served import onnx_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    path = tokens_model(folder / "src" / "m.onnx", external=True)
    asked = TritonConfig(max_batch_size=8, dynamic_batching=DynamicBatching(preferred_batch_sizes=(4,)))
    write_repository(folder / "repo", model=onnx_model(path, name="tiny", sample=SAMPLE), config=asked)
    return folder / "repo"


@pytest.fixture
def repo(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "repo"))


def edit(change: Callable[[pb.ModelConfig], object]) -> Callable[[Path], None]:
    def apply(repo: Path) -> None:
        path = repo / "tiny" / "config.pbtxt"
        config = text_format.Parse(path.read_text(), pb.ModelConfig())
        change(config)
        path.write_text(text_format.MessageToString(config))

    return apply


def rewrite(old: str, new: str) -> Callable[[Path], None]:
    def apply(repo: Path) -> None:
        path = repo / "tiny" / "config.pbtxt"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return apply


def file(action: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda repo: action(repo / "tiny") and None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def set_dims(field: object, dims: list[int]) -> None:
    del field.dims[:]  # type: ignore[attr-defined]
    field.dims.extend(dims)  # type: ignore[attr-defined]


def batch_off(config: pb.ModelConfig) -> None:
    """A consistent configuration without batching that still has dynamic_batching."""
    config.max_batch_size = 0
    del config.dynamic_batching.preferred_batch_size[:]
    del config.model_warmup[:]
    for tensor, dims in zip((*config.input, *config.output), ([-1, -1], [-1], [-1, -1, 8], [-1]), strict=True):
        tensor.ClearField("reshape")
        set_dims(tensor, dims)


MUTATIONS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("repository", "error", lambda repo: shutil.rmtree(repo / "tiny")),
    ("repository", "error", shutil.rmtree),
    ("config-missing", "error", file(lambda d: (d / "config.pbtxt").unlink())),
    ("config-parse", "error", rewrite("backend:", "back_end:")),
    ("config-parse", "error", rewrite("TYPE_INT64", "TYPE_INT65")),
    ("config-parse", "error", file(lambda d: (d / "config.pbtxt").write_bytes(b"\xff\xfe\x00"))),
    ("name", "error", edit(lambda c: setattr(c, "name", "other"))),
    ("name", "error", lambda repo: (repo / "tiny").rename(repo / "other") and None),
    ("backend", "error", edit(lambda c: setattr(c, "backend", "onnx"))),
    ("version", "error", file(lambda d: shutil.rmtree(d / "1"))),
    ("version", "error", edit(lambda c: c.version_policy.specific.versions.append(7))),
    ("version-ignored", "warning", file(lambda d: (d / "01").mkdir())),
    ("version-ignored", "warning", file(lambda d: (d / "v2").mkdir())),
    ("engine-missing", "error", file(lambda d: (d / "1" / "model.onnx").rename(d / "1" / "engine.onnx"))),
    ("engine-missing", "error", file(lambda d: (d / "2").mkdir())),
    ("engine-unreadable", "error", file(lambda d: truncate(d / "1" / "model.onnx"))),
    ("file-changed", "error", file(lambda d: truncate(d / "1" / "model.onnx"))),
    ("external-data", "error", file(lambda d: (d / "1" / "m.onnx.data").unlink())),
    ("external-data", "error", file(lambda d: truncate(d / "1" / "m.onnx.data"))),
    ("tensor-names", "error", edit(lambda c: setattr(c.input[0], "name", "input_ids"))),
    ("tensor-names", "error", edit(lambda c: c.input.pop())),
    ("tensor-names", "error", edit(lambda c: setattr(c.output[0], "name", "logits"))),
    ("data-type", "error", edit(lambda c: setattr(c.output[0], "data_type", pb.TYPE_FP16))),
    ("dims", "error", edit(lambda c: set_dims(c.output[0], [-1, -1]))),
    ("dims", "error", edit(lambda c: set_dims(c.output[0], [-1, 9]))),
    ("dims", "error", edit(lambda c: set_dims(c.output[0], [8]))),
    ("dims", "error", edit(lambda c: set_dims(c.output[0], [0, 8]))),
    ("dims", "error", edit(lambda c: c.input[1].ClearField("dims"))),
    ("dims", "error", edit(lambda c: c.input[1].ClearField("reshape"))),
    ("max-batch-size", "error", edit(lambda c: setattr(c, "max_batch_size", -1))),
    ("dynamic-batching", "warning", edit(batch_off)),
    ("preferred-batch", "error", edit(lambda c: setattr(c, "max_batch_size", 2))),
    ("preferred-batch", "error", edit(lambda c: c.dynamic_batching.preferred_batch_size.append(0))),
    ("instances", "error", edit(lambda c: setattr(c.instance_group[0], "count", 0))),
    ("warm-up-inputs", "error", edit(lambda c: c.model_warmup[0].inputs.pop("gain"))),
    ("warm-up-inputs", "error", edit(lambda c: c.model_warmup[0].inputs["extra"].CopyFrom(pb.ModelWarmup.Input()))),
    ("warm-up-type", "error", edit(lambda c: setattr(c.model_warmup[0].inputs["ids"], "data_type", pb.TYPE_INT32))),
    ("warm-up-dims", "error", edit(lambda c: set_dims(c.model_warmup[0].inputs["ids"], [-1]))),
    ("warm-up-dims", "error", edit(lambda c: set_dims(c.model_warmup[0].inputs["ids"], [2, 2]))),
    ("warm-up-batch", "error", edit(lambda c: setattr(c.model_warmup[0], "batch_size", 9))),
    ("warm-up-batch", "warning", edit(lambda c: setattr(c.model_warmup[0], "batch_size", 0))),
    ("warm-up-data", "warning", edit(lambda c: setattr(c.model_warmup[0].inputs["ids"], "random_data", True))),
    (
        "default-file",
        "error",
        edit(lambda c: (c.cc_model_filenames.update({"8.0": "model.onnx"}), setattr(c, "default_model_filename", "x"))),
    ),
]


def test_the_repository_as_written_has_no_problem(repo: Path) -> None:
    assert check_repository(repo) == []


@pytest.mark.parametrize(("rule", "severity", "mutate"), MUTATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_each_mutation_is_found(repo: Path, rule: str, severity: str, mutate: Callable[[Path], None]) -> None:
    mutate(repo)
    found = check_repository(repo)
    assert (rule, severity) in {(p.rule, p.severity) for p in found}, [str(p) for p in found]
    assert all(p.where and p.message and p.fix for p in found)
    assert str(repo.parent) not in "".join(p.where for p in found if p.rule != "repository")


def test_one_mutation_gives_few_problems(repo: Path) -> None:
    edit(lambda c: setattr(c.output[0], "data_type", pb.TYPE_FP16))(repo)
    assert [p.rule for p in check_repository(repo)] == ["data-type"]


def test_fixed_batch_under_batching(tmp_path: Path) -> None:
    path = tokens_model(tmp_path / "m.onnx", batch=2)
    folder = write_repository(tmp_path / "repo", model=onnx_model(path, name="tiny"), config=TritonConfig())
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    config.max_batch_size = 8
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
    assert "max-batch-size" in {p.rule for p in check_repository(tmp_path / "repo")}


def test_warm_up_that_the_engine_cannot_run(tmp_path: Path) -> None:
    """Two inputs whose open dimensions must agree: shapes that fit the configuration and still fail."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        "sum",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", f"{n}_size"]) for n in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, ["n", None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    served = onnx_model(tmp_path / "m.onnx", name="sum", sample={"a": (1, 3), "b": (1, 4)})
    write_repository(tmp_path / "repo", model=served, config=TritonConfig())
    (problem,) = check_repository(tmp_path / "repo")
    assert (problem.rule, problem.severity) == ("warm-up-runs", "error")


def test_every_rule_has_a_mutation() -> None:
    from test_triton_at_load import MUTATIONS as AT_LOAD
    from test_triton_ensemble import MUTATIONS as OF_ENSEMBLES
    from test_triton_plans import MUTATIONS as OF_PLANS
    from test_triton_serving_keys import MUTATIONS as OF_KEYS

    shown = {rule for rule, _, _ in (*MUTATIONS, *OF_KEYS, *OF_PLANS, *AT_LOAD)} | {rule for rule, _ in OF_ENSEMBLES}
    assert shown | {"warm-up-runs"} == set(RULES)


def test_a_rule_that_is_not_in_the_list_cannot_be_reported() -> None:
    with pytest.raises(ValueError, match="no such rule"):
        Problem(rule="novel", severity="error", where="", message="", fix="")


def test_only_the_newest_version_is_compared(repo: Path) -> None:
    """The default version policy serves the latest; an older one may have other shapes."""
    shutil.copytree(repo / "tiny" / "1", repo / "tiny" / "2")
    truncate(repo / "tiny" / "1" / "model.onnx")
    assert check_repository(repo) == []
    edit(lambda c: c.version_policy.all.SetInParent())(repo)
    assert {p.rule for p in check_repository(repo)} == {"engine-unreadable", "file-changed"}
