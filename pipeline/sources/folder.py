"""What a Hugging Face folder holds, read from its JSON files: no code of it runs and no weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError

TASKS = {
    "feature-extraction": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}
"""Task to the transformers class that loads it."""

OUTPUTS = {"feature-extraction": ("last_hidden_state",), "question-answering": ("start_logits", "end_logits")}
"""Outputs of a task; ``logits`` for those that are not here."""

_ARCHITECTURES = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForImageClassification": "image-classification",
    "Model": "feature-extraction",
}

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that can be exported.

    Attributes:
        path: Where ``config.json`` and the weights are (a subfolder in some sentence-transformers models).
        task: A key of :data:`TASKS`.
        pooled: Whether a pooler's output is wanted; sentence-transformers pools the token embeddings itself.
    """

    path: Path
    task: str
    pooled: bool


def inspect(path: Path, *, task: str | None = None) -> Folder:
    """Return what to export from the folder at ``path``.

    Args:
        path: The folder.
        task: A key of :data:`TASKS`; read from the config's ``architectures`` if not given.

    Raises:
        SourceError: The folder is no transformers model, has no safetensors weights, needs code of its own, is
            quantized already, or is of a kind that is not exported.
    """
    modules = path / "modules.json"
    pooled = not modules.is_file()
    if modules.is_file():
        path = _transformer_of(modules)
    config = _config(path)
    _refuse(config, path)
    _check_weights(path)
    return Folder(path=path, task=_task(task, config, path), pooled=pooled)


def read_json(path: Path) -> Any:
    """Return the JSON at ``path``.

    Raises:
        SourceError: It cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"The file cannot be read as JSON: {error}", where=str(path), fix="Download the model again."
        ) from error


def _transformer_of(modules: Path) -> Path:
    """Return the folder of a sentence-transformers model's transformer; its pooling is not part of the graph."""
    entries = read_json(modules)
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and str(entry.get("type", "")).endswith(".Transformer"):
            inner = (modules.parent / str(entry.get("path", ""))).resolve()
            if inner.is_relative_to(modules.parent.resolve()):
                return inner if entry.get("path") else modules.parent
    raise SourceError(
        "This sentence-transformers model has no transformer in it.",
        where=str(modules),
        fix="Name a folder with a transformers model.",
    )


def _config(path: Path) -> dict[str, Any]:
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if isinstance(config, dict) and config.get("model_type"):
            return config
        raise SourceError(
            "config.json does not say which model this is (no model_type).",
            where=str(path / "config.json"),
            fix="Name a folder that transformers' save_pretrained wrote.",
        )
    fix = "Name a folder that transformers' save_pretrained wrote."
    if (path / "adapter_config.json").is_file():
        fix = "This is an adapter: merge it into its base model (PEFT's merge_and_unload) and save that."
    elif (path / "model_index.json").is_file():
        fix = "This is a diffusers pipeline: name the folder of one of its transformers models."
    elif onnx := sorted(path.glob("*.onnx")):
        fix = f"It holds an ONNX file: give that as the source ({onnx[0]})."
    raise SourceError("The folder holds no transformers model (no config.json).", where=str(path), fix=fix)


def _refuse(config: dict[str, Any], path: Path) -> None:
    where = str(path / "config.json")
    if config.get("auto_map"):
        raise SourceError(
            "This model brings its own Python code (auto_map), which is never run.",
            where=where,
            fix="If transformers' own class for this model_type computes the same, remove auto_map from config.json; "
            "otherwise load it in a module of your own and use source.module with trust_source.",
        )
    if config.get("quantization_config"):
        raise SourceError(
            "These weights are quantized already; quantizing them again would lose more accuracy than it looks.",
            where=where,
            fix="Use the full-precision checkpoint.",
        )
    if config.get("is_encoder_decoder"):
        raise SourceError(
            f"{config['model_type']} is an encoder-decoder model, which this version does not export.",
            where=where,
            fix="Export encoder and decoder to .onnx yourself, or wrap one of them as source.module.",
        )
    if isinstance(config.get("text_config"), dict) and isinstance(config.get("vision_config"), dict):
        raise SourceError(
            f"{config['model_type']} takes text and images, which this version does not export.",
            where=where,
            fix="Save its text or vision model on its own, or wrap it as source.module.",
        )


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        named = read_json(index)
        shards = sorted(set(named.get("weight_map", {}).values())) if isinstance(named, dict) else []
    elif not (path / shards[0]).is_file():
        raise _no_safetensors(path)
    for name in shards:
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise SourceError(
                f"The index names a weight file that is not in the folder: {name}.",
                where=str(index),
                fix="Download the model again.",
            )
        with file.open("rb") as stream:
            if stream.read(24).startswith(b"version https://git-lfs"):
                raise SourceError(
                    "The weights are a Git LFS pointer and not the file itself.",
                    where=str(file),
                    fix="Run `git lfs pull` in the folder.",
                )


def _no_safetensors(path: Path) -> SourceError:
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if not pickled:
        return SourceError(
            "The folder holds no weights (no model.safetensors).", where=str(path), fix="Download the model again."
        )
    return SourceError(
        f"The weights are only there as {', '.join(pickled[:3])}, and loading such a file can run code.",
        where=str(path),
        fix="Where you trust it, convert it once: AutoModel.from_pretrained(folder).save_pretrained(new_folder) "
        "with the model's own Auto class writes model.safetensors.",
    )


def _task(task: str | None, config: dict[str, Any], path: Path) -> str:
    if task is not None:
        if task not in TASKS:
            raise SourceError(
                f"There is no task {task!r}.", where="source.task", fix=f"Use one of: {', '.join(sorted(TASKS))}."
            )
        return task
    architectures = config.get("architectures") or []
    for ending, found in _ARCHITECTURES.items():
        if any(str(name).endswith(ending) for name in architectures):
            return found
    raise SourceError(
        f"The task cannot be told from the architectures in config.json ({', '.join(map(str, architectures)) or 'none'}).",
        where=str(path / "config.json"),
        fix=f"Name it in source.task: {', '.join(sorted(TASKS))}.",
    )
