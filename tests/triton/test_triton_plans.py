"""TensorRT engines: every profile is used and warmed up with a real sample, CUDA graphs are exact, and the manifest says what they need.

No engine is opened here: the files are stand-ins, and what is known of them is what their builder wrote down.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from triton_models import tokens_model
from tritonclient.grpc import model_config_pb2 as pb

from engines.tensorrt.profiles import Profile, ShapeRange
from pipeline.errors import PublishError
from pipeline.recipe import TritonConfig
from pipeline.triton.checker import check_repository
from pipeline.triton.repository import write_repository
from pipeline.triton.served import Plan, ServedModel, onnx_model

ROW = {"ids": np.arange(24, dtype=np.int64)[None] % 10, "gain": np.array([1.5], np.float32)}


def profile(batch: tuple[int, int, int], tokens: tuple[int, int, int]) -> Profile:
    ends = zip(("min", "opt", "max"), batch, tokens, strict=True)
    shapes = {end: ((b, t), (b,)) for end, b, t in ends}
    return {name: ShapeRange(**{end: both[index] for end, both in shapes.items()}) for index, name in enumerate(ROW)}


SHORT, LONG = profile((1, 8, 8), (1, 16, 16)), profile((1, 4, 8), (17, 64, 128))
ASKED = TritonConfig(max_batch_size=8, cuda_graphs=(1, 8))


def served(folder: Path, *, profiles: tuple[Profile, ...] = (SHORT, LONG), **options: object) -> ServedModel:
    path = tokens_model(folder / "m.onnx")
    engines = {}
    for capability, target in (("8.0", "a100"), ("8.9", "l4")):
        file = folder / target / "model.plan"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(f"engine of {target}".encode())
        engines[capability] = Plan(file=file, target=target, tensorrt="10.13.2.6", profiles=profiles)
    described = onnx_model(path, name="tiny", row=ROW)
    return replace(described, backend="tensorrt", engines=engines, **options)  # type: ignore[arg-type]


def read(repo: Path) -> pb.ModelConfig:
    return text_format.Parse((repo / "tiny/config.pbtxt").read_text(), pb.ModelConfig())


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    write_repository(tmp_path / "repo", model=served(tmp_path), config=ASKED)
    return tmp_path / "repo"


def edit(change: Callable[[pb.ModelConfig], object]) -> Callable[[Path], None]:
    def apply(repo: Path) -> None:
        config = read(repo)
        change(config)
        (repo / "tiny/config.pbtxt").write_text(text_format.MessageToString(config))

    return apply


def dims(field: object, sizes: list[int]) -> None:
    del field.dims[:]  # type: ignore[attr-defined]
    field.dims.extend(sizes)  # type: ignore[attr-defined]


def data_of(repo: Path, index: int, name: str) -> Path:
    return repo / "tiny/warmup" / read(repo).model_warmup[index].inputs[name].input_data_file


def spec(config: pb.ModelConfig, index: int = 0) -> object:
    return config.optimization.cuda.graph_spec[index]


MUTATIONS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("manifest", "warning", lambda repo: (repo / "tiny/1/manifest.json").unlink()),
    ("manifest", "error", lambda repo: (repo / "tiny/1/manifest.json").write_text("{") and None),
    ("manifest", "error", lambda repo: (repo / "tiny/1/manifest.json").write_text('{"profiles": {"a": [1]}}') and None),
    ("file-changed", "error", lambda repo: (repo / "tiny/1/sm80.plan").write_bytes(b"another") and None),
    ("profile-batch", "error", edit(lambda c: setattr(c, "max_batch_size", 9))),
    ("profile-dims", "error", edit(lambda c: dims(c.input[0], [129]))),
    ("profile-dims", "error", edit(lambda c: dims(c.input[0], [-1, -1]))),
    ("profile-dims", "error", edit(lambda c: setattr(c.input[0], "name", "tokens"))),
    ("instance-profiles", "error", edit(lambda c: c.instance_group[0].profile.append("2"))),
    ("instance-profiles", "warning", edit(lambda c: c.instance_group[0].ClearField("profile"))),
    ("cuda-graphs", "error", edit(lambda c: setattr(spec(c), "batch_size", 9))),
    ("cuda-graphs", "error", edit(lambda c: spec(c).input.pop("gain"))),  # type: ignore[attr-defined]
    ("cuda-graphs", "error", edit(lambda c: spec(c).input["ids"].dim.append(3))),  # type: ignore[attr-defined]
    ("cuda-graphs", "warning", edit(lambda c: c.optimization.cuda.ClearField("graph_spec"))),
    ("warm-up-profile", "error", edit(lambda c: dims(c.model_warmup[1].inputs["ids"], [200]))),
    ("warm-up-profile", "warning", edit(lambda c: c.model_warmup.pop())),
    ("warm-up-data", "error", lambda repo: data_of(repo, 0, "ids").unlink()),
    ("warm-up-data", "error", lambda repo: data_of(repo, 0, "ids").write_bytes(b"123") and None),
]


def test_every_profile_is_named_warmed_up_and_captured(repo: Path) -> None:
    assert check_repository(repo) == []
    config = read(repo)
    assert list(config.instance_group[0].profile) == ["0", "1"]
    # 24 tokens: cut to the 16 that the first profile takes, whole in the second, which takes 17 to 128.
    warmed = [(w.name, w.batch_size, list(w.inputs["ids"].dims)) for w in config.model_warmup]
    assert warmed == [("profile 0: sample", 8, [16]), ("profile 1: sample", 4, [24])]
    for index, tokens in ((0, 16), (1, 24)):
        np.testing.assert_array_equal(
            np.frombuffer(data_of(repo, index, "ids").read_bytes(), "<i8"), ROW["ids"][0, :tokens]
        )
        np.testing.assert_array_equal(np.frombuffer(data_of(repo, index, "gain").read_bytes(), "<f4"), ROW["gain"])
    graphs = [
        (s.batch_size, list(s.input["ids"].dim), s.HasField("graph_lower_bound"))
        for s in config.optimization.cuda.graph_spec
    ]
    assert graphs == [(1, [16], False), (1, [64], False), (8, [16], False), (8, [64], False)]
    assert config.optimization.cuda.graphs


def test_a_sample_smaller_than_a_profile_s_least_leaves_zeros_of_its_usual_shape(tmp_path: Path) -> None:
    model = served(tmp_path, profiles=(SHORT, profile((1, 4, 8), (100, 110, 128))))
    write_repository(tmp_path / "repo", model=model, config=ASKED)
    warmup = read(tmp_path / "repo").model_warmup[1]
    assert (warmup.name, list(warmup.inputs["ids"].dims), warmup.inputs["ids"].zero_data) == (
        "profile 1: zeros",
        [110],
        True,
    )
    assert check_repository(tmp_path / "repo") == []


def test_one_profile_needs_no_names(tmp_path: Path) -> None:
    write_repository(tmp_path / "repo", model=served(tmp_path, profiles=(LONG,)), config=TritonConfig(max_batch_size=8))
    config = read(tmp_path / "repo")
    assert not config.instance_group[0].profile
    assert not config.HasField("optimization")
    assert [w.name for w in config.model_warmup] == ["sample"]
    assert check_repository(tmp_path / "repo") == []


def test_the_manifest_says_what_the_version_needs(tmp_path: Path, repo: Path) -> None:
    manifest = json.loads((repo / "tiny/1/manifest.json").read_text())
    assert manifest["requires"] == {
        "compute_capability": ["8.0", "8.9"],
        "tensorrt": "==10.13.2.6",
        "triton": "a release with TensorRT 10.13.2.6",
    }
    assert manifest["targets"] == {"sm80.plan": "a100", "sm89.plan": "l4"}
    assert manifest["profiles"]["sm80.plan"][1]["ids"] == {"min": [1, 17], "opt": [4, 64], "max": [8, 128]}
    model = served(tmp_path)
    wider = {c: replace(plan, version_compatible=True) for c, plan in model.engines.items()}
    write_repository(tmp_path / "wider", model=replace(model, engines=wider), config=ASKED)
    needs = json.loads((tmp_path / "wider/tiny/1/manifest.json").read_text())["requires"]
    assert needs["tensorrt"] == ">=10.13.2.6"
    assert needs["backend_config"] == "tensorrt,version-compatible=true"


def test_an_onnx_model_s_manifest_names_its_opset(tmp_path: Path) -> None:
    model = onnx_model(tokens_model(tmp_path / "m.onnx", external=True), name="tiny", row=ROW)
    write_repository(tmp_path / "repo", model=model, config=TritonConfig())
    manifest = json.loads((tmp_path / "repo/tiny/1/manifest.json").read_text())
    assert (manifest["requires"]["onnx_ir"], manifest["requires"]["opsets"]) == (10, {"ai.onnx": 21})
    assert sorted(manifest["files"]) == ["m.onnx.data", "model.onnx"]
    assert check_repository(tmp_path / "repo") == []


@pytest.mark.parametrize(("rule", "severity", "mutate"), MUTATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_each_mutation_is_found(repo: Path, rule: str, severity: str, mutate: Callable[[Path], None]) -> None:
    mutate(repo)
    found = check_repository(repo)
    assert (rule, severity) in {(p.rule, p.severity) for p in found}, [str(p) for p in found]
    assert all(p.where and p.message and p.fix for p in found)


@pytest.mark.parametrize("batch", [9, 64])
def test_a_graph_that_cannot_be_captured_is_refused(tmp_path: Path, batch: int) -> None:
    with pytest.raises(PublishError, match=f"batch of {batch}"):
        write_repository(
            tmp_path / "repo", model=served(tmp_path), config=TritonConfig(max_batch_size=32, cuda_graphs=(1, batch))
        )


def test_engines_with_different_profiles_are_refused(tmp_path: Path) -> None:
    model = served(tmp_path)
    other = {**model.engines, "8.9": replace(model.engines["8.9"], profiles=(SHORT,))}
    with pytest.raises(PublishError, match="different optimization profiles") as caught:
        write_repository(tmp_path / "repo", model=replace(model, engines=other), config=ASKED)
    assert caught.value.where == "a100, l4"
