"""What a Hugging Face folder is accepted or refused for, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import MissingError, SourceError
from pipeline.recipe import Source
from pipeline.sources import folder, hub
from pipeline.sources.export import Exported, export


def make(path: Path, weights: str = "model.safetensors", **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    values = {"model_type": "bert", "architectures": ["BertModel"], **config}
    (path / "config.json").write_text(json.dumps(values))
    (path / weights).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    return path


def test_an_onnx_file_is_returned_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert export(Source(onnx=path), tmp_path / "out") == Exported(onnx=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("BertForSequenceClassification", "sequence-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("LlamaForCausalLM", "causal-lm"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertForQuestionAnswering", "question-answering"),
    ],
)
def test_the_task_is_read_from_the_architecture(tmp_path: Path, architecture: str, task: str) -> None:
    found = folder.inspect(make(tmp_path, architectures=[architecture]))
    assert (found.path, found.task, found.pooled) == (tmp_path, task, True)


def test_a_given_task_wins_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    make(tmp_path, architectures=["BertForMaskedLM"])
    assert folder.inspect(tmp_path, task="feature-extraction").task == "feature-extraction"
    with pytest.raises(SourceError, match="no task 'embedding'"):
        folder.inspect(tmp_path, task="embedding")
    make(tmp_path, architectures=["BertForPreTraining"])
    with pytest.raises(SourceError, match="BertForPreTraining"):
        folder.inspect(tmp_path)


def test_sentence_transformers_exports_the_transformer_without_pooler(tmp_path: Path) -> None:
    make(tmp_path / "0_Transformer")
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    found = folder.inspect(tmp_path)
    assert found.path == tmp_path / "0_Transformer"
    assert not found.pooled
    modules[0]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(SourceError, match="no transformer in it"):
        folder.inspect(tmp_path)


@pytest.mark.parametrize(
    ("config", "message", "fix"),
    [
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "own Python code", "remove auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantized already", "full-precision"),
        ({"is_encoder_decoder": True}, "encoder-decoder", "source.module"),
        ({"text_config": {}, "vision_config": {}}, "text and images", "source.module"),
        ({"model_type": ""}, "no model_type", "save_pretrained"),
    ],
)
def test_a_config_that_cannot_be_exported_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str, fix: str
) -> None:
    make(tmp_path, **config)
    with pytest.raises(SourceError, match=message) as caught:
        folder.inspect(tmp_path)
    assert fix in caught.value.fix
    assert "config.json" in caught.value.where


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
def test_pickled_weights_are_refused_by_name_with_the_way_out(tmp_path: Path, name: str) -> None:
    make(tmp_path, weights=name)
    with pytest.raises(SourceError, match=name) as caught:
        folder.inspect(tmp_path)
    assert "save_pretrained" in caught.value.fix


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(SourceError, match="Git LFS"):
        folder.inspect(tmp_path)
    for name in ("model-00001-of-00002.safetensors", "../outside.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(SourceError, match="not in the folder"):
            folder.inspect(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="no weights"):
        folder.inspect(tmp_path)


@pytest.mark.parametrize(
    ("file", "fix"), [("adapter_config.json", "merge"), ("model_index.json", "diffusers"), ("a.onnx", "a.onnx")]
)
def test_a_folder_without_config_says_what_it_is_instead(tmp_path: Path, file: str, fix: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(SourceError, match=r"no config\.json") as caught:
        folder.inspect(tmp_path)
    assert fix in caught.value.fix


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(SourceError, match="JSON"):
        folder.inspect(tmp_path)


def test_names_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="names a file"):
        hub.local_folder(str(tmp_path / "file"))
    for name in ("nowhere", "./a/b", "/a/b", "a/b/c"):
        with pytest.raises(SourceError, match="no such folder"):
            hub.local_folder(name)


def test_a_hub_id_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match="cannot be reached") as caught:
        hub.local_folder("no-such-org/no-such-model")
    assert "name its folder" in caught.value.fix


@pytest.mark.parametrize("source", [Source(module="a:b"), Source(pt2=Path("a.pt2"))])
def test_code_of_the_user_runs_only_where_it_is_trusted(tmp_path: Path, source: Source) -> None:
    with pytest.raises(SourceError, match="is code") as caught:
        export(source, tmp_path)
    assert "trust_source" in caught.value.fix


def test_a_missing_pt2_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        export(Source(pt2=tmp_path / "a.pt2", trust_source=True), tmp_path)
