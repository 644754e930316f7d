"""Words in pictures for PP-OCRv4's text recognition network, a task that scores whole words, and the recipe that uses them.

    pip install '.[images,triton]' && pip install --no-deps rapidocr-onnxruntime==1.4.4
    python examples/pp_ocr.py build/pp-ocr
    python -m pipeline build --recipe build/pp-ocr/pipeline.yaml      # from the repository's root

The network comes from the package ``rapidocr-onnxruntime`` (which is not imported), the words from the topics that Python's own
help carries, the fonts from the system (DejaVu). Written into the folder:

``calibration.npz``, ``heldout.npz``
    ``x`` [n, 3, 48, 320] float32 in -1 to 1: one word a picture, with noise, blur, tilt and uneven contrast. No word is in both.
``words.json``
    The held-out words in order, and the characters of the network's classes (0 is the blank).
``pipeline.yaml``
    The recipe. Its task is :func:`word_accuracy` in this file.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import yaml
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HEIGHT, WIDTH = 48, 320
INPUT = "x"
CALIBRATION, HELD_OUT = 64, 200
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "DejaVuSerif-Bold", "DejaVuSans-Oblique")

Floats = npt.NDArray[np.float32]


def main(folder: Path) -> None:
    """Write the pictures, the words and the recipe into ``folder``."""
    model = network()
    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary(CALIBRATION + HELD_OUT)
    draw = np.random.default_rng(0)
    pictures = np.stack([rendered(word, draw) for word in words])
    np.savez(folder / "calibration.npz", **{INPUT: pictures[HELD_OUT:]})
    np.savez(folder / "heldout.npz", **{INPUT: pictures[:HELD_OUT]})
    labels = {"words": words[:HELD_OUT], "characters": characters(model)}
    (folder / "words.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(recipe(model), sort_keys=False), encoding="utf-8")
    print(f"{CALIBRATION} words to calibrate on, {HELD_OUT} held out: {folder}")
    print(f"next: python -m pipeline build --recipe {folder}/pipeline.yaml")


def recipe(model: Path) -> dict[str, object]:
    """Return the recipe; its data files are beside it."""
    return {
        "name": "pp-ocr",
        "source": {"onnx": str(model)},
        "calibration": {"data": "calibration.npz", "samples": CALIBRATION},
        "policy": {"preset": "int8"},
        "targets": ["cpu"],
        "validate": {
            "data": "heldout.npz",
            "samples": HELD_OUT,
            "task": "examples.pp_ocr:word_accuracy",
            "labels": "words.json",
            "trust_data": True,
            "gates": {"task.word_accuracy": ">= 98% of fp32"},
        },
    }


def word_accuracy(runner: Any, data: Any, labels: Path) -> dict[str, float]:
    """Return the share of words whose every character is right.

    Args:
        runner: FP32 or the engine; its only output is [batch, steps, classes], softmax over the classes.
        data: The held-out batches.
        labels: ``words.json``.
    """
    known = json.loads(labels.read_text(encoding="utf-8"))
    read: list[str] = []
    for feeds in data:
        (probabilities,) = runner.infer(feeds).values()
        read += [decoded(row, known["characters"]) for row in probabilities]
    return {"word_accuracy": float(np.mean([a == b for a, b in zip(read, known["words"], strict=True)]))}


def decoded(probabilities: Floats, classes: list[str]) -> str:
    """Return the best path of a CTC output [steps, classes], repeats and blanks (class 0) taken out."""
    best = probabilities.argmax(axis=1)
    kept = [c for c, before in zip(best, [0, *best[:-1]], strict=True) if c not in (0, before)]
    return "".join(classes[c] for c in kept)


def network() -> Path:
    """Return the recognition network's file in the installed package."""
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or spec.origin is None:
        raise SystemExit("The model's package is not installed: pip install --no-deps rapidocr-onnxruntime==1.4.4")
    return Path(spec.origin).parent / "models" / "ch_PP-OCRv4_rec_infer.onnx"


def characters(model: Path) -> list[str]:
    """Return the character of each class, from the ONNX file's metadata; class 0 is the blank, the last one a space."""
    stored = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    return ["", *stored["character"].split("\n"), " "]


def vocabulary(count: int) -> list[str]:
    """Return different words of 3 to 14 letters, in a drawn but fixed order."""
    found = sorted(set(re.findall(r"[A-Za-z]{3,14}", " ".join(topics.topics.values()))))
    if len(found) < count:
        raise SystemExit(f"Python's help has {len(found)} words and {count} are asked for")
    return [str(word) for word in np.random.default_rng(1).permutation(found)[:count]]


def rendered(word: str, draw: np.random.Generator) -> Floats:
    """Return a picture of a word as the network reads it: float32 [3, 48, 320] in -1 to 1, 0 to the right of the word."""
    font = ImageFont.truetype(f"{draw.choice(FONTS)}.ttf", int(draw.integers(22, 40)))
    left, top, right, bottom = font.getbbox(word)
    margin = int(draw.integers(3, 10))
    paper, ink = int(draw.integers(150, 256)), int(draw.integers(0, 90))
    size = int(right - left) + 2 * margin, int(bottom - top) + 2 * margin
    picture = Image.new("L", size, paper)
    ImageDraw.Draw(picture).text((margin - left, margin - top), word, font=font, fill=ink)
    picture = picture.rotate(float(draw.uniform(-3, 3)), Image.Resampling.BILINEAR, fillcolor=paper)
    picture = picture.filter(ImageFilter.GaussianBlur(float(draw.uniform(0, 1.2))))
    width = min(WIDTH, max(1, round(HEIGHT * size[0] / size[1])))
    pixels = np.asarray(picture.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)
    pixels = np.clip(pixels + draw.normal(0, draw.uniform(0, 12), pixels.shape), 0, 255)
    image = np.zeros((3, HEIGHT, WIDTH), np.float32)
    image[:, :, :width] = pixels / 127.5 - 1
    return image


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/pp_ocr.py DIR")
    main(Path(sys.argv[1]))
