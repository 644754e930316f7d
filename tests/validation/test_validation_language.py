"""Perplexity against scipy's log softmax on a bigram model, whose prediction needs the last token only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax
from tokenizers import Tokenizer, models, pre_tokenizers

from calibrators.data.open import open_data
from calibrators.data.spec import DataSpec
from calibrators.data.windows import windows
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Validation
from pipeline.types import TensorInfo
from pipeline.validation.language import Perplexity
from pipeline.validation.tasks import open_task

WORDS = 11
TABLE = np.random.default_rng(0).normal(size=(WORDS, WORDS)).astype(np.float32) * 3
IDS = TensorInfo(name="input_ids", dtype=np.dtype(np.int64), shape=("batch", "tokens"))
MASK = TensorInfo(name="attention_mask", dtype=np.dtype(np.int64), shape=("batch", "tokens"))


class Bigrams:
    """Logits are the last token's row of a table; at padding they are nonsense that must not count."""

    inputs = (IDS, MASK)
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(self, name: str = "logits") -> None:
        self.name = name

    def infer(self, feeds):
        logits = TABLE[feeds["input_ids"]]
        logits[feeds["attention_mask"] == 0] = np.nan
        return {self.name: logits}

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None: ...


def expected(*texts: np.ndarray) -> tuple[float, float]:
    pairs = np.concatenate([np.stack([t[:-1], t[1:]], 1) for t in texts])
    losses = -log_softmax(TABLE.astype(np.float64), axis=1)[pairs[:, 0], pairs[:, 1]]
    return float(np.exp(losses.mean())), float((TABLE.argmax(1)[pairs[:, 0]] == pairs[:, 1]).mean())


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    found = Tokenizer(models.WordLevel({str(i): i for i in range(WORDS)}, unk_token="0"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "0"}')
    return tmp_path


@pytest.mark.parametrize("left", [False, True], ids=["padded at the end", "padded at the start"])
def test_samples_are_scored_each_on_its_own_and_padding_is_left_out(left: bool, list_data) -> None:
    draw = np.random.default_rng(1)
    texts = [draw.integers(0, WORDS, n) for n in (7, 4, 1, 9)]
    ids, mask = np.zeros((4, 9), np.int64), np.zeros((4, 9), np.int64)
    for row, text in enumerate(texts):
        place = slice(9 - len(text), 9) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    batches = [{"input_ids": ids[:3], "attention_mask": mask[:3]}, {"input_ids": ids[3:], "attention_mask": mask[3:]}]
    found = Perplexity().score(Bigrams(), list_data(batches))
    perplexity, accuracy = expected(*texts)
    assert found == {"perplexity": pytest.approx(perplexity), "next_token_accuracy": pytest.approx(accuracy)}


@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8])
def test_a_text_s_tokens_count_once_whatever_the_stride(tokenizer: Path, tmp_path: Path, stride: int | None) -> None:
    tokens = np.random.default_rng(2).integers(0, WORDS, 45)
    (tmp_path / "text.txt").write_text(" ".join(map(str, tokens)))
    spec = DataSpec(data="text.txt", tokenizer=tokenizer, max_length=8, batch_size=3)
    text = windows(tmp_path / "text.txt", spec, (IDS, MASK), stride=stride)
    found = Perplexity(text=text).score(Bigrams(), [])
    # Without overlap a window's first token has nothing before it.
    whole = expected(tokens) if stride in (1, 3, 7) else expected(*(tokens[i : i + 8] for i in range(0, 45, 8)))
    assert (found["perplexity"], found["next_token_accuracy"]) == (pytest.approx(whole[0]), pytest.approx(whole[1]))


def test_joined_records_fill_windows(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "records.txt").write_text("1 2 3\n4 5\n6 7 8 9\n10 1\n")
    spec = DataSpec(data=str(tmp_path / "records.txt"), tokenizer=tokenizer, max_length=4, batch_size=3, join=True)
    (batch,) = list(open_data(spec, (IDS, MASK)))
    np.testing.assert_array_equal(batch["input_ids"], [[1, 2, 3, 4], [5, 6, 7, 8]])  # 9, 10, 1 fill none
    assert batch["attention_mask"].all()
    assert len(open_data(replace(spec, samples=1), (IDS, MASK))) == 1
    with pytest.raises(DataError, match="have 11 tokens and fill no window of 16"):
        open_data(replace(spec, max_length=16), (IDS, MASK))
    np.savez(tmp_path / "arrays.npz", input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.raises(DataError, match="Only texts can be joined"):
        open_data(replace(spec, data=str(tmp_path / "arrays.npz")), (IDS, MASK))


def test_the_recipe_s_text_is_opened_with_its_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("1 2 3 4 5 6 7")
    section = Validation(task="perplexity", labels=str(tmp_path / "text.txt"), tokenizer=tokenizer, max_length=4)
    task = open_task(section, (IDS, MASK))
    assert isinstance(task, Perplexity)
    assert task.text is not None
    assert task.text.scored_from == (0, 0)
    assert open_task(Validation(task="perplexity"), (IDS, MASK)) == Perplexity()
    with pytest.raises(RecipeError, match="perplexity"):
        open_task(Validation(task="perplexety"), (IDS, MASK))


def test_what_cannot_be_scored_is_said(tokenizer: Path, tmp_path: Path, list_data) -> None:
    spec = DataSpec(data="text.txt", tokenizer=tokenizer, max_length=4, batch_size=3)
    (tmp_path / "short.txt").write_text("1")
    with pytest.raises(DataError, match="has 1 tokens; two are the least"):
        windows(tmp_path / "short.txt", spec, (IDS, MASK))
    with pytest.raises(DataError, match="stride 5 is not within"):
        windows(tmp_path / "short.txt", spec, (IDS, MASK), stride=5)
    with pytest.raises(DataError, match="cannot be read"):
        windows(tmp_path / "none.txt", spec, (IDS, MASK))
    one = {"input_ids": np.ones((1, 1), np.int64), "attention_mask": np.ones((1, 1), np.int64)}
    with pytest.raises(DataError, match="nothing to predict"):
        Perplexity().score(Bigrams(), list_data([one]))
    with pytest.raises(DataError, match="Token 12 is none of the 11"):
        Perplexity().score(Clipped(), list_data([{**one, "input_ids": np.full((1, 1), 12)}]))


class Clipped(Bigrams):
    def infer(self, feeds):
        return super().infer({**feeds, "input_ids": feeds["input_ids"] % WORDS})
