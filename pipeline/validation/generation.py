"""Generation side by side: what FP32 and the variant make of the same prompts, greedily, with their key-value caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrators.data.records import SUFFIXES, records
from calibrators.data.spec import DataSpec
from calibrators.data.template import Template
from calibrators.data.text import encoder_of
from calibrators.data.tokenizer import TextTokenizer
from pipeline.errors import DataError
from pipeline.recipe import Validation
from pipeline.types import Array, Progress, Runner, TensorInfo
from pipeline.validation.decoding import Continuation, Decoder, greedy
from pipeline.validation.measurement import Generated, Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Texts to continue.

    Attributes:
        texts: The prompts.
        tokenizer: The model's.
        new_tokens: Most tokens to add to each.
    """

    texts: tuple[str, ...]
    tokenizer: TextTokenizer
    new_tokens: int


def open_prompts(config: Validation, inputs: Sequence[TensorInfo]) -> Prompts | None:
    """Return the recipe's prompts; ``None`` if it names none.

    Args:
        config: The recipe's ``validate`` section.
        inputs: The model's inputs.

    Raises:
        DataError: The file cannot be read or holds no prompt, or the tokenizer and the model do not go together.
    """
    if config.prompts is None:
        return None
    path, template = Path(config.prompts), Template(config.template)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError("Prompts are one a line.", where=str(path), fix=f"Give a file of {' or '.join(SUFFIXES)}.")
    texts = tuple(template.render(record, where) for where, record in records(path))
    if not texts:
        raise DataError("The file holds no prompt.", where=str(path), fix="Write one prompt a line.")
    spec = DataSpec(data=str(path), tokenizer=config.tokenizer, max_length=config.max_length, batch_size=1)
    return Prompts(texts=texts, tokenizer=encoder_of(spec, inputs).tokenizer, new_tokens=config.new_tokens)


def generate(fp32: Runner, served: Runner, prompts: Prompts, *, timed: bool, progress: Progress) -> Generation:
    """Return both models' continuations of every prompt, and how often the variant agrees with FP32.

    Agreement is asked for along FP32's continuation: given the same tokens before, does the variant name the same next one?
    A first difference in free generation changes all that follows, and would count many times.

    Args:
        fp32: The reference.
        served: The variant.
        prompts: What to continue.
        timed: Whether the times of ``served`` are the engine's own.
        progress: Told of every prompt under ``generation``.

    Raises:
        DataError: A model does not decode, or a prompt has no tokens.
    """
    reference, candidate = Decoder(fp32), Decoder(served)
    stop = () if prompts.tokenizer.eos_id is None else (prompts.tokenizer.eos_id,)
    rows: list[Generated] = []
    times: tuple[list[float], list[float]] = ([], [])
    for index, text in enumerate(prompts.texts):
        progress("generation", index, len(prompts.texts))
        ids = prompts.tokenizer.encode(text)[0]
        if not ids.size:
            raise DataError("The prompt gives no tokens.", where=f"prompt {index + 1}", fix="Leave it out.")
        theirs, own = (greedy(d, ids, prompts.new_tokens, stop) for d in (reference, candidate))
        times[0].extend(theirs.step_ms)
        times[1].extend(own.step_ms)
        agreed = _agreed(candidate, ids, theirs)
        rows.append(_row(text, theirs, own, agreed, prompts.tokenizer))
    progress("generation", len(prompts.texts), len(prompts.texts))
    tokens = sum(row.tokens for row in rows)
    return Generation(
        prompts=tuple(rows),
        new_tokens=prompts.new_tokens,
        tokens=tokens,
        token_agreement=sum(row.agreed_tokens for row in rows) / tokens,
        identical=sum(row.identical for row in rows) / len(rows),
        fp32_step_ms=float(np.median(times[0])) if timed and times[0] else None,
        engine_step_ms=float(np.median(times[1])) if timed and times[1] else None,
    )


def _agreed(decoder: Decoder, prompt: Array, reference: Continuation) -> int:
    """Return how many tokens of the reference the model names, each given those before it."""
    decoder.reset()
    named = [decoder.feed(prompt)[-1:].argmax(-1)]
    if len(reference.tokens) > 1:
        named.append(decoder.feed(reference.tokens[:-1]).argmax(-1))
    return int(np.sum(np.concatenate(named) == np.asarray(reference.tokens)))


def _row(text: str, theirs: Continuation, own: Continuation, agreed: int, tokenizer: TextTokenizer) -> Generated:
    pairs = zip(theirs.tokens, own.tokens, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(theirs.tokens), len(own.tokens)))
    return Generated(
        prompt=text,
        fp32=tokenizer.decode(theirs.tokens),
        engine=tokenizer.decode(own.tokens),
        tokens=len(theirs.tokens),
        agreed_tokens=agreed,
        same_tokens=same,
        identical=theirs.tokens == own.tokens,
    )
