"""Text or pictures in front of a model: a tokenizer or preprocessing, perhaps pooling, and the ensemble that joins them with the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.data.preprocessing import Preprocessing
from calibrators.data.text import Encoder
from pipeline import kv_cache
from pipeline.errors import PublishError
from pipeline.recipe import TritonConfig
from pipeline.triton.protobuf import ModelConfig, kind_cpu, new_config, to_text, type_value
from pipeline.triton.repository import publish_version
from pipeline.triton.served import ServedModel, triton_type
from pipeline.types import TensorInfo

_STRING, _FLOAT = np.dtype(np.object_), np.dtype(np.float32)
TEXT = "TEXT"
IMAGE = "IMAGE"
MASK = "attention_mask"
EMBEDDING = "embedding"
SERVING = "serving"
"""In a build directory: what serving needs beside engines."""
LABELS = "labels.txt"
_FRONTS = (("tokenizer.json", "settings.json"), ("preprocessing.json", "pixels.py"))
MULTIPLE = 8
"""Texts are padded to a multiple of so many tokens, so that requests of nearly one length become one batch."""


def write_ensemble(root: Path, model: ServedModel, config: TritonConfig, front: Mapping[str, str]) -> tuple[str, ...]:
    """Publish what stands in front of ``model`` under ``root``; return the names of the models, the ensemble's last.

    Args:
        root: The repository that ``model`` is in.
        model: The engine; it must form batches.
        config: Batching, and which ensemble.
        front: What :func:`tokenizer_files` or :func:`preprocessing_files` returns of what calibration used.

    Raises:
        PublishError: The model forms no batches, takes a key-value cache, or gives no token vectors to pool.
        StoreError: The folder cannot be written.
    """
    if config.max_batch_size == 0 or any(
        isinstance(i.shape[0], int) for i in (*model.inputs, *model.outputs) if i.shape
    ):
        raise PublishError(
            "An ensemble needs a model that forms batches.",
            where="triton.ensemble",
            fix="Export the model with a dynamic batch dimension and set triton.max_batch_size, or set triton.ensemble: none.",
        )
    if kv_cache.has_cache(model.inputs):
        raise PublishError(
            "An ensemble of texts has no client that keeps the model's key-value cache.",
            where="triton.ensemble",
            fix="Set triton.ensemble: none, or export the model without source.kv_cache.",
        )
    parts = [f"{model.name}_{part}" for part in ensemble_parts(config)]
    first, ensemble = parts[0], parts[-1]
    name, source = (IMAGE, "preprocess_image") if config.ensemble == "image" else (TEXT, "tokenize_text")
    asked = TensorInfo(name=name, dtype=_STRING, shape=("batch", 1))
    steps: list[tuple[str, dict[str, str], dict[str, str]]] = [
        (first, {name: name}, {i.name: i.name for i in model.inputs}),
        (model.name, {i.name: i.name for i in model.inputs}, {o.name: o.name for o in model.outputs}),
    ]
    outputs = model.outputs
    _python_model(root, first, (asked,), model.inputs, config, source, front)
    if config.ensemble == "embedding":
        vectors = _token_vectors(model)
        width = vectors.shape[-1]
        outputs = (TensorInfo(name=EMBEDDING, dtype=_FLOAT, shape=("batch", width)),)
        mask = next(i for i in model.inputs if i.name == MASK)
        pooling = parts[1]
        _python_model(root, pooling, (vectors, mask), outputs, config, "pool_tokens", {})
        steps[1] = (steps[1][0], steps[1][1], {vectors.name: vectors.name})
        steps.append((pooling, {vectors.name: vectors.name, MASK: MASK}, {EMBEDDING: EMBEDDING}))
    message = _message(ensemble, (asked,), outputs, config)
    message.platform = "ensemble"
    for name, given, made in steps:
        step = message.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        step.input_map.update(given)
        step.output_map.update(made)
    publish_version(root, ensemble, to_text(message), {})
    return tuple(parts)


def ensemble_parts(config: TritonConfig) -> tuple[str, ...]:
    """Return what stands behind the model's name and ``_`` in the names of an ensemble's models, the ensemble's last."""
    return {
        "none": (),
        "text": ("tokenizer", "text"),
        "embedding": ("tokenizer", "pooling", "text"),
        "image": ("preprocessing", "image"),
    }[config.ensemble]


def front_of(folder: Path) -> dict[str, str]:
    """Return the files of the tokenizer or preprocessing that a build kept in its :data:`SERVING` folder; empty without."""
    for names in _FRONTS:
        if all((folder / name).is_file() for name in names):
            return {name: (folder / name).read_text(encoding="utf-8") for name in names}
    return {}


def _python_model(
    root: Path,
    name: str,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    config: TritonConfig,
    source: str,
    texts: Mapping[str, str],
) -> None:
    message = _message(name, inputs, outputs, config)
    message.backend = "python"
    message.instance_group.add(kind=kind_cpu(), count=1)
    message.dynamic_batching.max_queue_delay_microseconds = (
        config.dynamic_batching.max_queue_delay_us if config.dynamic_batching is not None else 0
    )
    files = {"model.py": python_source(source), **texts}
    publish_version(root, name, to_text(message), {file: text.encode() for file, text in files.items()})


def python_source(name: str) -> str:
    """Return the text of one of the python backend's models that this package carries."""
    return resources.files("pipeline.triton").joinpath(f"python_models/{name}.py").read_text(encoding="utf-8")


def _message(
    name: str, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], config: TritonConfig
) -> ModelConfig:
    message = new_config()
    message.name = name
    message.max_batch_size = config.max_batch_size
    for tensors, fields in ((inputs, message.input), (outputs, message.output)):
        for info in tensors:
            dims = [d if isinstance(d, int) else -1 for d in info.shape[1:]]
            fields.add(name=info.name, data_type=type_value(triton_type(info)), dims=dims)
    return message


def _token_vectors(model: ServedModel) -> TensorInfo:
    found = next((o for o in model.outputs if len(o.shape) == 3 and o.dtype.kind == "f"), None)
    if found is None or not any(i.name == MASK for i in model.inputs):
        raise PublishError(
            "The model gives no token vectors [batch, tokens, width] or takes no attention_mask, so nothing can be pooled.",
            where="triton.ensemble: embedding",
            fix="Set triton.ensemble: text.",
        )
    return found


def tokenizer_files(encoder: Encoder) -> dict[str, str]:
    """Return file name to text of what the tokenizer's model reads: the tokenizer and the lengths that calibration used."""
    tokenizer = encoder.tokenizer
    settings: dict[str, Any] = {
        "inputs": {info.name: str(info.dtype) for info in encoder.fit.inputs},
        "length": encoder.length,
        "max_length": tokenizer.max_length,
        "multiple_of": MULTIPLE,
        "pad_id": tokenizer.pad_id or 0,
        "pad_left": tokenizer.pad_left,
        "pad_type_id": tokenizer.pad_type_id,
    }
    return {
        "settings.json": json.dumps(settings, indent=1, sort_keys=True) + "\n",
        "tokenizer.json": tokenizer.to_json(),
    }


def preprocessing_files(how: Preprocessing, inputs: Sequence[TensorInfo]) -> dict[str, str]:
    """Return file name to text of what the preprocessing's model reads: calibration's own code and its settings.

    Raises:
        PublishError: The model takes something else than one picture.
    """
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].dtype.kind not in "fiu":
        raise PublishError(
            "An ensemble of pictures needs a model with one input of 4 dimensions.",
            where="triton.ensemble: image",
            fix="Set triton.ensemble: none.",
        )
    values = {
        "preprocessing": how.model_dump(mode="json"),
        "input": inputs[0].name,
        "dtype": str(inputs[0].dtype),
    }
    return {
        "preprocessing.json": json.dumps(values, indent=1, sort_keys=True) + "\n",
        "pixels.py": resources.files("calibrators.data").joinpath("pixels.py").read_text(encoding="utf-8"),
    }
