"""Greedy generation and token agreement: on chains whose answers are known, and through a whole build."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from scipy.special import log_softmax

from calibrators.data.spec import DataSpec
from calibrators.data.text import encoder_of
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.build import BuildResult
from pipeline.errors import DataError, PublishError, RecipeError
from pipeline.recipe import TritonConfig, Validation
from pipeline.triton.ensemble import tokenizer_files, write_ensemble
from pipeline.triton.served import onnx_model
from pipeline.types import TensorInfo, silent
from pipeline.validation.decoding import Decoder, greedy
from pipeline.validation.generation import Prompts, generate, open_prompts
from pipeline.validation.measurement import Measurements, Mode
from pipeline.validation.thresholds import Status, judge
from tests.language.conftest import WORDS

IDS = TensorInfo(name="input_ids", dtype=np.dtype(np.int64), shape=("batch", "tokens"))
MASK = TensorInfo(name="attention_mask", dtype=np.dtype(np.int64), shape=("batch", "tokens"))


class Chain:
    """Names ``after[token]`` as the next token, whatever came before."""

    inputs = (IDS, MASK)
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(self, after: dict[int, int]) -> None:
        self.table = np.full((WORDS, WORDS), -1.0, np.float32)
        for token in range(WORDS):
            self.table[token, after.get(token, (token + 1) % WORDS)] = 1.0

    def infer(self, feeds):
        assert feeds["attention_mask"].shape == feeds["input_ids"].shape
        return {"logits": self.table[feeds["input_ids"]]}

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None: ...


def prompts(llama: Path, *texts: str, new_tokens: int = 6) -> Prompts:
    (llama.parent / "some.txt").write_text("\n".join(texts))
    section = Validation(prompts=str(llama.parent / "some.txt"), tokenizer=llama, new_tokens=new_tokens)
    found = open_prompts(section, (IDS, MASK))
    assert found is not None
    return found


def test_a_model_without_a_cache_is_decoded_too_and_stops_at_the_end_of_text() -> None:
    decoder = Decoder(Chain({12: 1}))
    assert greedy(decoder, [7, 8], 4).tokens == (9, 10, 11, 12)
    assert greedy(decoder, [7, 8], 9, stop=[1]).tokens == (9, 10, 11, 12, 1)


def test_agreement_follows_fp32_and_counts_a_difference_once(llama: Path) -> None:
    # The variant goes 12 -> 50 where FP32 goes 12 -> 13; fed with 13 it agrees again.
    found = generate(Chain({}), Chain({12: 50}), prompts(llama, "3 10", "30"), timed=False, progress=silent)
    assert [(r.fp32, r.engine) for r in found.prompts] == [
        ("11 12 13 14 15 16", "11 12 50 51 52 53"),
        ("31 32 33 34 35 36", "31 32 33 34 35 36"),
    ]
    assert [(r.tokens, r.agreed_tokens, r.same_tokens, r.identical) for r in found.prompts] == [
        (6, 5, 2, False),
        (6, 6, 6, True),
    ]
    assert found.token_agreement == pytest.approx(11 / 12)
    assert found.identical == 0.5
    assert found.fp32_step_ms is found.engine_step_ms is None  # it was not the engine that ran


def test_gates_on_generation(llama: Path) -> None:
    found = generate(Chain({}), Chain({12: 50}), prompts(llama, "3 10", "30"), timed=True, progress=silent)
    assert found.engine_step_ms is not None
    assert found.engine_step_ms > 0
    measured = Measurements(mode=Mode.MEASURED, samples=1, threads=1, generation=found)
    assert judge(measured, {"generation.token_agreement": ">= 0.9"}).status is Status.PASSED
    assert judge(measured, {"generation.identical": ">= 0.9"}).status is Status.FAILED
    nothing = Measurements(mode=Mode.MEASURED, samples=1, threads=1)
    assert judge(nothing, {"generation.identical": ">= 0.9"}).status is Status.NOT_MEASURED
    with pytest.raises(RecipeError, match=r"Did you mean generation\.token_agreement"):
        judge(measured, {"generation.token_agrement": ">= 0.9"})
    with pytest.raises(RecipeError, match="no FP32 figure"):
        judge(measured, {"generation.identical": ">= 99% of fp32"})
    assert Measurements.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_prompts_that_cannot_be_used_are_said(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(DataError, match="holds no prompt"):
        open_prompts(Validation(prompts=str(tmp_path / "none.txt"), tokenizer=llama), (IDS, MASK))
    with pytest.raises(DataError, match="one a line"):
        open_prompts(Validation(prompts="prompts.npz", tokenizer=llama), (IDS, MASK))
    with pytest.raises(DataError, match="cannot be read"):
        open_prompts(Validation(prompts=str(tmp_path / "gone.txt"), tokenizer=llama), (IDS, MASK))
    pixels = TensorInfo(name="pixel_values", dtype=np.dtype(np.float32), shape=("batch", 3, 8, 8))
    picture = Chain({})
    picture.inputs = (pixels,)
    with pytest.raises(DataError, match="does not decode"):
        Decoder(picture)
    extra = Chain({})
    extra.inputs = (IDS, MASK, pixels)
    with pytest.raises(DataError, match="inputs that tokens do not fill"):
        Decoder(extra)


def test_the_build_says_what_was_generated(built: tuple[Path, BuildResult], llama: Path) -> None:
    report = built[1].report
    assert report is not None
    for target in ("cpu", "a100"):
        found = report["validation"][target]["generation"]
        assert [row["prompt"] for row in found["prompts"]] == ["3 4 5 6", "70 8 91", "12 13"]
        assert found["token_agreement"] > 0.5
        assert (found["engine_step_ms"] is not None) == (target == "cpu")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(llama / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    for row in report["validation"]["cpu"]["generation"]["prompts"]:
        ids = torch.tensor([[int(word) for word in row["prompt"].split()]])
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0)
        assert row["fp32"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    page = (built[0] / "report.html").read_text()
    assert "70 8 91" in page
    assert "token by token" in built[1].summary
    assert "generation: " in built[1].summary


def test_an_int8_cache_is_served_and_decodes_as_it_prefills(built: tuple[Path, BuildResult]) -> None:
    tokens = np.random.default_rng(5).integers(3, WORDS, 20)
    with OnnxRuntimeRunner(built[0] / "engines/cpu/model.onnx") as runner:
        caches = [info for info in runner.inputs if info.name.startswith("past_key_values.")]
        assert {info.dtype for info in caches} == {np.dtype(np.int8)}
        decoder = Decoder(runner)
        whole = decoder.feed(tokens)
        decoder.reset()
        steps = np.concatenate([decoder.feed([token]) for token in tokens])
    assert np.abs(steps - whole).max() <= 1e-3 * np.abs(whole).max()


def test_the_build_s_perplexity_is_the_formula_s(built: tuple[Path, BuildResult], llama: Path) -> None:
    """Windows of 32 with a stride of 16 over the float model, with scipy and torch."""
    assert built[1].report is not None
    ids = np.array([int(word) for word in (llama.parent / "text.txt").read_text().split()])
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    losses: list[float] = []
    done = 1
    for start in range(0, len(ids), 16):
        window = ids[start : start + 32]
        with torch.no_grad():
            logits = model(torch.from_numpy(window)[None]).logits[0].double().numpy()
        scores = log_softmax(logits, axis=-1)
        losses += [-scores[place - 1, window[place]] for place in range(max(done - start, 1), len(window))]
        done = max(done, start + len(window))
        if done == len(ids):
            break
    task = built[1].report["validation"]["cpu"]["task"]
    assert task["fp32"]["perplexity"] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-4)
    assert task["engine"]["perplexity"] == pytest.approx(task["fp32"]["perplexity"], rel=0.05)


def test_the_plan_names_the_cache_and_the_rule(built: tuple[Path, BuildResult]) -> None:
    assert built[1].report is not None
    found = [n for n in built[1].report["precision_plan"] if n["role"] == "kv_cache"]
    assert {(n["variant"], n["precision"], n["rule"]) for n in found} == {
        ("cpu", "int8", "recipe {role: kv_cache, precision: int8}"),
        ("gpu-int8", "int8", "recipe {role: kv_cache, precision: int8}"),
    }
    assert len(found) == 2 * 4


def test_no_ensemble_of_texts_is_published_around_a_cache(
    built: tuple[Path, BuildResult], llama: Path, tmp_path: Path
) -> None:
    model = onnx_model(built[0] / "engines/cpu/model.onnx", name="llama")
    encoder = encoder_of(DataSpec(data="texts", tokenizer=llama), model.inputs)
    with pytest.raises(PublishError, match="no client that keeps the model's key-value cache"):
        write_ensemble(tmp_path, model, TritonConfig(ensemble="text"), tokenizer_files(encoder))
