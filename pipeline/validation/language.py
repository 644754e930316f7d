"""Perplexity: how well a causal language model predicts the next token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibrators.data.windows import Windows
from pipeline.errors import DataError
from pipeline.types import Array, CalibrationData, Feeds, Runner
from pipeline.validation.feeds import fit, mask_of

_IDS = "input_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Perplexity and next-token accuracy.

    ``perplexity`` is exp of the mean negative log likelihood (nats) of every scored token, ``next_token_accuracy`` the share
    of them that the largest logit names.
    A sample's first token has nothing before it and is not scored; padding is left out.

    Attributes:
        text: Windows over one text; the held-out samples are scored if there are none.
    """

    text: Windows | None = None
    name: str = "perplexity"

    def score(self, runner: Runner, data: CalibrationData) -> dict[str, float | None]:
        """Return the metrics of one model; only sums are kept between batches.

        Raises:
            DataError: The model gives no logits for its tokens, or there is no token to score.
        """
        loss, right, scored, sample = 0.0, 0, 0, 0
        for feeds in self.text.batches if self.text is not None else data:
            logits = _logits(runner, feeds)
            mask = mask_of(feeds)
            for row, values in enumerate(logits):
                kept = slice(None) if mask is None else mask[row] > 0
                tokens, known = feeds[_IDS][row][kept], values[kept]
                start = max(self.text.scored_from[sample] if self.text is not None else 1, 1)
                # In float64: a vocabulary's exponents are summed.
                before = known[start - 1 : -1].astype(np.float64)
                wanted = tokens[start:]
                loss += float(np.sum(log_sum_exp(before) - before[np.arange(len(wanted)), wanted]))
                right += int(np.sum(before.argmax(-1) == wanted)) if len(wanted) else 0
                scored += len(wanted)
                sample += 1
        if not scored:
            raise DataError(
                "No token has another before it, so there is nothing to predict.",
                where="validate.data" if self.text is None else "validate.labels",
                fix="Give texts of two tokens or more.",
            )
        return {"perplexity": float(np.exp(loss / scored)), "next_token_accuracy": right / scored}


def log_sum_exp(values: Array) -> Array:
    """Return ``log(sum(exp(values)))`` over the last axis, without overflow."""
    most = values.max(-1, keepdims=True) if values.size else np.zeros((len(values), 1))
    found: Array = np.log(np.exp(values - most).sum(-1)) + most[:, 0]
    return found


def _logits(runner: Runner, feeds: Feeds) -> Array:
    """Return ``[batch, tokens, vocabulary]``: the output ``logits``, or the only one of that form."""
    outputs = runner.infer(fit(runner, feeds))
    if _IDS not in feeds:
        raise DataError(
            f"Perplexity needs the input {_IDS}.", where="validate.task", fix=f"The data has {_named(list(feeds))}."
        )
    tokens = feeds[_IDS].shape
    fitting = {
        name: values
        for name, values in outputs.items()
        if values.ndim == 3 and values.shape[:2] == tokens and np.issubdtype(values.dtype, np.floating)
    }
    if "logits" not in fitting and len(fitting) != 1:
        raise DataError(
            f"No output of the model is logits for its tokens ([{tokens[0]}, {tokens[1]}, vocabulary]).",
            where=", ".join(f"{name} {list(values.shape)}" for name, values in outputs.items()),
            fix="Use a causal language model, or write a task of your own (package.module:callable).",
        )
    logits = fitting.get("logits", next(iter(fitting.values())))
    largest = int(feeds[_IDS].max(initial=0))
    if largest >= logits.shape[-1]:
        raise DataError(
            f"Token {largest} is none of the {logits.shape[-1]} that the model gives logits for.",
            where="validate.task",
            fix="Use the model's own tokenizer.",
        )
    return logits


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) or "no arrays"
