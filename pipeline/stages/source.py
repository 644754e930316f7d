"""From the trained model to the canonical graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.graph.prepare import Prepared
from pipeline.graph.prepare import prepare as make_canonical
from pipeline.sources.export import Exported
from pipeline.sources.export import export as export_source
from pipeline.stages.run import CANONICAL, Run, step
from pipeline.types import Feeds


@step
def export(run: Run) -> Exported:
    """The source as FP32 ONNX; an ``.onnx`` source is used where it is."""
    source = run.recipe.source
    if source.onnx is not None:
        return export_source(source, run.directory)
    content = _content(source.huggingface, source.pt2, source.module)

    def produce(work: Path) -> dict[str, Any]:
        made = export_source(source, work / "export", progress=run.progress)
        return {
            "folder": str(made.folder) if made.folder else None,
            "task": made.task,
            "max_relative_difference": made.max_relative_difference,
        }

    inputs = {"source": source.model_dump(mode="json"), "content": content}
    result = run.stage("export", inputs, ["export"], produce)
    folder = result.paths["export"]
    facts = result.facts
    return Exported(
        onnx=folder / "exported.onnx",
        sample=folder / "sample.npz",
        folder=Path(facts["folder"]) if facts["folder"] else None,
        task=facts["task"],
        max_relative_difference=facts["max_relative_difference"],
    )


@step
def prepare(run: Run, exported: Exported) -> Prepared:
    """The canonical graph."""
    strip = run.recipe.source.strip_quantization
    sample = _read_npz(exported.sample) if exported.sample else None

    def produce(work: Path) -> dict[str, Any]:
        made = make_canonical(
            exported.onnx, work / CANONICAL, strip_quantization=strip, sample=sample, progress=run.progress
        )
        return {
            "changes": made.changes,
            "max_relative_difference": made.max_relative_difference,
            "opset_from": made.opset_from,
            "opset_to": made.opset_to,
        }

    result = run.stage("prepare", {"onnx": exported.onnx, "strip": strip}, [CANONICAL], produce)
    facts = {**result.facts, "changes": tuple((n, c) for n, c in result.facts["changes"])}
    return Prepared(path=result.paths[CANONICAL], **facts)


def _content(huggingface: str | None, pt2: Path | None, module: str | None) -> Path | None:
    if huggingface is not None:
        return Path(huggingface) if Path(huggingface).is_dir() else None
    if pt2 is not None:
        return pt2
    file = Path((module or "").partition(":")[0].replace(".", "/") + ".py")
    return file if file.is_file() else None


def _read_npz(path: Path) -> Feeds:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
