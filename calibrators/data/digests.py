"""A hash for every sample, to find the same sample in two sets whatever its batch or padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from calibrators.data.batches import update
from pipeline.types import Feeds

_FOLLOW_IDS = {"attention_mask", "token_type_ids", "position_ids"}


def sample_digests(batches: Iterable[Feeds]) -> frozenset[str]:
    """Return the SHA-256 (hex) of each sample in the batches.

    Padding does not count: where a batch has ``input_ids`` and ``attention_mask``, the hash is of the unmasked tokens.
    The same text cut at different lengths gives different hashes.
    """
    return frozenset(digest for batch in batches for digest in batch_digests(batch))


def batch_digests(batch: Feeds) -> Iterator[str]:
    """Yield the SHA-256 (hex) of each sample of one batch, in order."""
    rows = {array.shape[0] if array.ndim else None for array in batch.values()}
    size = next(iter(rows)) if len(rows) == 1 else None
    if size is None:  # no common batch axis: the batch is one complete sample
        yield _hash(batch)
        return
    for row in range(size):
        yield _hash(_row(batch, row))


def _hash(feeds: Feeds) -> str:
    digest = hashlib.sha256()
    update(digest, feeds)
    return digest.hexdigest()


def _row(batch: Feeds, row: int) -> Feeds:
    values = {name: array[row] for name, array in batch.items()}
    mask = values.get("attention_mask")
    ids = values.get("input_ids")
    if ids is None:
        return values
    kept = {name: array for name, array in values.items() if name not in _FOLLOW_IDS}
    kept["input_ids"] = (ids[mask.astype(bool)] if mask is not None and mask.shape == ids.shape else ids).astype(
        np.int64
    )
    return kept
