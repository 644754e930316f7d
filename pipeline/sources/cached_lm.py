"""A causal language model that takes and gives its key-value cache: one graph for prefill and for decoding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from pipeline import kv_cache
from pipeline.errors import SourceError
from pipeline.sources import torch_errors
from pipeline.sources.sizes import Dims
from pipeline.sources.torch_export import Example
from pipeline.types import Feeds

PAST_TOKENS = (5, 0, 7)
NEW_TOKENS = (6, 9, 1)
BATCHES = (3, 1, 2)
"""Sizes of the example that is traced (past and new tokens), of one that prefills and of one that decodes."""


def example(model: Any, folder: Path, *, vocabulary: int, pad: int) -> Example:
    """Return how to call ``model`` with a cache, and three sets of inputs.

    Args:
        model: A causal language model of transformers.
        folder: Where it is from, for errors.
        vocabulary: Number of token ids.
        pad: The padding token, which appears only where the mask is 0.

    Raises:
        SourceError: The model keeps something else than keys and values of every token in every layer.
    """
    accepted = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in accepted else "past_key_values"
    shapes = _shapes(model, folder, argument)
    positions = "position_ids" in accepted
    made = tuple(
        _inputs(shapes, batch, past, new, vocabulary, pad, positions=positions)
        for batch, past, new in zip(BATCHES, PAST_TOKENS, NEW_TOKENS, strict=True)
    )
    dims: Dims = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "position_ids") if name in made[0]}
    dims |= {"attention_mask": {0: "batch", 1: "total_sequence"}}
    dims |= {name: {0: "batch", 2: "past_sequence"} for name in made[0] if kv_cache.is_past(name)}
    outputs = ("logits", *(present for n in range(len(shapes)) for _, present in kv_cache.names(n)))
    return Example(kwargs=made[0], dims=dims, outputs=outputs, others=made[1:], call=_Call(argument, len(shapes)))


class _Call:
    """Calls a model with its cache as plain tensors."""

    def __init__(self, argument: str, layers: int) -> None:
        self.argument = argument
        self.layers = [kv_cache.names(n) for n in range(layers)]

    def __call__(self, model: Any, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        _agree(tensors)
        cache = DynamicCache([(tensors.pop(key), tensors.pop(value)) for (key, _), (value, _) in self.layers])
        result = model(**tensors, **{self.argument: cache}, use_cache=True, return_dict=True)
        made = {"logits": result["logits"]}
        for layer, ((_, key), (_, value)) in zip(result[self.argument].layers, self.layers, strict=True):
            made |= {key: layer.keys, value: layer.values}
        return made


def _agree(tensors: Mapping[str, torch.Tensor]) -> None:
    """Tell the tracer which sizes are one: nothing in a model compares the lengths of two layers' caches."""
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    past = [value for name, value in tensors.items() if kv_cache.is_past(name)]
    one = [mask.shape[1] == past[0].shape[2] + ids.shape[1]]
    one += [value.shape[0] == ids.shape[0] for value in (mask, *past)]
    one += [value.shape[2] == past[0].shape[2] for value in past]
    for condition in one:
        torch._check(condition)  # type: ignore[no-untyped-call]


def _shapes(model: Any, folder: Path, argument: str) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
    """Return, for each layer, heads and head size of its keys and of its values."""
    tokens = 3
    try:
        with torch.no_grad():
            result = model(input_ids=torch.zeros((1, tokens), dtype=torch.int64), use_cache=True, return_dict=True)
        layers = [(layer.keys, layer.values) for layer in result[argument].layers]
        whole = all(t.ndim == 4 and t.shape[0] == 1 and t.shape[2] == tokens for pair in layers for t in pair)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise _other_cache(folder, torch_errors.first_line(error)) from error
    if not layers or not whole:
        raise _other_cache(folder, "a layer holds something else than one key and value for each token")
    return tuple(((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in layers)


def _other_cache(folder: Path, why: str) -> SourceError:
    return SourceError(
        f"The model's cache is not keys and values of every layer ({why}), so it is not exported with one.",
        where=str(folder),
        fix="Leave source.kv_cache out to export the model without a cache.",
    )


def _inputs(
    shapes: tuple[tuple[tuple[int, int], tuple[int, int]], ...],
    batch: int,
    past: int,
    new: int,
    vocabulary: int,
    pad: int,
    *,
    positions: bool,
) -> Feeds:
    """Return one set of inputs; in the first row of two or more the past begins with padding."""
    rng = np.random.default_rng(past * 100 + new)
    ids = rng.integers(0, vocabulary, (batch, new), dtype=np.int64)
    ids[ids == pad] = (pad + 1) % vocabulary
    mask = np.ones((batch, past + new), np.int64)
    if batch > 1:
        mask[0, : past // 2] = 0
    feeds: Feeds = {"input_ids": ids, "attention_mask": mask}
    if positions:
        feeds["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, past:]
    cached: Mapping[str, tuple[int, int]] = {
        name: size for n, sizes in enumerate(shapes) for (name, _), size in zip(kv_cache.names(n), sizes, strict=True)
    }
    for name, (heads, size) in cached.items():
        feeds[name] = rng.standard_normal((batch, heads, past, size)).astype(np.float32)
    return feeds
