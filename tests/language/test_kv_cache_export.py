"""Causal language models with past keys and values as inputs and outputs, against transformers' own generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.errors import RecipeError, SourceError
from pipeline.recipe import Source, parse
from pipeline.sources import folder, torch_jobs
from pipeline.sources.export import export
from pipeline.sources.job import Job
from pipeline.types import silent
from pipeline.validation.decoding import Decoder, greedy
from tests.language.conftest import LLAMA
from tests.sources.test_source_huggingface import GPT2, TEXT, dims, save

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("LlamaForCausalLM", LLAMA),
    "learned positions": ("GPT2LMHeadModel", GPT2),
    "sliding window": ("MistralForCausalLM", {**TEXT, "num_key_value_heads": 2, "sliding_window": 6}),
}
PROMPT = (5, 17, 80, 44, 9)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.replace(" ", "-"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("cached")
    path = save(root / "model", *KINDS[request.param])
    found = folder.inspect(path)
    job = Job(kind="huggingface", target=str(path), opset=21, task=found.task, kv_cache=True)
    assert torch_jobs.run(job, root, silent) < 1e-5
    return path, root / "exported.onnx"


def own(path: Path) -> Any:
    """The model that transformers loads by itself, with its default attention, masks and cache."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()


def test_greedy_decoding_gives_transformers_tokens(model: tuple[Path, Path]) -> None:
    with torch.no_grad():
        wanted = own(model[0]).generate(
            torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(PROMPT) :]
    with OnnxRuntimeRunner(model[1]) as runner:
        found = greedy(Decoder(runner), PROMPT, 20)
    assert found.tokens == tuple(wanted.tolist())
    assert len(found.step_ms) == 19


def test_decoding_in_any_pieces_equals_the_whole_sequence(model: tuple[Path, Path]) -> None:
    tokens = np.random.default_rng(1).integers(3, 98, 23)
    with torch.no_grad():
        wanted = own(model[0])(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy()
    with OnnxRuntimeRunner(model[1]) as runner:
        decoder = Decoder(runner)
        for pieces in ((23,), (1,) * 23, (10, 1, 1, 8, 3)):
            decoder.reset()
            ends = np.cumsum(pieces)
            rows = [decoder.feed(tokens[end - size : end]) for size, end in zip(pieces, ends, strict=True)]
            assert np.abs(np.concatenate(rows) - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_names_and_shapes_are_those_that_optimum_reads(model: tuple[Path, Path]) -> None:
    found = dims(model[1])
    heads = 4 if "n_embd" in model[0].joinpath("config.json").read_text() else 2
    assert found["input_ids"] == found["position_ids"] == ["batch", "sequence"]
    assert found["attention_mask"][0] == "batch"
    assert found["logits"][:2] == ["batch", "sequence"]
    size = found["past_key_values.0.key"][3]
    for layer in (0, 1):
        for kind in ("key", "value"):
            assert found[f"past_key_values.{layer}.{kind}"] == ["batch", heads, "past_sequence", size]
            assert found[f"present.{layer}.{kind}"][:2] == ["batch", heads]
    assert len(found) == 3 + 1 + 8


def test_rows_of_different_lengths_decode_together_with_padding_in_front(model: tuple[Path, Path]) -> None:
    """What position_ids are for: a batch as Optimum and others feed it."""
    rows: Sequence[Sequence[int]] = ((5, 17, 80, 44, 9, 31), (7, 8))
    with OnnxRuntimeRunner(model[1]) as runner:
        alone = []
        for row in rows:
            decoder = Decoder(runner)
            decoder.feed(row)
            alone.append(decoder.feed([11])[0])
        mask = np.array([[1] * 6, [0] * 4 + [1] * 2])
        ids = np.array([rows[0], [0, 0, 0, 0, *rows[1]]])
        empty = {
            i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32) for i in runner.inputs if "past" in i.name
        }
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        first = runner.infer({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **empty})
        past = {name.replace("present", "past_key_values"): v for name, v in first.items() if "present" in name}
        longer = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        step = {"input_ids": np.full((2, 1), 11), "attention_mask": longer, "position_ids": mask.sum(1)[:, None]}
        together = runner.infer({**step, **past})["logits"][:, 0]
    wanted = np.stack(alone)
    assert np.abs(together - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_only_a_causal_language_model_has_a_cache(tmp_path: Path) -> None:
    path = save(tmp_path / "bert", "BertModel", TEXT)
    with pytest.raises(SourceError, match="exported for feature-extraction"):
        export(Source(huggingface=str(path), kv_cache=True), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"kv_cache is for huggingface sources"):
        parse({"source": {"onnx": "model.onnx", "kv_cache": True}})


def test_a_state_that_is_no_key_and_value_per_token_is_refused(tmp_path: Path) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 8, "expand": 2}
    path = save(tmp_path / "mamba", "MambaForCausalLM", config)
    with pytest.raises(SourceError, match="cache is not keys and values") as raised:
        export(Source(huggingface=str(path), kv_cache=True), tmp_path / "out")
    assert "source.kv_cache" in raised.value.fix


def test_the_same_folder_gives_the_same_bytes(model: tuple[Path, Path], tmp_path: Path) -> None:
    job = Job(kind="huggingface", target=str(model[0]), opset=21, task="causal-lm", kv_cache=True)
    torch_jobs.run(job, tmp_path, silent)
    assert (tmp_path / "exported.onnx").read_bytes() == model[1].read_bytes()
    graph = onnx.load(model[1], load_external_data=False).graph
    assert all(not node.metadata_props for node in graph.node)
