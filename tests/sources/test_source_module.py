"""The user's own torch code: modules from a factory and ``.pt2`` programs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from pipeline.errors import SourceError
from pipeline.notices import collecting
from pipeline.recipe import Source
from pipeline.sources import child, torch_jobs
from pipeline.sources.export import export
from pipeline.sources.job import Job
from pipeline.types import silent

CODE = """
import os, time, torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Conv1d(4, 16, 3, padding=1)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(16)
    def forward(self, x, pair, *, scale=None):
        h, c = self.norm(self.drop(self.a(x))), self.b(pair["c"]).mean(-1)
        return {"sum": h + c * pair["k"], "parts": (h, [c]), "none": None, "same": h}

def two():
    print("loading", flush=True)
    torch.manual_seed(1)
    inputs = (torch.randn(4, 8), {"c": torch.randn(4, 4, 10), "k": 3.0})
    return Two(), inputs, {"x": {0: "n"}, "pair_c": {0: "n", 2: "time"}}

class Cond(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: y.relu() + 1, lambda y: y * 2, (x,))
def cond(): return Cond(), torch.ones(4, 8)

@torch.library.custom_op("mine::weird", mutates_args=())
def weird(x: torch.Tensor) -> torch.Tensor: return x.sin()
@weird.register_fake
def _(x): return torch.empty_like(x)
class Custom(nn.Module):
    def forward(self, x): return torch.ops.mine.weird(x)
def custom(): return Custom(), torch.ones(4, 8)

class If(nn.Module):
    def forward(self, x): return x * 2 if x.sum() > 0 else x
def python_if(): return If(), torch.ones(4, 8)

class Loop(nn.Module):
    def forward(self, x):
        for i in range(x.shape[1]): x = x + x[:, i : i + 1]
        return x
def loop(): return Loop(), torch.ones(3, 5), {"x": {0: "batch", 1: "time"}}

class Fixed(nn.Module):
    def forward(self, x): return x.reshape(4, 2, 4)
def fixed(): return Fixed(), (torch.ones(4, 8),)
def fixed_said(): return Fixed(), (torch.ones(4, 8),), {}

class Random(nn.Module):
    def forward(self, x): return x + torch.rand_like(x)
def random(): return Random(), torch.ones(4, 8)

class One(nn.Module):
    def forward(self, x): return x.squeeze(0) if x.shape[0] == 1 else x
def one(): return One(), torch.ones(4, 8)

class Nan(nn.Module):
    def forward(self, x): return x * float("nan")
def nan(): return Nan(), torch.ones(4, 8)

class Same(nn.Module):
    def forward(self, file, y): return file, y, {"file": y * 2}
def same(): return Same(), {"file": torch.ones(1, 8), "y": torch.ones(1, 8, dtype=torch.float64)}

class Number(nn.Module):
    def forward(self, x): return x, 3
def number(): return Number(), torch.ones(4, 8)

class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, x):
        self.calls.add_(1)
        return x * 2
def counter(): return Counter(), torch.ones(4, 8)

def wrong(): return 3
def raising(): raise ValueError("no checkpoint here")
def leaving(): raise SystemExit(3)
def dying(): os.abort()
def hanging(): time.sleep(60)
"""
_number = itertools.count()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the code above as a package in the working directory, under a name of its own, and return its name."""
    name = f"source_package_{next(_number)}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    # An operator's name is registered once in a process.
    (tmp_path / name / "models.py").write_text(CODE.replace("mine::", f"{name}::").replace("ops.mine", f"ops.{name}"))
    (tmp_path / name / "needs.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return f"{name}.models"


def run(target: str, out: Path, kind: str = "module") -> Path:
    torch_jobs.run(Job(kind=kind, target=target, opset=21), out, silent)  # type: ignore[arg-type]
    return out / "exported.onnx"


def infer(path: Path, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    live = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in live.get_outputs()]
    return dict(zip(names, live.run(names, feeds), strict=True))


def test_a_factory_through_the_child_process(package: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = export(Source(module=f"{package}:two", trust_source=True), tmp_path / "out")
    assert capfd.readouterr().out == ""  # what the factory prints stays in the child
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["exported.onnx", "exported.onnx.data", "sample.npz"]
    assert (result.task, result.folder) == (None, None)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(result.onnx).graph.initializer}
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(3, 4, 6)).astype(np.float32)
    got = infer(result.onnx, x=x, pair_c=c)
    assert list(got) == ["sum", "parts_0", "parts_1_0", "same"]
    assert np.array_equal(got["same"], got["parts_0"])
    padded = np.pad(c, ((0, 0), (0, 0), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=2)
    conv = np.einsum("bitk,oik->bot", windows, weights["b.weight"]) + weights["b.bias"][:, None]
    np.testing.assert_allclose(got["parts_1_0"], conv.mean(-1), rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 16)
    h = linear(torch.from_numpy(x)).detach().numpy() / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(got["sum"], h + 3 * conv.mean(-1), rtol=1e-4, atol=1e-5)


def test_a_child_that_dies_or_hangs_is_reported(package: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="died with exit code -6"):
        export(Source(module=f"{package}:dying", trust_source=True), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(SourceError, match=r"stopped after 0\.2 seconds"):
        child.run(Job(kind="module", target=f"{package}:hanging", opset=21), tmp_path, silent, timeout_seconds=0.2)


def test_an_error_of_the_child_keeps_its_words(package: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="raised ValueError: no checkpoint here") as caught:
        export(Source(module=f"{package}:raising", trust_source=True), tmp_path / "out")
    assert "models.py:" in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("leaving", "raised SystemExit: 3"),
        ("wrong", "it returned int"),
        ("twos", "no function 'twos'"),
        ("custom", r"operator source_package_\d+\.weird has no ONNX form"),
        ("python_if", "decides by a tensor's value"),
        ("loop", "only with 5 elements on axis 1 of input 'x'"),
        ("fixed", r"fails on its example inputs \(x \[1, 8\]\)"),
        ("random", "another 'output' each time"),
        ("one", r"'output' is float32 \[1, 8\] and not float32 \[8\]"),
        ("nan", "no finite number"),
        ("number", "'output_1' is a int"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(package: str, tmp_path: Path, factory: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        run(f"{package}:{factory}", tmp_path)
    assert f"{package}:{factory}" in caught.value.where
    assert caught.value.fix


def test_a_wrong_name_says_which_part_is_wrong(package: str, tmp_path: Path) -> None:
    for target, message in {
        package: "package.module:factory",
        "no_such_package.models:two": "no module 'no_such_package'",
        f"{package}s:two": f"no module '{package}s'",
        f"{package.split('.')[0]}.needs:two": "raised ModuleNotFoundError: No module named 'not_installed_anywhere'",
    }.items():
        with pytest.raises(SourceError, match=message):
            run(target, tmp_path)
    with pytest.raises(SourceError, match="no function") as caught:
        run(f"{package}:coond", tmp_path)
    assert "'cond'" in caught.value.fix


def test_control_flow_is_kept(package: str, tmp_path: Path) -> None:
    path = run(f"{package}:cond", tmp_path)
    assert "If" in [node.op_type for node in onnx.load(path).graph.node]
    x = np.full((2, 8), 3, np.float32)
    assert np.array_equal(infer(path, x=x)["output"], x + 1)
    assert np.array_equal(infer(path, x=-x)["output"], -2 * x)


def test_sizes_can_be_kept_fixed(package: str, tmp_path: Path) -> None:
    path = run(f"{package}:fixed_said", tmp_path)
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [4, 8]


def test_an_input_may_be_an_output_and_names_stay_apart(package: str, tmp_path: Path) -> None:
    path = run(f"{package}:same", tmp_path)
    x, y = np.ones((3, 8), np.float32), np.full((3, 8), 2, np.float32)
    got = infer(path, file=x, y=y)
    assert {name: float(value.mean()) for name, value in got.items()} == {
        "output_0": 1,
        "output_1": 2,
        "output_2_file": 4,
    }
    assert sorted(np.load(tmp_path / "sample.npz")) == ["file", "y"]


def test_a_model_that_keeps_state_is_said(package: str, tmp_path: Path) -> None:
    with collecting() as notices:
        run(f"{package}:counter", tmp_path)
    assert [notice.code for notice in notices] == ["stateful-model"]
    assert "calls" in notices[0].message


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.down(self.up(x).relu()) * mask.unsqueeze(-1), "count": mask.sum(1)}


def save_pt2(path: Path, model: torch.nn.Module, **kwargs: object) -> Path:
    dtype = next(model.parameters()).dtype
    program = torch.export.export(model.eval(), (torch.randn(3, 5, 8, dtype=dtype), torch.ones(3, 5)), **kwargs)  # type: ignore[arg-type]
    torch.export.save(program, path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_pt2_keeps_its_own_dynamic_dimensions(tmp_path: Path) -> None:
    batch, model = torch.export.Dim("b", max=64), Head()
    shapes = {"x": {0: batch, 1: torch.export.Dim.AUTO}, "mask": {0: batch, 1: torch.export.Dim.AUTO}}
    path = run(str(save_pt2(tmp_path / "m.pt2", model, dynamic_shapes=shapes)), tmp_path, kind="pt2")
    graph = onnx.load(path, load_external_data=False).graph
    assert [d.dim_param for d in graph.input[1].type.tensor_type.shape.dim] == ["batch", "x_1"]
    assert [node.name for node in graph.node][:2] == ["/up/MatMul", "/up/Add"]
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(2, 9, 8)).astype(np.float32), np.ones((2, 9), np.float32)
    got = infer(path, x=x, mask=mask)
    wanted = model(torch.from_numpy(x), torch.from_numpy(mask))["y"].detach().numpy()
    np.testing.assert_allclose(got["y"], wanted, rtol=1e-4, atol=1e-5)
    assert got["count"].tolist() == [9, 9]


@pytest.mark.filterwarnings("ignore")
def test_a_pt2_in_half_precision_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="float16"):
        run(str(save_pt2(tmp_path / "half.pt2", Head().half())), tmp_path, kind="pt2")
    (tmp_path / "junk.pt2").write_bytes(b"junk" * 100)
    with pytest.raises(SourceError, match="cannot load the file"):
        run(str(tmp_path / "junk.pt2"), tmp_path, kind="pt2")
