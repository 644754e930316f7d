"""Turn any ONNX file into the canonical graph that everything later works on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exception

import onnx_ir as ir
from onnx import checker

from pipeline import model as files
from pipeline.errors import ModelError, PipelineError, StoreError
from pipeline.graph.compare import compare
from pipeline.graph.passes.check_weights import CheckWeights
from pipeline.graph.passes.convert_opset import ConvertOpset, opset
from pipeline.graph.passes.fold_affine import FoldAffine
from pipeline.graph.passes.fold_constants import FoldConstants
from pipeline.graph.passes.fold_shapes import FoldShapes
from pipeline.graph.passes.fuse_gelu import FuseGelu
from pipeline.graph.passes.fuse_layernorm import FuseLayerNorm
from pipeline.graph.passes.graph_pass import GraphPass, all_nodes, is_random
from pipeline.graph.passes.infer_shapes import InferShapes, RequireShapes
from pipeline.graph.passes.inline_functions import InlineFunctions
from pipeline.graph.passes.lift_constants import LiftConstants
from pipeline.graph.passes.merge_duplicates import MergeDuplicates
from pipeline.graph.passes.name_everything import NameEverything
from pipeline.graph.passes.own_initializers import OwnInitializers
from pipeline.graph.passes.refuse_quantization import RefuseQuantization
from pipeline.graph.passes.remove_noops import RemoveNoops
from pipeline.graph.passes.remove_unused import RemoveUnused
from pipeline.graph.passes.seal_outputs import SealOutputs, UnsealOutputs
from pipeline.graph.passes.share_initializers import ShareInitializers
from pipeline.graph.passes.sort_nodes import SortNodes
from pipeline.graph.passes.strip_quantization import StripQuantization
from pipeline.notices import notice
from pipeline.types import Feeds, Progress, silent

MOST_ROUNDS = 8
"""Folding enables inference, which enables folding; real models settle after two or three rounds."""

ROUND: tuple[type[GraphPass], ...] = (
    InferShapes,
    FoldShapes,
    MergeDuplicates,
    FoldConstants,
    RemoveNoops,
    MergeDuplicates,
    RemoveUnused,
)
FUSE: tuple[type[GraphPass], ...] = (FoldAffine, FuseLayerNorm, FuseGelu, RemoveUnused)
FINISH: tuple[type[GraphPass], ...] = (ShareInitializers, MergeDuplicates, RemoveUnused, UnsealOutputs, SortNodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The canonical model and how it came about.

    Attributes:
        path: The canonical ``.onnx`` file, its weights in ``<path>.data``.
        changes: (pass, number of nodes or tensors that it changed), in the order of running; passes that changed
            nothing are left out.
        max_relative_difference: max|canonical - source| / max|source| over all outputs; ``None`` if not measured.
        opset_from: Opset of the source.
        opset_to: Opset of the canonical model.
    """

    path: Path
    changes: tuple[tuple[str, int], ...]
    max_relative_difference: float | None
    opset_from: int
    opset_to: int


def prepare(
    onnx: Path,
    out: Path,
    *,
    strip_quantization: bool = False,
    sample: Feeds | None = None,
    progress: Progress = silent,
) -> Prepared:
    """Write the canonical form of ``onnx`` to ``out``: same inputs, same outputs, one spelling of everything.

    Weights stay in their file until they are written, so memory follows the largest tensor.

    Args:
        onnx: The source model; external data beside it.
        out: Where the canonical model goes.
        strip_quantization: Take Q/DQ pairs out instead of refusing a quantized model.
        sample: Inputs to compare both models on; small ones are generated if not given.
        progress: Told of steps done.

    Raises:
        ModelError: The model is broken, quantized, a simulation, not convertible, or its canonical form computes something else.
        StoreError: ``out`` cannot be written.
    """
    model = files.load(onnx)
    files.refuse_simulation(model, onnx)
    opset_from = opset(model)
    try:
        inputs = files.inputs(model)
        random = any(node.domain == "" and is_random(node) for node in all_nodes(model))
        changes = canonicalize(model, strip_quantization=strip_quantization, progress=progress)
        files.save(model, out, progress=lambda done, total: progress("write", done, total))
    except PipelineError as error:
        if str(onnx) in error.where or isinstance(error, StoreError):
            raise
        raise type(error)(error.what, where=f"{onnx}: {error.where}".removesuffix(": "), fix=error.fix) from error
    except Exception as error:
        _blame_the_model(onnx, error)  # a malformed model can fail a pass anywhere; on a valid one it is a defect
        raise
    opset_to = opset(model)
    del model
    if random:
        notice(
            "not-compared", "The model draws random numbers, so two runs differ and none was compared.", where=str(onnx)
        )
    difference = None if random else compare(onnx, out, inputs, sample)
    return Prepared(
        path=out,
        changes=changes,
        max_relative_difference=difference,
        opset_from=opset_from,
        opset_to=opset_to,
    )


def _blame_the_model(path: Path, error: Exception) -> None:
    """Raise :class:`ModelError` if the file is not valid: by onnx's checker, or its text is no UTF-8."""
    reason = "some text in it is not UTF-8" if "UnicodeDecodeError" in "".join(format_exception(error)) else ""
    try:
        checker.check_model(str(path))
    except Exception as refusal:  # whatever a malformed file makes the checker raise is the answer
        reason = " ".join(str(refusal).split())[:300]
    if reason:
        raise ModelError(
            f"The file is no valid ONNX model: {reason}",
            where=str(path),
            fix="Export it again and run `onnx.checker.check_model` on it.",
        ) from error


def canonicalize(
    model: ir.Model, *, strip_quantization: bool = False, progress: Progress = silent
) -> tuple[tuple[str, int], ...]:
    """Run the passes of :func:`prepare` on a loaded model, in place, and return what they changed."""
    record: dict[str, int] = {}
    start: list[GraphPass] = [CheckWeights()]
    if not strip_quantization:
        start.append(RefuseQuantization())
    start += [OwnInitializers(), SealOutputs(), NameEverything(), InlineFunctions(), NameEverything(), SortNodes()]
    start += [ConvertOpset(), NameEverything(), LiftConstants(), ShareInitializers()]
    if strip_quantization:
        start.append(StripQuantization())
    _run(model, start, record)
    progress("prepare", 1, 4)
    for _ in range(MOST_ROUNDS):
        if not _run(model, (step() for step in ROUND), record, ignore="infer-shapes"):
            break
    progress("prepare", 2, 4)
    _run(model, (step() for step in FUSE), record)
    progress("prepare", 3, 4)
    _run(model, (*(step() for step in FINISH), NameEverything(), RequireShapes()), record)
    progress("prepare", 4, 4)
    record.pop("infer-shapes", None)
    record.pop("require-shapes", None)
    return tuple((name, count) for name, count in record.items() if count)


def _run(model: ir.Model, passes: Iterable[GraphPass], record: dict[str, int], *, ignore: str = "") -> int:
    """Run passes in order and return how much they changed, without ``ignore``."""
    total = 0
    for step in passes:
        count = step.change(model)
        record[step.name] = record.get(step.name, 0) + count
        total += 0 if step.name == ignore else count
    return total
