"""A Hugging Face folder as a traced torch program. With ``cached_lm.py`` the only module that imports transformers.

A causal LM is exported as it scores a whole sequence (ids and mask in, logits out) or, with ``kv_cache``, with past keys and
values as inputs and outputs too, so that one graph prefills and decodes token by token.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import masking_utils

from pipeline.errors import SourceError
from pipeline.notices import notice
from pipeline.sources import cached_lm, samples, torch_errors, torch_export
from pipeline.sources.folder import OUTPUTS, TASKS, read_json
from pipeline.sources.torch_export import Example, Traced
from pipeline.types import Feeds


def trace(folder: Path, *, task: str, pooled: bool, kv_cache: bool = False) -> Traced:
    """Load the model in ``folder`` and trace it with dynamic batch and, for text, sequence dimensions.

    Args:
        folder: As :func:`pipeline.sources.folder.inspect` accepted it.
        task: A key of :data:`pipeline.sources.folder.TASKS`.
        pooled: Also export ``pooler_output``, if the checkpoint has the pooler's weights.
        kv_cache: Of a causal LM, make past keys and values inputs and outputs (:mod:`pipeline.kv_cache`).

    Raises:
        SourceError: transformers cannot load it, weights are missing, its inputs are of a kind that is not known, or its
            cache is.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, missing = _load(folder, task)
    outputs = _outputs(model, task, missing, folder, pooled=pooled)
    if kv_cache:
        vocabulary, pad = int(model.config.vocab_size), _pad_token(model.config, folder)
        cached = cached_lm.example(model, folder, vocabulary=vocabulary, pad=pad)
        return torch_export.trace(model, cached, where=str(folder), around=_broadcast_mask)
    first, second = _samples(model, folder)
    dims = {name: {0: "batch"} if name == "pixel_values" else {0: "batch", 1: "sequence"} for name in first}
    accepted = inspect.signature(model.forward).parameters
    constants = {"return_dict": True} | ({"use_cache": False} if "use_cache" in accepted else {})
    example = Example(kwargs={**first, **constants}, dims=dims, outputs=outputs, others=(second,))
    return torch_export.trace(model, example, where=str(folder), around=_broadcast_mask)


def _load(folder: Path, task: str) -> tuple[Any, set[str]]:
    """Return the model in float32 and the names of weights that the checkpoint does not have."""
    try:
        model, info = getattr(transformers, TASKS[task]).from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype="float32",
            # Fewer nodes than "sdpa": 213 against 285 for MiniLM, and no IsNaN guard after each softmax.
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise many classes, some of them private
        raise SourceError(
            f"transformers cannot load the model for {task}: {torch_errors.first_line(error)}",
            where=str(folder),
            fix="Check config.json and the weights, name another source.task, or install a newer transformers.",
        ) from error
    if unused := sorted(info["unexpected_keys"]):
        notice(
            "unused-weights",
            f"{len(unused)} weights of the checkpoint are not used for {task} ({', '.join(unused[:3])}).",
            where=str(folder),
        )
    return model, set(info["missing_keys"])


def _outputs(model: Any, task: str, missing: set[str], folder: Path, *, pooled: bool) -> tuple[str, ...]:
    pooler = {name for name in missing if name.startswith("pooler.") or ".pooler." in name}
    if task == "feature-extraction":
        missing = missing - pooler
    if missing:
        raise SourceError(
            f"The checkpoint has no weights for {', '.join(sorted(missing)[:3])}; they would be random.",
            where=str(folder),
            fix="Use a checkpoint that was trained for this task, or name another source.task.",
        )
    outputs = OUTPUTS.get(task, ("logits",))
    if task == "feature-extraction" and pooled and not pooler and getattr(model, "pooler", None) is not None:
        return (*outputs, "pooler_output")
    return outputs


def _samples(model: Any, folder: Path) -> tuple[Feeds, Feeds]:
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    if model.main_input_name == "pixel_values":
        return samples.images("pixel_values", _image_shape(config, folder))
    if model.main_input_name != "input_ids":
        raise SourceError(
            f"{config.model_type} takes {model.main_input_name}; text (input_ids) and images (pixel_values) are known.",
            where=str(folder),
            fix="Wrap it as source.module, whose factory gives the example inputs.",
        )
    names = ["input_ids", *(["attention_mask"] if "attention_mask" in accepted else [])]
    # RoBERTa keeps one token type for compatibility and GPT-2 accepts any: neither's tokenizer makes them.
    if "token_type_ids" in accepted and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    pad = _pad_token(config, folder)
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    # RoBERTa and its kin count positions from the padding token's id on: 514 positions take 512 tokens.
    longest = max(positions - pad - 1, positions // 2)
    return samples.text(names, vocabulary=int(config.vocab_size), pad=pad, longest=longest)


def _pad_token(config: Any, folder: Path) -> int:
    if isinstance(config.pad_token_id, int):
        return config.pad_token_id
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    pad = eos if isinstance(eos, int) else 0
    notice("no-pad-token", f"The model has no padding token; token {pad} (end of text) is used.", where=str(folder))
    config.pad_token_id = pad
    return pad


def _image_shape(config: Any, folder: Path) -> tuple[int, int, int]:
    """Return (channels, height, width) from the model's config, or else from its preprocessor."""
    size = getattr(config, "image_size", None)
    preprocessor = folder / "preprocessor_config.json"
    if size is None and preprocessor.is_file():
        given = read_json(preprocessor)
        size = given.get("crop_size") or given.get("size")
    if isinstance(size, dict):
        size = [size["height"], size["width"]] if "height" in size else size.get("shortest_edge")
    if size is None:
        notice("image-size", "Neither config names an image size; 224 x 224 is used.", where=str(folder))
        size = 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


@contextlib.contextmanager
def _broadcast_mask() -> Iterator[None]:
    """While tracing, add the padding mask as [batch, 1, 1, sequence], which broadcasts.

    transformers looks the padding up for each (batch, query, key), which becomes a GatherND over indices of that size
    and a dozen nodes around it. The numbers are the same, and the check against the unchanged model shows it.
    """
    original = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def mask(**given: Any) -> Any:
        padding, function = given.get("attention_mask"), given.get("mask_function")
        causal = function is masking_utils.causal_mask_function
        simple = causal or function is masking_utils.bidirectional_mask_function
        if not simple or padding is None or given.get("use_vmap") or "q_length" not in given:
            return original(**given)
        blocked = ~padding[:, None, None, :]
        if causal:
            whole = {**given, "attention_mask": None, "batch_size": 1, "allow_is_causal_skip": False}
            blocked = blocked | ~masking_utils.sdpa_mask(**whole)
        # A Where, as 0 x -3.4e38 is NaN once the constant became -inf in FP16.
        return blocked.to(given["dtype"]).masked_fill(blocked, float(np.finfo(np.float32).min))

    masking_utils.AttentionMaskInterface.register("eager", mask)
    try:
        yield
    finally:
        masking_utils.AttentionMaskInterface.register("eager", original)
