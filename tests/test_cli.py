from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.cli_flags import STAGES, shard_of
from pipeline.cli_recipe import source_of
from pipeline.errors import MissingError, PipelineError, RecipeError, StoreError
from pipeline.notices import notice
from pipeline.recipe import Method, Preset, load
from pipeline.stages import run as stages_run


@dataclass(frozen=True)
class BuildOptions:
    until: str | None = None
    force: bool = False
    from_stage: str | None = None
    dry_run: bool = False
    require_verdict: bool = False
    require_built: bool = False
    retry: bool = False
    shard: tuple[int, int] | None = None
    merge: tuple[Path, ...] = ()


@dataclass
class FakeBuild:
    """Stands in for pipeline.build: keeps what it was asked for."""

    exit_code: int = 0
    error: BaseException | None = None
    recipe: Any = None
    directory: Any = None
    options: Any = None
    said: list[str] = field(default_factory=list)

    def __call__(self, recipe, directory, *, options, progress):
        self.recipe, self.directory, self.options = recipe, directory, options
        for done in range(3):
            progress("calibrate", done, 2)
        progress("calibrate", 2, 2)
        notice("few-samples", "Only [3] samples.", where="data.npz")
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(
            directory=directory, report={"x": [1]}, exit_code=self.exit_code, summary="all good, in build/x"
        )


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").touch()
    made = FakeBuild()
    module = types.ModuleType("pipeline.build")
    module.build, module.BuildOptions = made, BuildOptions
    monkeypatch.setitem(sys.modules, "pipeline.build", module)
    return made


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def ok(*args):
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result


# ---- recipes from the command line ---------------------------------------------------------------------------------


def test_build_a_file(fake):
    result = ok("build", "model.onnx")
    assert fake.recipe.source.onnx == Path("model.onnx")
    assert fake.recipe.name == "model"
    assert fake.directory == Path("build/model")
    assert fake.options == BuildOptions()
    assert result.stdout == "all good, in build/x\n"


def test_short_flags_are_recipe_keys(fake):
    ok(
        *("build", "model.onnx", "--precision", "W8A8", "--target", "cpu", "--target", "a100"),
        *("--calibration", "c.npz", "--validate", "v.npz", "--tokenizer", "tok", "--samples", "7", "--method", "mse"),
        *("--gate", "sqnr_db>=20", "--gate", "task.f1 >= 99% of fp32", "--name", "n", "--threads", "2", "--seed", "5"),
        *("--costs", "costs.json", "--trust-source", "--strip-quantization", "-o", "out"),
    )
    recipe = fake.recipe
    assert recipe.policy.preset is Preset.INT8
    assert recipe.targets == ("cpu", "a100")
    assert (recipe.calibration.data, recipe.validate_.data) == ("c.npz", "v.npz")
    assert recipe.calibration.tokenizer == recipe.validate_.tokenizer == Path("tok")
    assert (recipe.calibration.samples, recipe.calibration.method) == (7, Method.MSE)
    assert recipe.validate_.gates == {"sqnr_db": ">=20", "task.f1": ">= 99% of fp32"}
    assert (recipe.name, recipe.threads, recipe.seed, recipe.costs) == ("n", 2, 5, Path("costs.json"))
    assert (recipe.source.trust_source, recipe.source.strip_quantization) == (True, True)
    assert fake.directory == Path("out")


def test_every_recipe_key_is_a_flag_anywhere_on_the_line(fake):
    ok(
        *("build", "--calibration.batch-size", "4", "--validate.per_layer", "model.onnx", "--triton.max_batch_size=16"),
        *("--validate.gates.task.f1", ">= 0.5", "--calibration.ignore_padding", "false", "--targets", "cpu,t4"),
    )
    recipe = fake.recipe
    assert recipe.source.onnx == Path("model.onnx")
    assert recipe.calibration.batch_size == 4
    assert recipe.validate_.per_layer is True
    assert recipe.triton.max_batch_size == 16
    assert recipe.validate_.gates == {"task.f1": ">= 0.5"}
    assert recipe.calibration.ignore_padding is False
    assert recipe.targets == ("cpu", "t4")


def test_a_dotted_flag_wins_over_a_short_one(fake):
    ok("build", "model.onnx", "--samples", "3", "--calibration.samples", "9")
    assert fake.recipe.calibration.samples == 9


def test_the_recipe_in_this_folder_is_read(fake, tmp_path):
    (tmp_path / "pipeline.yaml").write_text("name: here\nsource: {onnx: model.onnx}\ncalibration: {samples: 3}\n")
    ok("build", "--precision", "fp16")
    assert (fake.recipe.name, fake.recipe.calibration.samples, fake.recipe.policy.preset) == ("here", 3, "fp16")
    ok("build", "model.onnx")  # a model that is named needs no recipe
    assert fake.recipe.calibration.samples == 512


def test_a_recipe_elsewhere_and_a_model_in_its_place(fake, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/r.yaml").write_text("source: {onnx: m.onnx, opset: 22}\ncalibration: {data: c.npz}\n")
    ok("build", "-r", "sub/r.yaml")
    assert fake.recipe.source.onnx == Path("sub/m.onnx")
    assert fake.recipe.calibration.data == "sub/c.npz"
    assert fake.directory == Path("build/m")
    ok("build", "model.onnx", "--recipe", "sub/r.yaml")
    assert fake.recipe.source.onnx == Path("model.onnx")
    assert fake.recipe.source.opset == 22


@pytest.mark.parametrize(
    ("command", "until"),
    [
        ("build", None),
        ("export", "export"),
        ("calibrate", "calibrate"),
        ("quantize", "quantize"),
        ("compile", "engines"),
        ("validate", "validate"),
        ("publish", "publish"),
    ],
)
def test_commands_stop_at_their_stage(fake, command, until):
    ok(command, "model.onnx", "--force", "--from", "plan")
    assert fake.options == BuildOptions(until=until, force=True, from_stage="plan")


def test_build_options(fake):
    ok("build", "model.onnx", "--dry-run", "--retry", "--require-verdict", "--require-built", "--from", "quantize/cpu")
    assert fake.options == BuildOptions(
        dry_run=True, retry=True, require_verdict=True, require_built=True, from_stage="quantize/cpu"
    )


def test_shards_and_merge(fake):
    ok("calibrate", "model.onnx", "--shard", "1/4")
    assert fake.options == BuildOptions(until="calibrate", shard=(1, 4))
    ok("calibrate", "model.onnx", "--merge", "a", "--merge", "b")
    assert fake.options.merge == (Path("a"), Path("b"))


@pytest.mark.parametrize("text", ["4/4", "5/4", "x", "1", "1/0", "-1/2"])
def test_wrong_shard(text):
    with pytest.raises(RecipeError, match="is no part"):
        shard_of(text)


def test_stages_are_those_of_the_build():
    assert stages_run.STAGES == STAGES


# ---- what a model is -----------------------------------------------------------------------------------------------


def test_kinds_of_source(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    (tmp_path / "hf/model.onnx").touch()
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.onnx").touch()
    (tmp_path / "m.pt2").touch()
    assert source_of(f"{tmp_path}/hf") == {"huggingface": f"{tmp_path}/hf"}
    assert source_of(f"{tmp_path}/one") == {"onnx": f"{tmp_path}/one/a.onnx"}
    assert source_of(f"{tmp_path}/m.pt2") == {"pt2": f"{tmp_path}/m.pt2"}
    assert source_of("pkg.models:make") == {"module": "pkg.models:make"}
    assert source_of("sentence-transformers/all-MiniLM-L6-v2") == {
        "huggingface": "sentence-transformers/all-MiniLM-L6-v2"
    }


def test_what_is_no_source(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two/a.onnx").touch()
    (tmp_path / "two/b.onnx").touch()
    (tmp_path / "m.bin").touch()
    for name, message in [
        ("gone.onnx", "no such model file"),
        ("empty", "holds no model"),
        ("two", r"holds 2 \.onnx files"),
        ("m.bin", r"A \.bin is no model"),
        ("nonsense", "no such model"),
    ]:
        with pytest.raises(RecipeError, match=message):
            source_of(str(tmp_path / name) if name != "nonsense" else name)


@pytest.mark.parametrize(
    ("model", "name"),
    [("m.v2.onnx", "m.v2"), ("ünï code.onnx", "n-code"), ("__.onnx", "model")],
)
def test_names_come_from_the_model(fake, tmp_path, model, name):
    (tmp_path / model).touch()
    ok("build", model)
    assert fake.recipe.name == name


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["build"], "python -m pipeline init"),
        (["build", "gone.onnx"], "no such model file"),
        (["build", "model.onnx", "--calibration.sampels", "3"], "did you mean --calibration.samples?"),
        (["build", "model.onnx", "--precison", "int8"], "did you mean --precision?"),
        (["build", "model.onnx", "--max_batch_size", "3"], "did you mean --triton.max_batch_size?"),
        (["build", "model.onnx", "--calibration.samples"], "needs a value"),
        (["build", "model.onnx", "--precision", "int9"], "did you mean int8?"),
        (["build", "model.onnx", "--precision", "MXFP8"], "not made by this version"),
        (["build", "model.onnx", "--gate", "nonsense"], "is no gate"),
        (["build", "model.onnx", "--from", "quantise"], "did you mean quantize?"),
        (["build", "-r", "gone.yaml"], "cannot be read"),
        (["calibrate", "model.onnx", "--shard", "5/4"], "is no part"),
        (["inspect", "gone.onnx"], "cannot be read"),
        (["inspect", "."], "holds no build"),
        (["build", "model.onnx", "--samples", "many"], "Invalid value for '--samples'"),
        (["bild"], "No such command"),
    ],
)
def test_bad_input_exits_2_with_a_few_lines(fake, args, message):
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) <= 9
    assert result.stdout == ""
    assert fake.recipe is None


@pytest.mark.parametrize(
    ("error", "code"), [(StoreError("Full.", where="x", fix="y"), 2), (MissingError("No torch."), 4)]
)
def test_errors_of_a_build(fake, error, code):
    fake.error = error
    result = call("build", "model.onnx")
    assert result.exit_code == code
    assert f"error: {error}" in result.stderr


@pytest.mark.parametrize("code", [0, 3, 4])
def test_exit_code_of_the_result(fake, code):
    fake.exit_code = code
    result = call("build", "model.onnx")
    assert (result.exit_code, result.stdout) == (code, "all good, in build/x\n")


def test_interrupt(fake):
    fake.error = KeyboardInterrupt()
    result = call("build", "model.onnx")
    assert result.exit_code == 130
    assert "run again to resume" in result.stderr


def test_a_bug_is_one_line_and_a_crash_log(fake, tmp_path):
    fake.error = ZeroDivisionError("oh\nno")
    (tmp_path / "build/model").mkdir(parents=True)
    result = call("build", "model.onnx")
    assert result.exit_code == 70
    line = result.stderr.splitlines()[-1]
    assert "this is a bug (ZeroDivisionError: oh)" in line
    (log,) = (tmp_path / "build/model").glob("crash-*.log")
    assert str(log.relative_to(tmp_path)) in line
    assert "Traceback" in log.read_text()
    assert "Traceback" not in result.output


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), PipelineError("x")])
@pytest.mark.parametrize("args", [("--debug", "build", "model.onnx"), ("build", "model.onnx", "--debug")])
def test_debug_lets_the_exception_through(fake, error, args):
    fake.error = error
    assert call(*args).exception is error


# ---- output --------------------------------------------------------------------------------------------------------


def test_progress_and_warnings_go_to_stderr_and_json_alone_to_stdout(fake):
    result = ok("build", "model.onnx", "--json")
    assert json.loads(result.stdout) == {"directory": "build/model", "exit_code": 0, "report": {"x": [1]}}
    assert "warning: Only [3] samples. (data.npz)" in result.stderr
    assert "calibrate: done in" in result.stderr
    assert result.stderr.count("calibrate") == 1


def test_init_writes_a_recipe_that_loads_and_keeps_one_that_is_there(fake, tmp_path):
    ok("init", "model.onnx")
    recipe = load(tmp_path / "pipeline.yaml")
    assert recipe.source.onnx == tmp_path / "model.onnx"
    assert "# At most this many samples are read." in (tmp_path / "pipeline.yaml").read_text()
    (tmp_path / "pipeline.yaml").write_text("mine")
    assert call("init").exit_code == 2
    assert (tmp_path / "pipeline.yaml").read_text() == "mine"
    ok("init", "--force")
    ok("build")
    assert fake.recipe.source.onnx == Path("model.onnx")


def tiny_model(path):
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="proj"),
        helper.make_node("Relu", ["h"], ["y"], name="act"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def write_plan(folder):
    folder.mkdir(parents=True)
    node = {
        "node": "proj",
        "op_type": "MatMul",
        "role": "linear",
        "block": 3,
        "precision": "int8",
        "rule": "preset [int8]",
    }
    plan = {"family": "cpu", "elsewhere": "fp32", "dynamic": False, "formats": {}, "nodes": [node]}
    (folder / "precision_plan.json").write_text(json.dumps(plan))


def test_dry_run_shows_the_precision_plan(fake, tmp_path):
    write_plan(tmp_path / "out/dry-run/cpu")
    lines = ok("build", "model.onnx", "-o", "out", "--dry-run").stdout.splitlines()
    assert any(line.split() == ["int8", "1", "linear", "MatMul", "3", "preset", "[int8]"] for line in lines)
    assert lines[-2:] == ["all good, in build/x", "every node: python -m pipeline inspect -v out/dry-run"]
    assert len(ok("build", "model.onnx", "-o", "out").stdout.splitlines()) == 1


def test_inspect_a_build_directory(fake, tmp_path):
    write_plan(tmp_path / "b/variants/cpu")
    result = ok("inspect", tmp_path / "b")
    assert "cpu: 1 nodes int8" in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.startswith("int8"))
    assert row.split() == ["int8", "1", "linear", "MatMul", "3", "preset", "[int8]"]
    verbose = ok("inspect", tmp_path / "b", "-v").stdout.splitlines()
    row = next(line for line in verbose if line.startswith("proj"))
    assert row.split() == ["proj", "MatMul", "linear", "3", "int8", "preset", "[int8]"]
    assert json.loads(ok("inspect", tmp_path / "b", "--json").stdout)[0]["rows"] == [
        {
            "node": "proj",
            "op type": "MatMul",
            "role": "linear",
            "block": 3,
            "precision": "int8",
            "rule": "preset [int8]",
        }
    ]


def test_inspect_a_model_names_each_node_and_its_role(fake, tmp_path):
    tiny_model(tmp_path / "tiny.onnx")
    rows = json.loads(ok("inspect", "tiny.onnx", "--json").stdout)
    assert [(row["node"], row["op_type"]) for row in rows] == [("proj", "MatMul"), ("act", "Relu")]
    assert rows[0]["role"] in ("linear", "head")
    assert "proj" in ok("inspect", "tiny.onnx").stdout
    assert "act" in ok("inspect", "tiny.onnx", "-v").stdout


def test_doctor_tells_what_is_here(fake):
    found = json.loads(ok("doctor", "--json").stdout)
    assert found["cores"] == os.cpu_count()
    versions = {p["module"]: p["version"] for p in found["packages"]}
    assert versions["onnx"] == onnx.__version__
    status = {t["target"]: t["status"] for t in found["targets"]}
    assert status["cpu"] == "built"
    assert set(status.values()) <= {"built", "compile_checked", "skipped"}
    text = ok("doctor").stdout
    assert "targets" in text
    assert "A100" in text


def test_doctor_without_a_package_says_how_to_get_it(monkeypatch):
    from pipeline import doctor

    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    package = next(p for p in doctor.examine().packages if p.module == "torch")
    assert (package.version, package.install) == (None, "pip install '.[torch]'")


def test_doctor_reads_the_driver(monkeypatch):
    from pipeline import doctor

    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    said = types.SimpleNamespace(stdout="NVIDIA A100-SXM4-80GB, 8.0, 81920 MiB, 570.1\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: said)
    (gpu,) = doctor.examine().gpus
    assert (gpu.name, gpu.compute_capability, gpu.memory) == ("NVIDIA A100-SXM4-80GB", "8.0", "81920 MiB")


# ---- the real process ----------------------------------------------------------------------------------------------


def test_help_is_fast_and_imports_nothing_heavy():
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "pipeline", "--help"], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
    assert "quantize" in done.stdout
    assert best < 1.5
    code = (
        "import sys, contextlib\n"
        "from pipeline.cli import app\n"
        "with contextlib.suppress(SystemExit): app(['build', '--help'])\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'transformers', 'yaml', 'numba'} & set(sys.modules)\n"
        "print(heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


INTERRUPTED = """
import sys, time, types
module = types.ModuleType("pipeline.build")
def build(recipe, directory, *, options, progress):
    print("running", file=sys.__stdout__, flush=True)  # a build itself has no say on stdout
    time.sleep(60)
module.build, module.BuildOptions = build, lambda **k: None
sys.modules["pipeline.build"] = module
from pipeline.cli import app
app(["build", "pkg.module:factory"])
"""


def test_control_c_in_a_real_process(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # Whoever runs the tests in the background had the signal ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout.readline() == "running\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "run again to resume" in err
    assert "Traceback" not in err
