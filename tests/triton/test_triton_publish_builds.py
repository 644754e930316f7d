"""Builds of several machines become one repository, or an error that says which one does not belong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ensembles
import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from typer.testing import CliRunner

from pipeline import model as models
from pipeline.build import build
from pipeline.cli import app
from pipeline.errors import PublishError
from pipeline.notices import collecting
from pipeline.publishing import publish_builds
from pipeline.recipe import parse
from pipeline.triton.served import onnx_model
from tests.quantize.graphs import mlp
from tests.quantize.test_quantize_gptq import correlated

PROFILE = [{"x": {"min": [1, 32], "opt": [8, 32], "max": [64, 32]}}]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real build for cpu and A100, as far as it gets without the GPU."""
    folder = tmp_path_factory.mktemp("finished")
    path, _ = mlp(folder / "m.onnx")
    np.savez(folder / "data.npz", x=correlated(32, 32).astype(np.float32))
    recipe = parse(
        {
            "name": "tiny",
            "source": {"onnx": str(path)},
            "calibration": {"data": str(folder / "data.npz"), "method": "minmax"},
            "targets": ["cpu", "a100", "a30", "a10"],
        }
    )
    build(recipe, folder / "build")
    return folder / "build"


def on_gpu(
    finished: Path, folder: Path, target: str, capability: str, *, data: bytes | None = None, profiles: Any = None
) -> Path:
    """The build directory as the job on one GPU leaves it: the same files, and an engine with TensorRT's manifest."""
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "engines" / "cpu", ignore_errors=True)
    engine = data or f"engine of {target}".encode()
    place = folder / "engines" / target
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.plan").write_bytes(engine)
    files = models.files(folder / "variants/gpu-int8/model.onnx")
    manifest = {
        "runtime": "tensorrt",
        "version": "10.13.2.6",
        "target": target,
        "compute_capability": capability,
        "engine": {"file": "model.plan", "bytes": len(engine), "sha256": hashlib.sha256(engine).hexdigest()},
        "onnx": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
        "options": {"profiles": profiles or PROFILE},
    }
    write(place / "manifest.json", manifest)
    change(folder / "report.json", lambda r: r["targets"][target].update(status="built"))
    change(folder / "report.json", lambda r: r["targets"].get("cpu", {}).update(status="skipped"))
    return folder


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    edit(values)
    write(path, values)


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def config(folder: Path) -> pb.ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), pb.ModelConfig())


@pytest.fixture
def jobs(finished: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """What three machines built: the CPU's, an A100's and an A10's."""
    a100 = on_gpu(finished, tmp_path / "a100", "a100", "8.0")
    return finished, a100, on_gpu(finished, tmp_path / "a10", "a10", "8.6")


def test_one_model_for_all_gpus_and_one_for_the_cpu(jobs: tuple[Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "repository"
    found = publish_builds(jobs, out)
    assert (found.exit_code, found.repository) == (0, out)
    assert sorted(d.name for d in out.iterdir()) == ["tiny", "tiny-cpu"]
    gpu, cpu = config(out / "tiny"), config(out / "tiny-cpu")
    assert (gpu.backend, cpu.backend) == ("tensorrt", "onnxruntime")
    assert dict(gpu.cc_model_filenames) == {"8.0": "sm80.plan", "8.6": "sm86.plan"}
    assert not gpu.default_model_filename
    assert not (out / "tiny/1/model.plan").exists()  # the server would fall back to it
    assert (out / "tiny/1/sm80.plan").read_bytes() == b"engine of a100"
    assert (out / "tiny/1/sm86.plan").read_bytes() == b"engine of a10"
    assert gpu.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert [(t.name, list(t.dims)) for t in gpu.input] == [("x", [32])]
    assert gpu.max_batch_size == 32 <= PROFILE[0]["x"]["max"][0]
    assert list(gpu.model_warmup[0].inputs["x"].dims) == [32]


def test_publishing_twice_changes_nothing_and_a_new_engine_is_a_new_version(
    jobs: tuple[Path, ...], finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "repository"
    publish_builds(jobs, out)
    publish_builds(jobs, out)
    assert [d.name for d in (out / "tiny").glob("[!.]*") if d.is_dir()] == ["1"]
    again = on_gpu(finished, tmp_path / "again", "a100", "8.0", data=b"tuned better")
    publish_builds([again, jobs[2]], out)
    assert (out / "tiny/1/sm80.plan").read_bytes() == b"engine of a100"
    assert (out / "tiny/2/sm80.plan").read_bytes() == b"tuned better"


def test_two_gpus_of_one_compute_capability_need_a_choice(finished: Path, tmp_path: Path) -> None:
    both = [on_gpu(finished, tmp_path / name, name, "8.0") for name in ("a100", "a30")]
    with pytest.raises(PublishError, match="a100 and a30 have the same compute capability"):
        publish_builds(both, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    publish_builds(both, tmp_path / "one", chosen=["a30"])
    assert (tmp_path / "one/tiny/1/sm80.plan").read_bytes() == b"engine of a30"
    publish_builds(both, tmp_path / "two", split=True)
    assert sorted(d.name for d in (tmp_path / "two").iterdir()) == ["tiny-a100", "tiny-a30"]
    assert (tmp_path / "two/tiny-a100/1/sm80.plan").read_bytes() == b"engine of a100"


MUTATIONS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "another TensorRT": (
        "different versions of TensorRT",
        lambda d: change(d / "engines/a100/manifest.json", lambda m: m.update(version="11.4.0")),
    ),
    "another GPU": (
        "it is for compute capability 9.0, not 8.0",
        lambda d: change(d / "engines/a100/manifest.json", lambda m: m.update(compute_capability="9.0")),
    ),
    "another target": (
        "the manifest is of tensorrt for h100",
        lambda d: change(d / "engines/a100/manifest.json", lambda m: m.update(target="h100")),
    ),
    "another ONNX": (
        "built from another model.onnx",
        lambda d: flip(d / "variants/gpu-int8/model.onnx.data"),
    ),
    "another engine": (
        "not the one that the manifest describes",
        lambda d: (d / "engines/a100/model.plan").write_bytes(b"other"),
    ),
    "no engine": (
        "not the one that the manifest describes",
        lambda d: (d / "engines/a100/model.plan").unlink(),
    ),
    "another model": (
        "do not come from the same canonical model",
        lambda d: flip(d / "model.fp32.onnx.data"),
    ),
    "another recipe": (
        "do not come from the same recipe",
        lambda d: change(d / "manifest.json", lambda m: m["recipe"]["policy"].update(preset="int8-all")),
    ),
    "other data": (
        "do not come from the same calibration data",
        lambda d: change(d / "manifest.json", lambda m: m["inputs"][1].update(sha256="0" * 64, role="calibration")),
    ),
    "no report": ("report.json", lambda d: (d / "report.json").unlink()),
    "hidden files left behind": ("The folder holds no build", lambda d: shutil.rmtree(d / ".stages")),
    "a small profile": (
        "takes batches of at most 16",
        lambda d: change(
            d / "engines/a100/manifest.json", lambda m: m["options"]["profiles"][0]["x"].update(max=[16, 32])
        ),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_does_not_belong_is_refused(name: str, jobs: tuple[Path, ...], tmp_path: Path) -> None:
    message, mutate = MUTATIONS[name]
    mutate(jobs[1])
    with pytest.raises(PublishError) as error:
        publish_builds(jobs, tmp_path / "repository")
    assert message in str(error.value)
    assert error.value.fix
    assert not (tmp_path / "repository").exists()


def test_two_different_engines_for_one_target_are_refused(finished: Path, tmp_path: Path) -> None:
    one = on_gpu(finished, tmp_path / "one", "a100", "8.0")
    two = on_gpu(finished, tmp_path / "two", "a100", "8.0", data=b"another")
    with pytest.raises(PublishError, match="Two builds made an engine for a100"):
        publish_builds([one, two], tmp_path / "repository")


def test_a_failed_verdict_publishes_nothing_and_exits_3(jobs: tuple[Path, ...], tmp_path: Path) -> None:
    change(jobs[1] / "report.json", lambda r: r["validation"].update(a100={"verdict": "failed"}))
    out = tmp_path / "repository"
    result = CliRunner().invoke(app, ["publish", *map(str, jobs), "-o", str(out)])
    assert result.exit_code == 3, result.output
    assert "the verdict on a100 failed" in result.output
    assert not out.exists()


def test_unmeasured_engines_are_published_unless_a_verdict_is_required(jobs: tuple[Path, ...], tmp_path: Path) -> None:
    assert publish_builds(jobs, tmp_path / "no", require_verdict=True).exit_code == 3
    result = CliRunner().invoke(app, ["publish", *map(str, jobs), "-o", str(tmp_path / "yes")])
    assert result.exit_code == 0, result.output
    assert "tiny (tensorrt; 8.0: a100, 8.6: a10)" in result.output


def test_an_rtx_engine_is_left_out_and_said_so(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "rtx"
    shutil.copytree(finished, copy)
    change(copy / "report.json", lambda r: r["targets"].update(rtx4090={"status": "built"}))
    with collecting() as notices:
        publish_builds([copy], tmp_path / "repository")
    assert [n.code for n in notices if n.code == "not-served"] == ["not-served"]
    assert [d.name for d in (tmp_path / "repository").iterdir()] == ["tiny"]


def test_merged_engines_keep_the_ensemble_and_a_real_warm_up(tmp_path: Path) -> None:
    """The machine that merges has neither the tokenizer nor the data: the builds kept what serving needs."""
    tokenizer, source = tmp_path / "source/tokenizer", tmp_path / "source"
    model = ensembles.text_model(source / "m.onnx")
    ensembles.encoder(tokenizer, onnx_model(model, name="tiny"))
    (source / "texts.txt").write_text("the cat sat on the mat\na cat\n" * 8)
    recipe = parse(
        {
            "name": "tiny",
            "source": {"onnx": str(model)},
            "calibration": {"data": str(source / "texts.txt"), "tokenizer": str(tokenizer), "max_length": 16},
            "policy": {"preset": "int8"},
            "targets": ["a100"],
            "validate": {"data": str(source / "texts.txt"), "tokenizer": str(tokenizer), "latency": False},
            "triton": {"ensemble": "embedding", "max_batch_size": 8},
        }
    )
    build(recipe, tmp_path / "build")
    profiles = [{n: {"min": [1, 1], "opt": [8, 8], "max": [8, 16]} for n in ("input_ids", "attention_mask")}]
    a100 = on_gpu(tmp_path / "build", tmp_path / "a100", "a100", "8.0", profiles=profiles)
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "build")
    out = tmp_path / "repository"
    with collecting() as notices:
        found = publish_builds([a100], out)
    assert "no-ensemble" not in {n.code for n in notices}
    assert sorted(d.name for d in out.iterdir()) == ["tiny", "tiny_pooling", "tiny_text", "tiny_tokenizer"]
    assert "tiny_text (ensemble)" in found.summary
    assert [s.model_name for s in config(out / "tiny_text").ensemble_scheduling.step] == [
        "tiny_tokenizer",
        "tiny",
        "tiny_pooling",
    ]
    settings = json.loads((out / "tiny_tokenizer/1/settings.json").read_text())
    assert (settings["max_length"], sorted(settings["inputs"])) == (16, ["attention_mask", "input_ids"])
    (warmup,) = config(out / "tiny").model_warmup
    kept = out / "tiny/warmup" / warmup.inputs["input_ids"].input_data_file
    # "the cat sat on the mat" of the tokenizer: words 2 to 7.
    assert np.frombuffer(kept.read_bytes(), "<i8")[:6].tolist() == [2, 3, 4, 5, 2, 7]
    # A build of before kept nothing: engines alone, and a notice.
    shutil.rmtree(a100 / "serving")
    with collecting() as notices:
        publish_builds([a100], tmp_path / "alone")
    assert "no-ensemble" in {n.code for n in notices}
    assert [d.name for d in (tmp_path / "alone").iterdir()] == ["tiny"]
