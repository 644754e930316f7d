"""Any source that a recipe can name becomes an FP32 ONNX file."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import MissingError, SourceError, StoreError
from pipeline.recipe import Source
from pipeline.sources import child, folder, hub
from pipeline.sources.job import Job
from pipeline.types import Progress, silent

MODEL = "exported.onnx"
SAMPLE = "sample.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What :func:`export` made, or found.

    Attributes:
        onnx: The FP32 graph; large weights are in ``<onnx>.data`` beside it.
        folder: The Hugging Face folder with tokenizer or preprocessor; ``None`` for other sources.
        task: The task that the graph was exported for; ``None`` for other sources.
        sample: ``.npz`` with one example array per input, first axis the batch; ``None`` for an ``.onnx`` source.
        max_relative_difference: Largest ``max|d| / max|reference|`` over all outputs between torch and the exported
            graph in ONNX Runtime; ``None`` for an ``.onnx`` source, where there is nothing to compare with.
    """

    onnx: Path
    folder: Path | None = None
    task: str | None = None
    sample: Path | None = None
    max_relative_difference: float | None = None


def export(source: Source, out: Path, *, progress: Progress = silent) -> Exported:
    """Return the ONNX file of ``source``.

    An ``.onnx`` file is returned where it is, unread (:func:`pipeline.model.load` checks it). Everything else is
    exported into the folder ``out`` by a child process: ``exported.onnx``, ``exported.onnx.data``, ``sample.npz``.
    The same source gives the same bytes. Nothing is left in ``out`` when the export fails.

    Args:
        source: What to export; ``module`` and ``pt2`` run the user's code and need ``trust_source``.
        out: Folder for the result; it is made.
        progress: Told of the steps of the stage ``export``.

    Raises:
        SourceError: The source cannot be read, trusted or exported, or the exported graph computes something else.
        MissingError: torch or transformers is not installed, or the hub cannot be reached.
        StoreError: ``out`` cannot be written.
    """
    if source.onnx is not None:
        return Exported(onnx=source.onnx)
    if source.huggingface is not None:
        root = hub.local_folder(source.huggingface, revision=source.revision)
        model = folder.inspect(root, task=source.task)
        if source.kv_cache and model.task != "causal-lm":
            raise SourceError(
                f"Only causal language models have a key-value cache; this one is exported for {model.task}.",
                where="source.kv_cache",
                fix="Leave it out, or name the task: source.task: causal-lm.",
            )
        job = Job(
            kind="huggingface",
            target=str(model.path),
            opset=source.opset,
            task=model.task,
            pooled=model.pooled,
            kv_cache=source.kv_cache,
        )
        return _run(job, out, progress, folder_path=model.path)
    _trusted(source)
    if source.module is not None:
        return _run(Job(kind="module", target=source.module, opset=source.opset), out, progress)
    assert source.pt2 is not None  # Source checks that exactly one is given
    if not source.pt2.is_file():
        raise SourceError("The .pt2 file does not exist.", where=str(source.pt2), fix="Check the path.")
    return _run(Job(kind="pt2", target=str(source.pt2.resolve()), opset=source.opset), out, progress)


def _trusted(source: Source) -> None:
    if source.trust_source:
        return
    raise SourceError(
        "A torch module or a .pt2 is code, and exporting it runs that code on this machine.",
        where=f"source.module: {source.module}" if source.module else f"source.pt2: {source.pt2}",
        fix="If you trust it, say so with `trust_source: true` (or --trust-source).",
    )


def _run(job: Job, out: Path, progress: Progress, *, folder_path: Path | None = None) -> Exported:
    for package in ("torch", "transformers") if job.kind == "huggingface" else ("torch",):
        if importlib.util.find_spec(package) is None:
            raise MissingError(
                f"Exporting this source needs {package}, which is not installed.",
                where=job.target,
                fix="pip install '.[torch]', or export to .onnx elsewhere and give that file.",
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as staging:
            difference = child.run(job, Path(staging), progress)
            (out / f"{MODEL}.data").unlink(missing_ok=True)
            for file in sorted(Path(staging).iterdir(), key=lambda f: f.name == MODEL):  # the .onnx last
                file.replace(out / file.name)
    except OSError as error:
        raise StoreError(
            f"The exported model could not be written: {error.strerror or error}.",
            where=str(out),
            fix="Free some disk space or choose another -o DIR.",
        ) from error
    return Exported(
        onnx=out / MODEL,
        folder=folder_path,
        task=job.task,
        sample=out / SAMPLE,
        max_relative_difference=difference,
    )
