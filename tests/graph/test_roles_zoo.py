"""Roles on exports of real architectures: which GEMM is which is told by the torch module's own weights."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.graph.prepare import prepare
from pipeline.graph.roles import find_roles
from pipeline.graph.roles.flow import Flow, initializer, node_key
from pipeline.types import NodeRole, Role
from tests import zoo

ROLE = {
    "query": Role.ATTENTION_QUERY,
    "key": Role.ATTENTION_KEY,
    "value": Role.ATTENTION_VALUE,
    "qkv": Role.ATTENTION_QKV,
    "output": Role.ATTENTION_OUTPUT,
    "up": Role.FFN_UP,
    "gate": Role.FFN_GATE,
    "down": Role.FFN_DOWN,
    "head": Role.HEAD,
    "stem": Role.CONV_STEM,
    "depthwise": Role.DEPTHWISE_CONV,
}
OUTSIDE_BLOCKS = ("head", "stem", "depthwise")
TRANSFORMERS = [name for name in zoo.ZOO if name not in ("cnn", "cross_attention")]
DEFAULT = {("bert", "dynamo"), ("gpt2", "dynamo"), ("llama", "dynamo"), ("vit", "dynamo"), ("fused_qkv", "dynamo")}


def _cases(names: list[str]) -> list[object]:
    """Everything from the legacy exporter (0.2 s each) and a cross section from the slower one."""
    pairs = [(name, exporter) for name in names for exporter in ("legacy", "dynamo")]
    return [
        pytest.param(*pair, marks=() if pair[1] == "legacy" or pair in DEFAULT else pytest.mark.slow, id="-".join(pair))
        for pair in pairs
    ]


@functools.cache
def _load(name: str, exporter: zoo.Exporter, form: str) -> tuple[ir.Model, dict[str, NodeRole]]:
    path: Path = zoo.exported(name, exporter)
    if form == "canonical":
        path = prepare(path, path.with_name(f"canonical-{path.name}")).path
    model = ir.load(path)
    return model, find_roles(model)


def _nodes(model: ir.Model, roles: dict[str, NodeRole], role: Role) -> list[ir.Node]:
    return [node for node in model.graph if roles[node_key(node)].role is role]


def _weight(flow: Flow, node: ir.Node) -> np.ndarray:
    value = initializer(flow.weights[node])
    assert value.const_value is not None
    return value.const_value.numpy()


@pytest.mark.parametrize("form", ["raw", "canonical"])
@pytest.mark.parametrize(("name", "exporter"), _cases([*TRANSFORMERS, "cross_attention", "cnn"]))
def test_each_layer_holds_the_weight_of_the_torch_layer_of_that_role(
    name: str, exporter: zoo.Exporter, form: str
) -> None:
    model, roles = _load(name, exporter, form)
    flow = Flow(model.graph)
    for kind, expected in zoo.build(name).weights.items():
        nodes = _nodes(model, roles, ROLE[kind])
        assert len(nodes) == len(expected), kind
        for index, (node, weight) in enumerate(zip(nodes, expected, strict=True)):
            wanted = weight.detach().numpy()
            found = _weight(flow, node)
            if kind in ("stem", "depthwise"):  # a batch norm may be folded in: each filter is then a multiple
                filters, scaled = (array.reshape(len(wanted), -1) for array in (wanted, found))
                factor = np.linalg.norm(scaled, axis=1) / np.linalg.norm(filters, axis=1)
                np.testing.assert_allclose(scaled, filters * factor[:, None], rtol=1e-4, atol=1e-6)
            elif found.shape != wanted.shape or not np.array_equal(found, wanted):
                np.testing.assert_array_equal(found.T, wanted, err_msg=kind)
            block = None if kind in OUTSIDE_BLOCKS else index * zoo.LAYERS // len(expected)
            assert roles[node_key(node)].block == block


@pytest.mark.parametrize("form", ["raw", "canonical"])
@pytest.mark.parametrize(("name", "exporter"), _cases(TRANSFORMERS))
def test_every_layer_has_one_core_and_nothing_is_left_over(name: str, exporter: zoo.Exporter, form: str) -> None:
    model, roles = _load(name, exporter, form)
    for role in (Role.ATTENTION_SCORES, Role.ATTENTION_SOFTMAX, Role.ATTENTION_CONTEXT):
        assert [roles[node_key(node)].block for node in _nodes(model, roles, role)] == list(range(zoo.LAYERS)), role
    adds = 1 if name == "gpt_neox" else 2  # attention and FFN in parallel share theirs
    blocks = [roles[node_key(node)].block for node in _nodes(model, roles, Role.RESIDUAL_ADD)]
    assert blocks == sorted([*range(zoo.LAYERS)] * adds)
    assert not _nodes(model, roles, Role.LINEAR)
    assert len(roles) == len({node_key(node) for node in model.graph})


@pytest.mark.parametrize("form", ["raw", "canonical"])
@pytest.mark.parametrize(
    ("name", "exporter", "inside", "outside"),
    [
        ("bert", "legacy", 2, 1),  # post-norm: the embedding's norm is outside
        ("bert", "dynamo", 2, 1),
        ("gpt2", "legacy", 2, 1),  # pre-norm: the final norm is outside
        ("gpt2", "dynamo", 2, 1),
        ("vit", "legacy", 2, 1),
        ("llama", "dynamo", 14, 7),  # RMSNorm written out in seven nodes
        pytest.param("qwen3", "dynamo", 28, 7, marks=pytest.mark.slow),  # and on query and key
    ],
)
def test_norms_are_counted_in_their_blocks(
    name: str, exporter: zoo.Exporter, form: str, inside: int, outside: int
) -> None:
    model, roles = _load(name, exporter, form)
    blocks = [roles[node_key(node)].block for node in _nodes(model, roles, Role.NORM)]
    assert [blocks.count(number) for number in (0, 1, None)] == [inside, inside, outside]


@pytest.mark.parametrize(
    ("name", "embeddings"), [("bert", 3), ("gpt2", 2), ("llama", 1), ("vit", 0), ("cnn", 0), ("t5_encoder", 2)]
)
def test_embeddings(name: str, embeddings: int) -> None:
    model, roles = _load(name, "legacy", "canonical")
    assert len(_nodes(model, roles, Role.EMBEDDING)) == embeddings


@pytest.mark.parametrize("form", ["raw", "canonical"])
def test_cross_attention_shares_the_block_of_the_self_attention_before_it(form: str) -> None:
    model, roles = _load("cross_attention", "legacy", form)
    found = [
        (roles[node_key(node)].role, roles[node_key(node)].block)
        for node in Flow(model.graph).weights
        if roles[node_key(node)].block is not None
    ]
    # Self-attention has one GEMM for all three; cross-attention one for the query, one for key and value.
    attention = [Role.ATTENTION_QKV, Role.ATTENTION_OUTPUT, Role.ATTENTION_QUERY, Role.ATTENTION_QKV]
    layer = [*attention, Role.ATTENTION_OUTPUT, Role.FFN_UP, Role.FFN_DOWN]
    assert found == [(role, block) for block in range(zoo.LAYERS) for role in layer]


@pytest.mark.parametrize("form", ["raw", "canonical"])
def test_convolutions(form: str) -> None:
    model, roles = _load("cnn", "legacy", form)
    counts = {role: len(_nodes(model, roles, role)) for role in (Role.CONV_STEM, Role.DEPTHWISE_CONV, Role.CONV)}
    # Three blocks of expand and project, one with a projected shortcut.
    assert counts == {Role.CONV_STEM: 1, Role.DEPTHWISE_CONV: 3, Role.CONV: 7}
    assert len(_nodes(model, roles, Role.RESIDUAL_ADD)) == 3
