"""A GPU's graph published without an engine: the server is to build it. What is written here was run on no GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from engines.target import target
from pipeline.build import build
from pipeline.notices import collecting
from pipeline.publishing import publish_builds
from pipeline.recipe import TritonConfig, parse
from pipeline.stages.engine import Engine
from pipeline.stages.publishing import _at_load
from pipeline.triton.checker import check_repository
from tests.quantize.graphs import mlp
from tests.quantize.test_quantize_gptq import correlated
from tests.triton.test_triton_publish_builds import on_gpu

NAME = "tiny-gpu-int8"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("at_load")
    path, _ = mlp(folder / "m.onnx")
    np.savez(folder / "data.npz", x=correlated(32, 32).astype(np.float32))
    recipe = parse(
        {
            "name": "tiny",
            "source": {"onnx": str(path)},
            "calibration": {"data": str(folder / "data.npz"), "method": "minmax"},
            "targets": ["cpu", "a100", "a10"],
            "triton": {"build_at_load": True, "max_batch_size": 16, "gpus": [1]},
        }
    )
    result = build(recipe, folder / "build")
    assert result.report is not None
    assert "built-at-load" in {n["code"] for n in result.report["notices"]}
    return folder / "build"


@pytest.fixture
def repo(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built / "triton", tmp_path / "repo"))


def read(repo: Path) -> pb.ModelConfig:
    return text_format.Parse((repo / NAME / "config.pbtxt").read_text(), pb.ModelConfig())


def edit(change: Callable[[pb.ModelConfig], object]) -> Callable[[Path], None]:
    def apply(repo: Path) -> None:
        config = read(repo)
        change(config)
        (repo / NAME / "config.pbtxt").write_text(text_format.MessageToString(config))

    return apply


def accelerator(config: pb.ModelConfig) -> pb.ModelOptimizationPolicy.ExecutionAccelerators.Accelerator:
    return config.optimization.execution_accelerators.gpu_execution_accelerator[0]


def set_key(key: str, value: str) -> Callable[[Path], None]:
    return edit(lambda c: accelerator(c).parameters.update({key: value}))


MUTATIONS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("accelerator", "error", edit(lambda c: setattr(accelerator(c), "name", "tensorrt_rtx"))),
    ("accelerator", "error", set_key("trt_fp16_enable", "1")),
    ("accelerator", "error", edit(lambda c: setattr(c.instance_group[0], "kind", pb.ModelInstanceGroup.KIND_CPU))),
    ("accelerator-precision", "error", set_key("precision_mode", "INT8")),
    ("accelerator-profile", "error", set_key("trt_profile_max_shapes", "x:8x32")),
    ("accelerator-profile", "error", set_key("trt_profile_min_shapes", "x:17x32")),
    ("accelerator-profile", "error", set_key("trt_profile_opt_shapes", "y:8x32")),
    (
        "accelerator-profile",
        "error",
        edit(lambda c: [accelerator(c).parameters.pop(f"trt_profile_{end}_shapes") for end in ("min", "opt", "max")]),
    ),
]


def test_the_graph_of_the_gpus_is_published_beside_the_cpu_s_engine(built: Path, repo: Path) -> None:
    assert sorted(d.name for d in repo.iterdir()) == ["tiny", NAME]
    assert check_repository(repo) == []
    config = read(repo)
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 16)
    assert [(g.kind, list(g.gpus)) for g in config.instance_group] == [(pb.ModelInstanceGroup.KIND_GPU, [1])]
    found = accelerator(config)
    assert found.name == "tensorrt"
    assert dict(found.parameters) == {
        "precision_mode": "FP32",  # no flag: the network is strongly typed, and the graph's own precisions hold
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": f"/tmp/{NAME}.engines",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": f"/tmp/{NAME}.engines",
        "trt_profile_min_shapes": "x:1x32",
        "trt_profile_opt_shapes": "x:8x32",
        "trt_profile_max_shapes": "x:16x32",
    }
    variant = built / "variants/gpu-int8/model.onnx"
    assert (repo / NAME / "1/model.onnx").read_bytes() == variant.read_bytes()
    graph = onnx.load(variant, load_external_data=False).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    manifest = json.loads((repo / NAME / "1/manifest.json").read_text())
    assert manifest["requires"]["tensorrt"] == ">=10"
    (warmup,) = config.model_warmup
    assert (warmup.name, warmup.batch_size) == ("sample", 8)
    # The CPU's model has nothing of it.
    cpu = text_format.Parse((repo / "tiny/config.pbtxt").read_text(), pb.ModelConfig())
    assert not cpu.HasField("optimization")


@pytest.mark.parametrize(("rule", "severity", "mutate"), MUTATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_each_mutation_is_found(repo: Path, rule: str, severity: str, mutate: Callable[[Path], None]) -> None:
    mutate(repo)
    found = check_repository(repo)
    assert (rule, severity) in {(p.rule, p.severity) for p in found}, [str(p) for p in found]
    assert all(p.where and p.message and p.fix for p in found)


def test_nothing_of_it_without_the_key(built: Path, tmp_path: Path) -> None:
    values = json.loads((built / ".stages/recipe.json").read_text())
    values["triton"]["build_at_load"] = False
    build(parse(values), tmp_path / "build")
    assert [d.name for d in (tmp_path / "build/triton").iterdir()] == ["tiny"]


def test_merged_builds_keep_it_for_gpus_without_an_engine(built: Path, tmp_path: Path) -> None:
    on_a100 = on_gpu(built, tmp_path / "a100", "a100", "8.0")
    out = tmp_path / "repository"
    summary = publish_builds([built, on_a100], out).summary
    assert sorted(d.name for d in out.iterdir()) == ["tiny", "tiny-cpu", NAME]
    assert f"{NAME} (onnxruntime; builds at load for a10)" in summary
    for file in ("config.pbtxt", "1/model.onnx", "1/manifest.json"):
        assert (out / NAME / file).read_bytes() == (built / "triton" / NAME / file).read_bytes()
    warmup = {p.name: p.read_bytes() for p in (built / "triton" / NAME / "warmup").iterdir()}
    assert {p.name: p.read_bytes() for p in (out / NAME / "warmup").iterdir()} == warmup != {}
    publish_builds([built, on_a100], out)  # the same files are no new version
    assert not (out / NAME / "2").exists()


def test_with_all_engines_built_nothing_is_left_to_the_server(built: Path, tmp_path: Path) -> None:
    jobs = [on_gpu(built, tmp_path / name, name, cc) for name, cc in (("a100", "8.0"), ("a10", "8.6"))]
    publish_builds([built, *jobs], tmp_path / "repository")
    assert sorted(d.name for d in (tmp_path / "repository").iterdir()) == ["tiny", "tiny-cpu"]


def test_a_build_that_published_no_graph_is_named(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "build"))
    shutil.rmtree(folder / "triton" / NAME)
    with collecting() as notices:
        publish_builds([folder], tmp_path / "repository")
    (said,) = [n for n in notices if n.code == "no-build-at-load"]
    assert "gpu-int8 for a10, a100" in said.message


def judged(build_: Path, folder: Path, **verdicts: str) -> Path:
    """A copy of a build whose report has these verdicts."""
    if folder != build_:
        shutil.copytree(build_, folder)
    report = json.loads((folder / "report.json").read_text())
    report["validation"] |= {name: report["validation"][name] | {"verdict": v} for name, v in verdicts.items()}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize(("verdict", "required"), [("failed", False), ("failed", True), ("not_measured", True)])
def test_a_verdict_on_what_the_server_would_build_forbids_publishing_too(
    built: Path, tmp_path: Path, verdict: str, required: bool
) -> None:
    passed = judged(built, tmp_path / "passed", cpu="passed", a100="passed", a10="passed")
    bad = judged(passed, tmp_path / "bad", a10=verdict)
    out = tmp_path / "repository"
    refused = publish_builds([bad], out, require_verdict=required)
    assert (refused.exit_code, refused.repository) == (3, None)
    assert refused.summary == f"nothing was published: the verdict on a10 {verdict}"
    assert not out.exists()
    # One failure is enough, and one measurement.
    code = 3 if verdict == "failed" else 0
    for order in ([bad, passed], [passed, bad]):
        assert publish_builds(order, tmp_path / "both", require_verdict=required).exit_code == code
    # An engine that another machine built is judged by its own verdict.
    on_a10 = judged(on_gpu(passed, tmp_path / "a10", "a10", "8.6"), tmp_path / "a10", a10="passed")
    assert publish_builds([bad, on_a10], out, require_verdict=required).exit_code == 0


def test_a_gpu_whose_engines_triton_does_not_load_is_not_said_to_be_served(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "build"))
    report = json.loads((folder / "report.json").read_text())
    report["targets"]["rtx4090"] = {"status": "compile_checked"}
    (folder / "report.json").write_text(json.dumps(report))
    assert "rtx4090" not in publish_builds([folder], tmp_path / "repository").summary


def test_the_server_builds_what_no_machine_built_and_onnx_runtime_can_check() -> None:
    def engine(name: str, family: str, file: Path | None = None) -> Engine:
        status = "skipped" if file is None else "built"
        return Engine(
            target=target(name), family=family, status=status, reason=None, path=Path("model.onnx"), file=file
        )

    engines = (
        engine("a100", "gpu-int8", Path("model.plan")),
        engine("a10", "gpu-int8", Path("model.plan")),
        engine("l40s", "gpu-fp8"),
        engine("h100", "gpu-fp8"),
        engine("b200", "gpu-fp4"),
        engine("rtx4090", "gpu-int4"),
    )
    families = ("gpu-int8", "gpu-fp8", "gpu-fp4", "gpu-int4")
    made = SimpleNamespace(plans={name: SimpleNamespace(emulated=name == "gpu-fp4") for name in families})
    for asked, expected in ((True, ["gpu-fp8"]), (False, [])):
        run = SimpleNamespace(recipe=SimpleNamespace(triton=TritonConfig(build_at_load=asked)))
        with collecting() as notices:
            assert _at_load(run, made, engines) == expected  # type: ignore[arg-type]
        assert [n.message.split()[0] for n in notices if n.code == "not-built-at-load"] == ["gpu-fp4"] * asked
