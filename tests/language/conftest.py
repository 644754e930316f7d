"""A tiny random Llama with grouped-query attention and a word tokenizer, exported and built with its key-value cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.build import BuildOptions, BuildResult, build
from pipeline.recipe import parse
from tests.sources.test_source_huggingface import TEXT, save

WORDS = 100
LLAMA: dict[str, Any] = {
    **TEXT,
    "hidden_size": 64,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def words(seed: int, count: int) -> str:
    return " ".join(map(str, np.random.default_rng(seed).integers(3, WORDS, count)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models decode faster in torch with one thread, and on a busy machine by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder; beside it calibration.txt, heldout.txt, text.txt and prompts.txt."""
    root = tmp_path_factory.mktemp("llama")
    folder = save(root / "llama", "LlamaForCausalLM", LLAMA)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(WORDS)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "0", "eos_token": "1"}))
    for seed, (name, lines) in enumerate({"calibration": 24, "heldout": 8}.items()):
        text = "".join(words(seed * 100 + line, 30) + "\n" for line in range(lines))
        (root / f"{name}.txt").write_text(text)
    (root / "text.txt").write_text(words(7, 90))
    (root / "prompts.txt").write_text("3 4 5 6\n70 8 91\n\n12 13\n")
    return folder


def recipe(llama: Path, **sections: Any) -> dict[str, Any]:
    """The usual recipe, as its values; a section given here is merged into it."""
    root = llama.parent
    values: dict[str, Any] = {
        "name": "llama",
        "source": {"huggingface": str(llama), "kv_cache": True},
        "calibration": {"data": str(root / "calibration.txt"), "method": "minmax"},
        "policy": {"rules": [{"role": "kv_cache", "precision": "int8"}]},
        "validate": {
            "data": str(root / "heldout.txt"),
            "latency": False,
            "task": "perplexity",
            "labels": str(root / "text.txt"),
            "max_length": 32,
            "stride": 16,
            "prompts": str(root / "prompts.txt"),
            "new_tokens": 12,
        },
        "threads": 1,
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


@pytest.fixture(scope="session")
def built(llama: Path) -> tuple[Path, BuildResult]:
    """An INT8 build for ``cpu`` and, simulated, for an A100, with an INT8 cache."""
    out = llama.parent / "build"
    wanted = recipe(llama, targets=["cpu", "a100"], triton={"max_batch_size": 4})
    return out, build(parse(wanted), out, options=BuildOptions())
