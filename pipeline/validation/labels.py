"""Reads labels: class numbers aligned with the samples, or pairs of texts with a score."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.types import Array

IGNORE = -100
"""A label that counts for nothing: padding and special tokens, as in transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pairs of texts and how similar people found them.

    Attributes:
        texts: Every text once, in order of appearance.
        pairs: ``[n, 2]`` int64, indices into ``texts``.
        scores: ``[n]`` float64.
    """

    texts: tuple[str, ...]
    pairs: Array
    scores: Array


def read_labels(path: Path) -> Array:
    """Return class numbers, int64: ``[samples]``, or ``[samples, tokens]`` where -100 counts for nothing.

    ``.npy``: an integer array. ``.txt``: a number a line. ``.jsonl``: a number, a list of numbers (one a token;
    shorter lists are filled with -100), or an object with one of these under ``label``, a line.

    Raises:
        DataError: The file cannot be read or holds something else.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        labels = _npy(path)
    elif suffix in (".txt", ".jsonl"):
        labels = _stack([_label(value, where) for where, value in _lines(path, as_json=suffix == ".jsonl")])
    else:
        raise DataError(f"Labels are not read from {suffix or path.name} files.", where=str(path), fix=_FORMATS)
    if not labels.size:
        raise DataError("The file holds no labels.", where=str(path), fix=_FORMATS)
    return labels


_FORMATS = 'Give .npy (integers), .txt (a number a line) or .jsonl (a number, a list or {"label": …} a line).'


def read_pairs(path: Path) -> Pairs:
    """Return the pairs of a ``.jsonl`` file with ``{"text_a": …, "text_b": …, "score": …}`` a line.

    Raises:
        DataError: The file cannot be read, a line is something else, or there are fewer than two pairs.
    """
    texts: dict[str, int] = {}
    pairs, scores = [], []
    for where, record in _lines(path, as_json=True):
        keys = ("text_a", "text_b", "score")
        if not isinstance(record, dict) or any(key not in record for key in keys):
            raise DataError("The line is no pair.", where=where, fix='Write {"text_a": …, "text_b": …, "score": …}.')
        a, b, score = (record[key] for key in keys)
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not (isinstance(a, str) and isinstance(b, str) and number):
            raise DataError("text_a and text_b must be texts and score a number.", where=where)
        if not a.strip() or not b.strip():
            raise DataError("A text is empty.", where=where, fix="Leave the pair out.")
        pairs.append([texts.setdefault(text, len(texts)) for text in (a, b)])
        scores.append(float(score))
    if len(pairs) < 2:
        raise DataError("A correlation needs at least two pairs.", where=str(path), fix="Give more pairs.")
    return Pairs(texts=tuple(texts), pairs=np.asarray(pairs, np.int64), scores=np.asarray(scores, np.float64))


def _lines(path: Path, *, as_json: bool) -> list[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(
            f"The labels cannot be read: {error.strerror}.", where=str(path), fix="Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError("The labels are no UTF-8 text.", where=str(path), fix="Save them as UTF-8.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    values = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            values.append((where, json.loads(line) if as_json else int(line)))
        except ValueError as error:
            kind = "JSON" if as_json else "whole number"
            raise DataError(f"The line is no {kind}: {line.strip()[:60]!r}.", where=where) from error
        except RecursionError as error:
            raise DataError("The line is nested too deeply.", where=where) from error
    return values


def _label(value: Any, where: str) -> list[int] | int:
    if isinstance(value, dict):
        value = value.get("label")
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or abs(item) > 2**31 for item in items):
        raise DataError(
            f"The label is no class number: {json.dumps(value)[:60]}.",
            where=where,
            fix="Give the numbers of the classes, in the order of the model's outputs.",
        )
    return items if isinstance(value, list) else items[0]


def _stack(labels: list[list[int] | int]) -> Array:
    rows = [label for label in labels if isinstance(label, list)]
    if not rows:
        return np.asarray(labels, np.int64)
    if len(rows) != len(labels):
        raise DataError(
            "Some lines hold one label and others a list.", fix="Give a label a sample, or a list a sample."
        )
    stacked = np.full((len(rows), max(map(len, rows))), IGNORE, np.int64)
    for index, row in enumerate(rows):
        stacked[index, : len(row)] = row
    return stacked


def _npy(path: Path) -> Array:
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"The labels cannot be read: {error}", where=str(path), fix=_FORMATS) from error
    if not isinstance(labels, np.ndarray) or not np.issubdtype(labels.dtype, np.integer) or labels.ndim not in (1, 2):
        raise DataError("Labels must be integers, one or two axes.", where=str(path), fix=_FORMATS)
    return labels.astype(np.int64)
