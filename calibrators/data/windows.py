"""Text as windows of tokens: one text with overlap, to score it, or many joined, as a causal language model reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrators.data.batches import Batches, Sample
from calibrators.data.records import records
from calibrators.data.spec import DataSpec
from calibrators.data.template import Template
from calibrators.data.text import Encoder, encoder_of
from pipeline.errors import DataError
from pipeline.types import Array, CalibrationData, TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows of a text as model inputs.

    Attributes:
        batches: One sample a window, in the text's order.
        scored_from: For each window the index of its first token that no window before had.
    """

    batches: CalibrationData
    scored_from: tuple[int, ...]


def windows(path: Path, spec: DataSpec, inputs: Sequence[TensorInfo], *, stride: int | None = None) -> Windows:
    """Return the windows of a text file, read whole as one text; no special tokens are added.

    Args:
        path: UTF-8 text.
        spec: Its tokenizer, ``max_length`` (tokens of a window) and batch size are used.
        inputs: The model's inputs.
        stride: Tokens from one window's start to the next one's; ``None`` is ``max_length``, windows without overlap.

    Raises:
        DataError: The file cannot be read or holds fewer than two tokens; the stride is more than a window; the tokenizer
            and the model's inputs do not go together.
    """
    encoder = encoder_of(spec, inputs)
    size = encoder.length or encoder.tokenizer.max_length
    step = stride if stride is not None else size
    if not 1 <= step <= size:
        raise DataError(f"The stride {step} is not within 1 and the window's {size} tokens.", where="validate.stride")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The text cannot be read: {error}", where=str(path), fix="Give a UTF-8 text file.") from error
    (ids,) = encoder.tokenizer.tokens([text])
    if len(ids) < 2:
        raise DataError(
            f"The text has {len(ids)} tokens; two are the least.", where=str(path), fix="Give a longer text."
        )
    starts: list[tuple[int, int]] = []
    done = 0
    while done < len(ids):
        starts.append((len(starts) * step, done))
        done = min(starts[-1][0] + size, len(ids))
    parts = [ids[start : start + size] for start, _ in starts]
    return Windows(
        batches=_batches(parts, encoder, spec, str(path)), scored_from=tuple(seen - start for start, seen in starts)
    )


def joined(path: Path, spec: DataSpec, inputs: Sequence[TensorInfo]) -> CalibrationData:
    """Return the records of a ``.jsonl`` or ``.txt`` file joined to one text and cut into windows of ``spec.max_length`` tokens.

    A newline stands between records, no special tokens are added, and the tokens that fill no window are left out.

    Raises:
        DataError: The file, template, tokenizer or model's inputs do not go together, or no window is filled.
    """
    encoder, template = encoder_of(spec, inputs), Template(spec.template)
    size = encoder.length or encoder.tokenizer.max_length
    texts = (f"{template.render(record, where)}\n" for where, record in records(path))
    rest, parts = np.zeros(0, np.int64), list[Array]()
    for ids in encoder.tokenizer.tokens(texts):
        rest = np.concatenate([rest, ids])
        while len(rest) >= size and len(parts) < spec.samples:
            parts.append(rest[:size])
            rest = rest[size:]
        if len(parts) == spec.samples:
            break
    if not parts:
        raise DataError(
            f"The records together have {len(rest)} tokens and fill no window of {size}.",
            where=str(path),
            fix="Give more text, lower max_length, or set join to false.",
        )
    return _batches(parts, encoder, spec, str(path))


def _batches(parts: Sequence[Array], encoder: Encoder, spec: DataSpec, where: str) -> Batches:
    samples = _Samples(parts, encoder, where=where)
    return Batches(samples, encoder.fit, batch_size=spec.batch_size, collate=encoder.collate)


class _Samples:
    def __init__(self, parts: Sequence[Array], encoder: Encoder, *, where: str) -> None:
        self.where = where
        self._parts, self._encoder = parts, encoder

    def kinds(self) -> Iterable[Hashable]:
        return [None if self._encoder.padded else part.size for part in self._parts]

    def __iter__(self) -> Iterator[Sample]:
        for index, (part, kind) in enumerate(zip(self._parts, self.kinds(), strict=True)):
            feeds = {"input_ids": part, "token_type_ids": np.zeros_like(part)}
            yield Sample(where=f"{self.where}, window {index}", feeds=feeds, kind=kind)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([part.tolist() for part in self._parts]).encode()).hexdigest()
