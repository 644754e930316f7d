"""Roles on small graphs that are easily mistaken for one another."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from pipeline.graph.roles import find_roles
from pipeline.graph.roles.flow import Flow
from pipeline.types import NodeRole, Role
from tests import zoo

WIDTH = 16


def _export(module: nn.Module, *shapes: tuple[int, ...], folder: Path) -> ir.Model:
    inputs = {f"x{index}": torch.randn(shape) for index, shape in enumerate(shapes)}
    sample = zoo.Sample(module=module.eval(), inputs=inputs, dynamic={name: {0: "batch"} for name in inputs})
    return ir.load(zoo.export_sample(sample, "legacy", folder / "model.onnx"))


def _layers(model: ir.Model) -> list[Role]:
    """Roles of the layers with weights, in topological order."""
    roles = find_roles(model)
    return [roles[node.name or ""].role for node in Flow(model.graph).weights]


def _of(model: ir.Model, op_type: str) -> list[NodeRole]:
    roles = find_roles(model)
    return [roles[node.name or ""] for node in model.graph if node.op_type == op_type]


class _ConvAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3)
        self.query, self.key, self.value, self.out = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(image))
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        scores = torch.softmax(query.transpose(1, 2) @ key / 4, dim=-1)
        return x + self.out((value @ scores.transpose(1, 2)).reshape(x.shape))


def test_attention_of_1x1_convolutions(tmp_path: Path) -> None:
    model = _export(_ConvAttention(), (1, 3, 8, 8), folder=tmp_path)
    projections = [Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE, Role.ATTENTION_OUTPUT]
    assert _layers(model) == [Role.CONV_STEM, *projections]
    assert [found.role for found in _of(model, "MatMul")] == [Role.ATTENTION_SCORES, Role.ATTENTION_CONTEXT]


class _EinsumAttention(nn.Module):
    """Scores with the key as first operand: only the equation tells which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bkd,bqd->bqk", self.key(x), self.query(x)) / 4
        return x + self.out(torch.einsum("bqk,bkd->bqd", torch.softmax(scores, dim=-1), self.value(x)))


def test_einsum_attention(tmp_path: Path) -> None:
    model = _export(_EinsumAttention(), (1, 5, WIDTH), folder=tmp_path)
    assert _layers(model) == [Role.ATTENTION_KEY, Role.ATTENTION_QUERY, Role.ATTENTION_VALUE, Role.ATTENTION_OUTPUT]
    assert [found.role for found in _of(model, "Einsum")] == [Role.ATTENTION_SCORES, Role.ATTENTION_CONTEXT]


class _SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(image))
        y = self.conv(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3))))))
        return torch.relu(x + y * gate[:, :, None, None]).mean((2, 3))


def test_squeeze_and_excite_is_no_feed_forward(tmp_path: Path) -> None:
    model = _export(_SqueezeExcite(), (1, 3, 8, 8), folder=tmp_path)
    roles = _layers(model)
    assert roles[:2] == [Role.CONV_STEM, Role.CONV]
    assert not {Role.FFN_UP, Role.FFN_GATE, Role.FFN_DOWN} & set(roles)
    assert [found.role for found in _of(model, "Add")] == [Role.RESIDUAL_ADD]


class _Feed(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(nn.functional.silu(self.up(self.norm(x))))


class _Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out(torch.softmax(query @ key.transpose(1, 2) / 4, dim=-1) @ value)


FEED, ATTEND = [Role.FFN_UP, Role.FFN_DOWN], [Role.ATTENTION_QKV, Role.ATTENTION_OUTPUT]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # A conformer's block starts with half a feed-forward and ends with the other half.
        (lambda: [_Feed(0.5), _Attend(), _Feed(0.5)] * 2, [FEED, ATTEND, FEED, FEED, ATTEND, FEED]),
        # MobileBERT stacks several behind one attention.
        (lambda: [_Attend(), _Feed(), _Feed(), _Attend(), _Feed(), _Feed()], [ATTEND, FEED, FEED] * 2),
        (lambda: [_Feed(), _Feed()], [FEED, FEED]),
        (lambda: [_Attend(), _Attend()], [ATTEND, ATTEND]),
    ],
    ids=["macaron", "stacked", "feed-forward only", "attention only"],
)
def test_blocks_of_other_orders(
    make: Callable[[], list[nn.Module]], expected: list[list[Role]], tmp_path: Path
) -> None:
    stem = nn.Linear(4, WIDTH)
    model = _export(nn.Sequential(stem, *make()), (1, 5, 4), folder=tmp_path)
    roles = find_roles(model)
    found = [roles[node.name or ""] for node in Flow(model.graph).weights][1:]
    assert [item.role for item in found] == [role for part in expected for role in part]
    half = len(found) // 2
    assert [item.block for item in found] == [0] * half + [1] * half


def test_classifier_of_plain_layers(tmp_path: Path) -> None:
    layers = [nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3), nn.Softmax(-1)]
    model = _export(nn.Sequential(*layers), (1, 8), folder=tmp_path)
    assert _layers(model) == [Role.LINEAR, Role.LINEAR, Role.HEAD]
    assert [found.role for found in _of(model, "Softmax")] == [Role.OTHER]


def test_an_only_layer_is_no_head(tmp_path: Path) -> None:
    assert _layers(_export(nn.Linear(8, 4), (1, 8), folder=tmp_path)) == [Role.LINEAR]


class _Sums(nn.Module):
    """Adds that are not residual: bias, constant position, two branches side by side, a broadcast condition."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.condition = nn.Linear(3, WIDTH)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        both = self.left(x) + self.right(x) + self.position
        return torch.relu(both) + self.condition(condition)[:, None]


def test_sums_that_are_not_residual(tmp_path: Path) -> None:
    model = _export(_Sums(), (1, 5, 8), (1, 3), folder=tmp_path)
    assert len(_of(model, "Add")) >= 4
    assert not [found for found in _of(model, "Add") if found.role is Role.RESIDUAL_ADD]


def _fused(core: str, *, packed: bool = False) -> ir.Model:
    """Two projections styles around a fused attention node, written as text."""
    split = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)" if not packed else "q = MatMul(x, wqkv)"
    text = f"""
    <ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
    model (float[b, s, 16] x) => (float[b, s, 16] y) {{
        {split}
        c = {core}
        o = MatMul(c, wo)
        r = Add(x, o)
        u = MatMul(r, wu)
        a = Relu(u)
        d = MatMul(a, wd)
        y = Add(r, d)
    }}"""
    model = ir.from_onnx_text(text)
    sizes = {"wq": 16, "wk": 16, "wv": 16, "wqkv": 48, "wo": 16, "wu": 32}
    weights = {name: np.zeros((16, width), np.float32) for name, width in sizes.items()}
    weights["wd"] = np.zeros((32, 16), np.float32)
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in weights:
                constant = model.graph.initializers.get(value.name) or ir.Value(
                    name=value.name, const_value=ir.tensor(weights[value.name], name=value.name)
                )
                model.graph.initializers[value.name] = constant
                node.replace_input_with(index, constant)
    return model


@pytest.mark.parametrize(
    "core",
    [
        "Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)",
        "com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v)",
        "com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2> (q, k, v)",
    ],
)
def test_fused_attention_is_the_context(core: str) -> None:
    roles = find_roles(_fused(core))
    projections = [Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE]
    tail = [Role.ATTENTION_OUTPUT, Role.RESIDUAL_ADD, Role.FFN_UP, Role.OTHER, Role.FFN_DOWN, Role.RESIDUAL_ADD]
    # The text names no nodes, so they go by their outputs.
    assert [roles[name] for name in "qkvcoruady"] == [
        NodeRole(role=role, block=0) for role in (*projections, Role.ATTENTION_CONTEXT, *tail)
    ]


def test_fused_attention_with_packed_projections() -> None:
    roles = find_roles(_fused("com.microsoft.MultiHeadAttention <num_heads = 2> (q)", packed=True))
    assert [roles[name].role for name in "qco"] == [
        Role.ATTENTION_QKV,
        Role.ATTENTION_CONTEXT,
        Role.ATTENTION_OUTPUT,
    ]


def test_time_grows_linearly(tmp_path: Path) -> None:
    """Twice the layers (BERT-large's 24: the shape of its graph, not its sizes) take about twice the time."""
    times = {}
    for count in (12, 24):
        layers = [layer for _ in range(count) for layer in (_Attend(), _Feed())]
        (tmp_path / str(count)).mkdir()
        model = _export(nn.Sequential(nn.Linear(4, WIDTH), *layers), (1, 5, 4), folder=tmp_path / str(count))
        runs = []
        for _ in range(3):
            start = time.process_time()
            roles = find_roles(model)
            runs.append(time.process_time() - start)
        times[count] = min(runs)
        assert sum(found.role is Role.ATTENTION_SOFTMAX for found in roles.values()) == count
    assert times[24] < 3 * times[12]
