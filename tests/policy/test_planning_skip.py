"""Skip lists and the outlier threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from calibrators.sketch import Sketch
from pipeline import model as models
from pipeline.cli import app
from pipeline.errors import RecipeError
from pipeline.graph.prepare import prepare
from pipeline.graph.roles import find_roles
from pipeline.notices import collecting
from pipeline.policy.planning import Evidence, plan
from pipeline.policy.remarks import remark
from pipeline.policy.rules import candidates
from pipeline.policy.skip import named, outlier_ratios
from pipeline.recipe import PolicyConfig, RuleConfig, parse
from pipeline.types import Precision
from tests import zoo
from tests.policy.planned import entry
from tests.policy.test_planning_rules import chain


@pytest.mark.parametrize(
    ("pattern", "node", "met"),
    [
        ("lm_head", "/lm_head/MatMul", True),
        ("lm_head", "model.lm_head.MatMul", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "/lm_head_norm/MatMul", False),
        ("lm_head", "/my_lm_head/MatMul", False),
        ("layer.1", "/encoder/layer.1/ffn/MatMul", True),
        ("layer.1", "/encoder/layer.11/ffn/MatMul", False),
        ("*/layer.1/*", "/encoder/layer.1/ffn/MatMul", True),
        ("*/layer.1/*", "/encoder/layer.11/ffn/MatMul", False),
        ("*head*", "/lm_head_norm/MatMul", True),
        ("proj+out", "/projjout/MatMul", False),
    ],
)
def test_a_skip_entry_is_a_glob_or_the_name_of_a_module(pattern: str, node: str, met: bool) -> None:
    assert named(pattern, node) is met


@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_what_is_skipped_stays_high_even_where_a_rule_asks_for_int8(family: str) -> None:
    model, roles = chain()
    policy = PolicyConfig(rules=(RuleConfig(role="ffn", precision=Precision.INT8),), skip=("down",))
    made = plan(model, roles, policy, family)
    high = Precision.FP32 if family == "cpu" else Precision.FP16
    assert entry(made, "/layer.1/down").precision is high
    assert entry(made, "/layer.1/down").rule == "skip: down"
    assert entry(made, "/layer.0/up").precision is Precision.INT8


def test_an_outlier_ratio_is_the_largest_magnitude_over_the_99_9th_percentile() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[7] = -400.0
    sketch = Sketch()
    sketch.update(values)
    expected = 400.0 / np.quantile(np.abs(values), 0.999)
    assert outlier_ratios({"x": sketch})["x"] == pytest.approx(expected, rel=5e-3)


def test_a_node_that_reads_outliers_stays_high() -> None:
    model, roles = chain()
    up, down = (next(n for n in model.graph if n.name == name) for name in ("/layer.0/up", "/layer.1/down"))
    outliers = {up.inputs[0].name: 90.0, down.inputs[0].name: 3.0}
    made = plan(model, roles, PolicyConfig(outlier_threshold=50), "cpu", Evidence(outliers=outliers))
    assert entry(made, "/layer.0/up").precision is Precision.FP32
    assert entry(made, "/layer.0/up").rule.startswith("outliers: ")
    assert entry(made, "/layer.1/down").precision is Precision.INT8
    unlimited = plan(model, roles, PolicyConfig(), "cpu", Evidence(outliers=outliers))
    assert entry(unlimited, "/layer.0/up").precision is Precision.INT8


def test_a_skip_entry_that_names_nothing_is_told_with_the_nearest_name() -> None:
    model, roles = chain()
    policy = PolicyConfig(skip=("layer.7",))
    with collecting() as notices:
        remark(plan(model, roles, policy, "cpu"), candidates(model, roles), policy)
    assert [n.code for n in notices] == ["skip-unmatched"]
    assert "/layer." in notices[0].message


def test_a_skip_list_may_be_text_with_commas_and_a_threshold_must_exceed_one() -> None:
    recipe = parse({"source": {"onnx": "m.onnx"}, "policy": {"skip": "lm_head, embed_tokens"}})
    assert recipe.policy.skip == ("lm_head", "embed_tokens")
    with pytest.raises(RecipeError, match="outlier_threshold"):
        parse({"source": {"onnx": "m.onnx"}, "policy": {"outlier_threshold": 0.5}})


class NormOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Denoiser(nn.Module):
    """The modules that people leave out of quantization, by the names that transformers and diffusers give them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm_out = NormOut()
        self.proj_out = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 64, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(torch.nn.functional.gelu(self.proj_out(self.norm_out(x))))


@pytest.fixture(scope="module", params=["legacy", "dynamo"])
def denoiser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The canonical graph of what one of torch's exporters made, as a user's own file."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 9))
    sample = zoo.Sample(
        module=Denoiser().eval(), inputs={"input_ids": ids}, dynamic={"input_ids": {0: "batch", 1: "tokens"}}
    )
    folder = tmp_path_factory.mktemp("denoiser")
    prepare(zoo.export_sample(sample, request.param, folder / "source.onnx"), folder / "model.onnx")
    return folder / "model.onnx"


def high(path: Path, *skip: str, **policy: object) -> set[str]:
    """Weights that stay in FP32 because of the policy, by the torch module that they belong to."""
    model = models.load(path)
    roles = find_roles(model)
    rules = ({"role": "head", "precision": "int8"}, {"role": "embedding", "precision": "int8"})

    def planned(made: PolicyConfig) -> dict[str, Precision]:
        return {n.node: n.precision for n in plan(model, roles, made, "cpu", Evidence(outliers=ratios))}

    ratios = policy.pop("ratios", {})
    every = planned(PolicyConfig.model_validate({"rules": rules}))
    left = planned(PolicyConfig.model_validate({"rules": rules, "skip": skip, **policy}))
    changed = {name for name, precision in every.items() if precision is not left[name]}
    assert all(every[name] is Precision.INT8 and left[name] is Precision.FP32 for name in changed)
    found = {c.name: c.names[-1] for c in candidates(model, roles)}
    return {found[name].rpartition("/")[0].lstrip("/") for name in changed}


@pytest.mark.parametrize(
    ("pattern", "modules"),
    [
        ("lm_head", {"lm_head"}),
        ("embed_tokens", {"embed_tokens"}),
        ("proj_out", {"proj_out"}),
        ("norm_out", {"norm_out/linear"}),
        ("blocks.1", {"blocks.1/up", "blocks.1/down"}),
        ("*/blocks.0/*", {"blocks.0/up", "blocks.0/down"}),
        ("*_out/*", {"proj_out", "norm_out/linear"}),
        ("lm", set()),
    ],
)
def test_modules_of_an_exported_graph_are_skipped_by_name(denoiser: Path, pattern: str, modules: set[str]) -> None:
    assert high(denoiser, pattern) == modules


def test_several_modules_are_skipped_together_and_by_a_rule_of_the_same_name(denoiser: Path) -> None:
    named = {"lm_head", "embed_tokens", "proj_out"}
    assert high(denoiser, *named, "norm_out") == named | {"norm_out/linear"}
    model = models.load(denoiser)
    rules = (RuleConfig(name="*/proj_out/*", precision=Precision.FP32),)
    made = plan(model, find_roles(model), PolicyConfig(rules=rules), "cpu")
    assert [n.node for n in made if n.rule.startswith("recipe") and n.op_type in ("MatMul", "Gemm")] == [
        c.name
        for c in candidates(model, find_roles(model))
        if c.operands is not None and c.operands.weight is not None and "/proj_out/" in c.names[-1]
    ]


def test_what_an_exported_graph_reads_with_outliers_is_skipped(denoiser: Path) -> None:
    model = models.load(denoiser)
    read = {c.names[-1]: c.node.inputs[0].name for c in candidates(model, find_roles(model)) if c.operands is not None}
    outlier = next(tensor for name, tensor in read.items() if "/proj_out/" in name)
    assert high(denoiser, outlier_threshold=50, ratios={outlier: 60.0}) == {"proj_out"}
    assert high(denoiser, outlier_threshold=70, ratios={outlier: 60.0}) == set()


def test_the_command_line_says_what_a_skip_list_names_in_vain(denoiser: Path, tmp_path: Path) -> None:
    skip = ["--policy.skip", "lm_head,mm_projector", "--policy.activations", "dynamic"]
    made = CliRunner().invoke(app, ["build", str(denoiser), "--dry-run", "-o", str(tmp_path / "b"), *skip])
    assert made.exit_code == 0, made.output
    said = " ".join(made.stderr.split())
    assert "No node is named 'mm_projector'" in said
    assert "'lm_head'" not in said
    assert "skip: lm_head" in " ".join(made.stdout.split())
