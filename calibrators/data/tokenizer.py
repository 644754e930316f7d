"""Tokenizers from a Hugging Face folder, read through ``tokenizers`` alone: nothing in the folder is executed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError, MissingError
from pipeline.notices import notice
from pipeline.types import Array

_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokenizer:
    """A tokenizer and how it pads.

    Attributes:
        max_length: Longer sequences are cut to this many tokens, special tokens included.
        pad_id: Token id of padding; ``None`` if the tokenizer has neither a pad nor an eos token.
        pad_type_id: Token type of padding.
        eos_id: Token id of the end of a text; ``None`` if the tokenizer names none.
        pad_left: Whether padding comes first, as decoders want it.
        files: Every file that decides the tokens.
    """

    max_length: int
    pad_id: int | None
    pad_type_id: int
    pad_left: bool
    eos_id: int | None
    files: tuple[Path, ...]
    _tokenizer: Any

    def encode(self, text: str) -> tuple[Array, Array]:
        """Return token ids and token type ids of a text, each ``[tokens]`` int64, special tokens added."""
        encoding = self._tokenizer.encode(text)
        return np.array(encoding.ids, np.int64), np.array(encoding.type_ids, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def to_json(self) -> str:
        """Return the tokenizer as the text of a ``tokenizer.json``, with its truncation and without padding."""
        return str(self._tokenizer.to_str())

    def tokens(self, texts: Iterable[str]) -> Iterator[Array]:
        """Yield the token ids of whole texts, each ``[tokens]`` int64: nothing cut, no special tokens."""
        whole = type(self._tokenizer).from_str(self._tokenizer.to_str())
        whole.no_truncation()
        for text in texts:
            yield np.array(whole.encode(text, add_special_tokens=False).ids, np.int64)


def load_tokenizer(path: Path, *, max_length: int) -> TextTokenizer:
    """Return the tokenizer of a ``tokenizer.json`` or of the folder that holds one.

    Special tokens come from ``tokenizer_config.json`` and ``special_tokens_map.json`` beside it. A missing pad token
    becomes the eos token, with a notice.

    Args:
        path: Folder or ``tokenizer.json``.
        max_length: Tokens per sample; capped at the tokenizer's ``model_max_length``.

    Raises:
        MissingError: ``tokenizers`` is not installed.
        DataError: There is no ``tokenizer.json``, or it or a file beside it is broken.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    tokenizer = _read(file)
    side = {name: _json(file.with_name(name)) for name in _SIDE_FILES if file.with_name(name).is_file()}
    config = side.get("tokenizer_config.json", {})
    own_padding = tokenizer.padding or {}
    length = _capped(max_length, config.get("model_max_length"), file)
    tokenizer.no_padding()
    special = tokenizer.num_special_tokens_to_add(False)
    if length <= special:
        raise DataError(
            f"max_length {length} leaves no room for text: the tokenizer adds {special} special tokens.",
            where=str(file),
            fix="Raise max_length.",
        )
    tokenizer.enable_truncation(length, direction=config.get("truncation_side", "right"))
    eos = _token("eos_token", list(side.values()))
    return TextTokenizer(
        max_length=length,
        pad_id=_pad_id(tokenizer, list(side.values()), own_padding, file),
        pad_type_id=int(config.get("pad_token_type_id", 0)),
        pad_left=config.get("padding_side", own_padding.get("direction", "right")) == "left",
        eos_id=_id(tokenizer, eos, "eos_token", file) if eos is not None else None,
        files=(file, *(file.with_name(name) for name in side)),
        _tokenizer=tokenizer,
    )


def _read(file: Path) -> Any:
    if not file.is_file():
        raise DataError(
            "There is no tokenizer.json.",
            where=str(file),
            fix="Give the model's folder as `tokenizer`. For a folder without tokenizer.json, write one with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder).",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingError(
            "Reading text needs the package tokenizers.", where=str(file), fix="pip install '.[text]'"
        ) from error
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(
            f"The tokenizer cannot be read: {error}", where=str(file), fix="Save the tokenizer again."
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The file cannot be read: {error}", where=str(file), fix="Save the tokenizer again."
        ) from error
    if not isinstance(values, dict):
        raise DataError("The file holds no JSON object.", where=str(file), fix="Save the tokenizer again.")
    return values


def _capped(max_length: int, limit: object, file: Path) -> int:
    if isinstance(limit, (int, float)) and 0 < limit < max_length:
        notice(
            "max-length-capped",
            f"max_length {max_length} is more than the model takes; texts are cut at {int(limit)} tokens.",
            where=str(file),
        )
        return int(limit)
    return max_length


def _pad_id(tokenizer: Any, side: list[dict[str, Any]], own_padding: dict[str, Any], file: Path) -> int | None:
    named = _token("pad_token", side) or own_padding.get("pad_token")
    if named is not None:
        return _id(tokenizer, named, "pad_token", file)
    eos = _token("eos_token", side)
    if eos is None:
        return None
    notice("pad-token-is-eos", f"The tokenizer has no pad token; its eos token {eos!r} is used.", where=str(file))
    return _id(tokenizer, eos, "eos_token", file)


def _token(name: str, side: list[dict[str, Any]]) -> str | None:
    for config in side:
        value = config.get(name)
        if isinstance(value, dict):  # an AddedToken
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def _id(tokenizer: Any, token: str, name: str, file: Path) -> int:
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise DataError(
            f"The {name} {token!r} is not in the tokenizer's vocabulary.",
            where=str(file),
            fix=f"Correct {name} in tokenizer_config.json.",
        )
    return found
