"""Reader of text: records through a template and a tokenizer to whatever a transformer takes.

Makes ``input_ids``, ``attention_mask``, ``token_type_ids`` and ``position_ids``, those of them that the model has. A key-value
cache is empty: every text starts anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from calibrators.data.batches import Batches, Sample
from calibrators.data.fit import Fit, shown
from calibrators.data.records import records
from calibrators.data.spec import DataSpec
from calibrators.data.template import Template
from calibrators.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline import kv_cache
from pipeline.errors import DataError
from pipeline.model import sha256
from pipeline.notices import notice
from pipeline.types import Array, CalibrationData, Feeds, TensorInfo

MADE = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""Inputs that a text gives values for."""

Texts = Callable[[], Iterator[tuple[str, str]]]
"""Reads ``(where, text)`` from the start."""


def text_file(path: Path, spec: DataSpec, inputs: Sequence[TensorInfo]) -> CalibrationData:
    """Return the texts of a ``.jsonl`` or ``.txt`` file as model inputs.

    Raises:
        DataError: The file, template, tokenizer or model's inputs do not go together.
    """
    template = Template(spec.template)

    def read() -> Iterator[tuple[str, str]]:
        filled = ((where, template.render(record, where)) for where, record in records(path))
        return islice(((where, text) for where, text in filled if text.strip()), spec.samples)

    encoder = encoder_of(spec, inputs)
    skipped = _skipped(path, template, spec.samples)
    if skipped:
        notice(
            "empty-text", f"{skipped} records have no text and are left out (so must their labels be).", where=str(path)
        )
    return _batches(TextSamples(read, encoder, where=str(path), content=sha256(path) + spec.template), spec)


def texts(values: Sequence[str], spec: DataSpec, inputs: Sequence[TensorInfo]) -> CalibrationData:
    """Return texts already in memory as model inputs: all of them, in order, with the spec's tokenizer and lengths.

    Raises:
        DataError: The tokenizer and the model's inputs do not go together.
    """
    content = hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()

    def read() -> Iterator[tuple[str, str]]:
        return ((f"text {index}", value) for index, value in enumerate(values))

    return _batches(TextSamples(read, encoder_of(spec, inputs), where="texts", content=content), spec)


def _batches(samples: TextSamples, spec: DataSpec) -> Batches:
    return Batches(samples, samples.encoder.fit, batch_size=spec.batch_size, collate=samples.encoder.collate)


def _skipped(path: Path, template: Template, limit: int) -> int:
    """Return how many empty records come before the last one read; reads, and so checks, all of these."""
    kept = empty = 0
    for where, record in records(path):
        if template.render(record, where).strip():
            kept += 1
        else:
            empty += 1
        if kept == limit:
            break
    return empty


class TextSamples:
    """Texts as token ids, tokenized anew in every reading.

    Args:
        read: Gives ``(where, text)`` from the start.
        encoder: Makes the model's inputs.
        where: What to call the data in errors.
        content: Stands for the texts in the digest.
    """

    def __init__(self, read: Texts, encoder: Encoder, *, where: str, content: str) -> None:
        self.where = where
        self.encoder = encoder
        self._read = read
        self._content = content

    def kinds(self) -> Iterable[Hashable]:
        """Return every sample's kind: its length if samples must not be padded, else one for all."""
        if self.encoder.padded:
            return [None for _ in self._read()]
        return [sample.kind for sample in self]

    def __iter__(self) -> Iterator[Sample]:
        """Tokenize the texts."""
        for where, text in self._read():
            ids, types = self.encoder.tokenizer.encode(text)
            if not ids.size:
                raise DataError("The text gives no tokens.", where=where, fix="Leave it out of the data.")
            kind = None if self.encoder.padded else ids.size
            yield Sample(where=where, feeds={"input_ids": ids, "token_type_ids": types}, kind=kind)

    def digest(self) -> str:
        """Return the SHA-256 of texts, template, tokenizer and lengths."""
        tokenizer = self.encoder.tokenizer
        facts = [self._content, [sha256(file) for file in tokenizer.files], tokenizer.max_length, self.encoder.length]
        return hashlib.sha256(json.dumps([*facts, sum(1 for _ in self._read())]).encode()).hexdigest()


class Encoder:
    """Token ids of several samples as one batch of the model's inputs.

    Args:
        fit: The model's inputs.
        tokenizer: The tokenizer.
        length: The model's fixed sequence length; ``None`` pads to the longest in the batch.
        padded: Whether samples of different lengths share a batch. Without an ``attention_mask`` input padding
            would count as text, so then only equal lengths do.
    """

    def __init__(self, fit: Fit, tokenizer: TextTokenizer, *, length: int | None, padded: bool) -> None:
        self.fit, self.tokenizer, self.length, self.padded = fit, tokenizer, length, padded

    def collate(self, samples: Sequence[Sample]) -> Feeds:
        """Return a batch, each array ``[batch, tokens]`` in the model's type."""
        lengths = [sample.feeds["input_ids"].size for sample in samples]
        width = self.length or max(lengths)
        mask = np.zeros((len(samples), width), np.int64)
        ids = np.full(mask.shape, self.tokenizer.pad_id or 0, np.int64)
        types = np.full(mask.shape, self.tokenizer.pad_type_id, np.int64)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            place = slice(width - length, width) if self.tokenizer.pad_left else slice(0, length)
            mask[row, place] = 1
            ids[row, place] = sample.feeds["input_ids"]
            types[row, place] = sample.feeds["token_type_ids"]
        # The first real token is at position 0 on whichever side the padding is; padding gets a valid position.
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        made: dict[str, Array] = dict(zip(MADE, (ids, mask, types, positions), strict=True))
        return {
            info.name: kv_cache.empty(info, len(samples))
            if kv_cache.is_past(info.name)
            else made[info.name].astype(info.dtype, copy=False)
            for info in self.fit.inputs
        }


def encoder_of(spec: DataSpec, inputs: Sequence[TensorInfo]) -> Encoder:
    """Return what makes batches of the model's inputs from tokens of the spec's tokenizer.

    Raises:
        DataError: The tokenizer and the model's inputs do not go together.
    """
    fit = Fit.of(inputs)
    for info in inputs:
        _check_input(info)
    if "input_ids" not in {info.name for info in inputs}:
        raise DataError(
            f"The model has no input named input_ids, so text cannot be fed to it; it has "
            f"{', '.join(info.name for info in inputs)}.",
            where=spec.data,
            fix="Give tokenized data as .npz with an array per input.",
        )
    if fit.complete:
        raise DataError(
            "The model's inputs have different fixed batch dimensions: "
            + ", ".join(f"{info.name} {shown(info.shape)}" for info in inputs),
            where=spec.data,
            fix="Export the model with one batch dimension, or give the data as a folder of .npz, one a run.",
        )
    if spec.tokenizer is None:
        raise DataError(
            "Text needs a tokenizer.", where=spec.data, fix="Set `tokenizer` to the model's folder or tokenizer.json."
        )
    length = _fixed_length(inputs)
    tokenizer = load_tokenizer(spec.tokenizer, max_length=length or spec.max_length)
    masked = any(info.name == "attention_mask" for info in inputs)
    encoder = Encoder(fit, tokenizer, length=length, padded=masked or length is not None)
    pads = length is not None or (masked and fit.batch_size(spec.batch_size) > 1)
    if pads and tokenizer.pad_id is None:
        raise DataError(
            "The tokenizer has neither a pad nor an eos token, so texts of different lengths make no batch.",
            where=str(spec.tokenizer),
            fix="Name a pad_token in tokenizer_config.json, or set batch_size: 1.",
        )
    if length is not None and not masked:
        notice(
            "padding-not-masked",
            f"The model has a fixed length of {length} and no attention_mask, so padding counts as text.",
            where=spec.data,
        )
    return encoder


def _check_input(info: TensorInfo) -> None:
    name = info.name.lower()
    if kv_cache.is_past(info.name):
        kv_cache.empty(info, 1)
        return
    if info.name not in MADE:
        cached = any(part in name for part in ("past", "cache", ".key", ".value"))
        raise DataError(
            f"The model takes past key/value input {info.name!r}, which text cannot fill."
            if cached
            else f"The model's input {info.name!r} cannot be made from text; {', '.join(MADE)} can.",
            where=f"input {info.name}",
            fix="Export the model with source.kv_cache, whose inputs are named past_key_values.<layer>.key and .value."
            if cached
            else "Give the data as .npz with an array per input.",
        )
    if len(info.shape) != 2:
        raise DataError(
            f"The model's input {info.name!r} has shape {shown(info.shape)}; text makes [batch, tokens].",
            where=f"input {info.name}",
            fix="Give the data as .npz with an array per input.",
        )
    if info.dtype.kind not in ("i", "u") and info.name != "attention_mask":
        raise DataError(
            f"The model's input {info.name!r} is {info.dtype}; text makes integers.",
            where=f"input {info.name}",
            fix="Give the data as .npz with an array per input.",
        )


def _fixed_length(inputs: Sequence[TensorInfo]) -> int | None:
    tokens = [info for info in inputs if not kv_cache.is_past(info.name)]
    fixed = {info.name: info.shape[1] for info in tokens if isinstance(info.shape[1], int)}
    if len(set(fixed.values())) > 1:
        raise DataError(
            f"The model's inputs have different fixed lengths: {fixed}.",
            fix="Give the data as .npz with an array per input.",
        )
    length = next(iter(fixed.values()), None)
    return length if isinstance(length, int) else None
