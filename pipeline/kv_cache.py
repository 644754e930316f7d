"""Names and shapes of a key-value cache in an ONNX graph, as Hugging Face Optimum names them.

A causal language model with a cache reads ``past_key_values.<layer>.key`` and ``.value``, each
``[batch, heads, past_sequence, head_size]``, and gives ``present.<layer>.key`` and ``.value``, which hold the past and the new
tokens ``[batch, heads, past_sequence + sequence, head_size]``. An empty past (``past_sequence`` 0) is prefill, and one new
token is a step of decoding: one graph does both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.errors import DataError
from pipeline.types import Array, TensorInfo

PAST, PRESENT = "past_key_values.", "present."


def names(layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return the layer's (past, present) names of the key and of the value."""
    return tuple((f"{PAST}{layer}.{kind}", f"{PRESENT}{layer}.{kind}") for kind in ("key", "value"))  # type: ignore[return-value]


def is_past(name: str) -> bool:
    """Return whether an input is a part of the cache."""
    return name.startswith(PAST)


def is_present(name: str) -> bool:
    """Return whether an output is a part of the cache."""
    return name.startswith(PRESENT)


def present_of(past: str) -> str:
    """Return the output that the next step reads as the input ``past``."""
    return PRESENT + past.removeprefix(PAST)


def has_cache(inputs: Sequence[TensorInfo]) -> bool:
    """Return whether a model with these inputs has a key-value cache."""
    return any(is_past(info.name) for info in inputs)


def empty(info: TensorInfo, batch: int) -> Array:
    """Return the cache before the first token, ``[batch, heads, 0, head_size]`` in the input's type.

    Raises:
        DataError: The input does not have four dimensions, of which heads and head size are fixed and the length is not.
    """
    heads, length, size = info.shape[1:] if len(info.shape) == 4 else (None, None, None)
    if not isinstance(heads, int) or not isinstance(size, int) or isinstance(length, int):
        raise DataError(
            f"The cache input has shape {list(info.shape)}, not [batch, heads, past, head size] with a free past.",
            where=f"input {info.name}",
            fix="Export the model with source.kv_cache, or give the data as .npz with an array per input.",
        )
    return np.zeros((batch, heads, 0, size), info.dtype)
