"""Example inputs for a Hugging Face model: the same ones every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.types import Feeds

SEED = 0
BATCHES = (3, 1)
"""Batch sizes of the sample that is traced and of the one that checks other sizes; 1 is what tracers get wrong."""


def text(names: Sequence[str], *, vocabulary: int, pad: int, longest: int) -> tuple[Feeds, Feeds]:
    """Return two batches of token ids.

    Args:
        names: Inputs of the model: ``input_ids``, perhaps ``attention_mask`` and ``token_type_ids``.
        vocabulary: Number of token ids.
        pad: The padding token, which appears only where the mask is 0.
        longest: Most tokens that the model takes.

    Returns:
        Two dicts of int64 ``[batch, sequence]`` arrays with different batch sizes and lengths; the second row of the
        first and the only row of the second end in padding.
    """
    lengths = (max(min(24, longest // 2), 2), max(min(37, longest * 3 // 4), 3))
    rng = np.random.default_rng(SEED)
    made = []
    for batch, length in zip(BATCHES, lengths, strict=True):
        ids = rng.integers(0, vocabulary, size=(batch, length), dtype=np.int64)
        ids[ids == pad] = (pad + 1) % vocabulary
        mask = np.ones_like(ids)
        mask[1 if batch > 1 else 0, length - max(length // 4, 1) :] = 0
        ids[mask == 0] = pad
        types = np.zeros_like(ids)
        types[:, length // 2 :] = mask[:, length // 2 :]
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        made.append({name: values[name] for name in names})
    return made[0], made[1]


def images(name: str, shape: tuple[int, int, int]) -> tuple[Feeds, Feeds]:
    """Return two batches of float32 ``[batch, channels, height, width]`` noise in [-1, 1)."""
    rng = np.random.default_rng(SEED)
    first, second = (rng.uniform(-1, 1, size=(batch, *shape)).astype(np.float32) for batch in BATCHES)
    return {name: first}, {name: second}
