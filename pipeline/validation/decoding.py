"""A causal language model token by token: one sequence, its key-value cache kept between steps."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import kv_cache
from pipeline.errors import DataError
from pipeline.types import Array, Feeds, Runner

IDS, MASK, POSITIONS, TYPES = "input_ids", "attention_mask", "position_ids", "token_type_ids"


class Decoder:
    """One sequence of a model that gives ``logits`` for ``input_ids``.

    With a cache (:mod:`pipeline.kv_cache`) every step computes the new tokens alone; without one it computes the whole sequence
    again, so any causal language model can be decoded.

    Args:
        runner: The model; it stays the caller's to close.

    Raises:
        DataError: It has no ``input_ids`` of free length, or inputs that tokens do not fill.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._inputs = {info.name: info for info in runner.inputs}
        self._past = [info for info in runner.inputs if kv_cache.is_past(info.name)]
        ids = self._inputs.get(IDS)
        if ids is None or len(ids.shape) != 2 or isinstance(ids.shape[1], int):
            raise DataError(
                "The model takes no input_ids [batch, tokens] of free length, so it does not decode.",
                where="inputs " + ", ".join(f"{i.name} {list(i.shape)}" for i in runner.inputs),
                fix="Export a causal language model with a dynamic sequence length.",
            )
        self.reset()
        self._feeds(np.zeros(1, np.int64))

    def reset(self) -> None:
        """Forget the sequence."""
        self.tokens = np.zeros(0, np.int64)
        self._cache: Feeds = {info.name: kv_cache.empty(info, 1) for info in self._past}

    def feed(self, tokens: Sequence[int] | Array) -> Array:
        """Append tokens to the sequence and return their logits, ``[new tokens, vocabulary]``.

        Raises:
            DataError: The model gives no ``logits``.
            EngineError: The model fails.
        """
        new = np.asarray(tokens, np.int64)
        outputs = self._runner.infer(self._feeds(new))
        self.tokens = np.concatenate([self.tokens, new])
        self._cache = {info.name: outputs[kv_cache.present_of(info.name)] for info in self._past}
        if "logits" not in outputs:
            raise DataError("The model gives no logits.", where=f"outputs {', '.join(outputs)}")
        logits: Array = outputs["logits"][0, -len(new) :]
        return logits

    def _feeds(self, new: Array) -> Feeds:
        total = len(self.tokens) + len(new)
        given = new if self._past else np.concatenate([self.tokens, new])
        made: Feeds = {
            IDS: given[None],
            MASK: np.ones((1, total), np.int64),
            POSITIONS: np.arange(total - len(given), total)[None],
            TYPES: np.zeros((1, len(given)), np.int64),
        }
        unknown = [name for name in self._inputs if name not in made and name not in self._cache]
        if unknown:
            raise DataError(
                "The model takes inputs that tokens do not fill.",
                where=f"inputs {', '.join(unknown)}",
                fix=f"Known are {', '.join(made)} and a cache named {kv_cache.PAST}<layer>.key and .value.",
            )
        feeds = {name: made[name].astype(i.dtype, copy=False) for name, i in self._inputs.items() if name in made}
        return feeds | self._cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What a model made of a prompt.

    Attributes:
        tokens: The new tokens; a stop token, if one came, is the last.
        step_ms: Wall-clock time of each step that fed one token, in ms.
    """

    tokens: tuple[int, ...]
    step_ms: tuple[float, ...]


def greedy(decoder: Decoder, prompt: Sequence[int] | Array, count: int, stop: Collection[int] = ()) -> Continuation:
    """Return the most likely next token, again and again: ``count`` tokens, or fewer where a token of ``stop`` comes."""
    decoder.reset()
    tokens = [int(decoder.feed(prompt)[-1].argmax())]
    times = []
    while len(tokens) < count and tokens[-1] not in stop:
        start = time.perf_counter()
        logits = decoder.feed(tokens[-1:])
        times.append((time.perf_counter() - start) * 1e3)
        tokens.append(int(logits[-1].argmax()))
    return Continuation(tokens=tuple(tokens), step_ms=tuple(times))
