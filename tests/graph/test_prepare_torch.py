"""What both torch exporters write of a tiny encoder, brought to one canonical form and checked against torch itself."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from canonical_models import ops, prepare

from pipeline import model as files
from pipeline.running.session import run, session

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")


def encoder(approximate: str) -> torch.nn.Module:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))
            self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
            self.first, self.second = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16, bias=False)
            self.act = torch.nn.GELU(approximate=approximate)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length = x.shape[:2]
            q, k, v = (p(x).view(batch, length, 2, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
            context = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
            x = self.first(x + self.o(context.transpose(1, 2).reshape(batch, length, 16)))
            return self.second(x + self.down(self.act(self.up(x))))

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(50, 16)
            self.blocks = torch.nn.ModuleList([Block(), Block()])
            self.dropout = torch.nn.Dropout(0.1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.dropout(self.embedding(ids))
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    return Encoder().eval()


def export(module: torch.nn.Module, path: Path, exporter: str, opset: int) -> None:
    ids = torch.randint(0, 50, (2, 6))
    names = {"input_names": ["ids"], "output_names": ["hidden"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "legacy":
            axes = {"ids": {0: "batch", 1: "seq"}}
            torch.onnx.export(module, (ids,), path, dynamo=False, opset_version=opset, dynamic_axes=axes, **names)
        else:
            dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")},)
            torch.onnx.export(
                module, (ids,), path, dynamo=True, opset_version=opset, dynamic_shapes=dims, verbose=False, **names
            )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("exporter", "opset", "approximate"),
    [
        ("legacy", 13, "none"),
        ("legacy", 13, "tanh"),
        ("legacy", 17, "none"),
        ("dynamo", 18, "tanh"),
        pytest.param("dynamo", 18, "none", marks=SLOW),
        pytest.param("dynamo", 21, "none", marks=SLOW),
        pytest.param("dynamo", 21, "tanh", marks=SLOW),
    ],
)
def test_both_exporters_come_to_one_form(tmp_path: Path, exporter: str, opset: int, approximate: str) -> None:
    module = encoder(approximate)
    export(module, tmp_path / "source.onnx", exporter, opset)
    prepared = prepare(tmp_path / "source.onnx", tmp_path / "out.onnx")
    assert prepared.max_relative_difference is not None
    assert prepared.max_relative_difference <= 1e-4
    model = files.load(prepared.path)
    counts = ops(model)
    assert (counts["LayerNormalization"], counts["Gelu"], counts["Softmax"]) == (4, 2, 2)
    assert counts["MatMul"] + counts["Gemm"] == 16
    assert not {"Erf", "Tanh", "ReduceMean", "Sqrt", "Identity", "Dropout", "Constant", "Pow"} & set(counts)
    weights = [n.inputs[1] for n in model.graph if n.op_type == "MatMul" and n.inputs[1].is_initializer()]
    assert len(weights) == 12
    for shape in ((1, 3), (4, 9)):
        ids = torch.randint(0, 50, shape)
        got = run(session(prepared.path), None, {"ids": ids.numpy()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(got, module(ids).numpy(), rtol=1e-4, atol=1e-5)
