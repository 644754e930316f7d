"""Round the weights of one variant with GPTQ and keep them in a folder, one file a weight.

GPTQ here minimizes the error about its mean, because the mean error is a constant for each output channel, which the bias
takes up exactly (bias correction, Nagel et al. 2019, section 4.2). That matters most where the input is far from zero on
average: behind a shift, or GELU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pipeline import model as models
from pipeline.graph.operands import Operands, operands
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.fake import nearest
from pipeline.quantize.gptq import gptq, refine
from pipeline.quantize.moments import F64, Moments, Tap, second_moments
from pipeline.quantize.weights import IR_DTYPES, QuantizedWeight, block_scales, channel_scales, lowest
from pipeline.types import Feeds, Progress, QuantDType, QuantSpec, silent

INDEX = "index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingOptions:
    """How to round.

    Attributes:
        mask: The input that is 0 at padding; padding is left out of the second moments.
        threads: Threads for ONNX Runtime; 0 is one per core.
        memory_bytes: Second moments held at once; more need several passes over the data.
    """

    mask: str | None = None
    threads: int = 0
    memory_bytes: int = 1 << 30


def round_weights(
    path: Path,
    plan: PrecisionPlan,
    data: Iterable[Feeds],
    folder: Path,
    options: RoundingOptions = RoundingOptions(),
    progress: Progress = silent,
) -> int:
    """Write every quantized MatMul and Gemm weight of ``plan``, rounded by GPTQ; return how many.

    A weight that several nodes read, or a Gemm's on the CPU (its bias is stored in the weight's scale, which depends on
    the activation's) stays with round-to-nearest.

    Args:
        path: The float model.
        plan: What is quantized.
        data: Calibration batches, read once for every part that fits the memory.
        folder: Where ``index.json`` and one ``.npz`` a weight (``weight``, ``scale`` and ``correction`` float32) go.
        options: Padding, threads, memory.
        progress: Told of every weight under ``round``.
    """
    model = models.load(path)
    wanted = _wanted(model, plan)
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    scale_dtype = plan.scale_dtype
    for part in _parts(wanted, options.memory_bytes):
        tap = Tap(path, list(part), mask=options.mask, threads=options.threads)
        moments = second_moments(tap, data)
        for tensor, nodes in part.items():
            seen = moments.pop(tensor)
            for node, what, spec in nodes:
                file = f"{len(index):05}.npz"
                index[node.name or ""] = file
                _round((node, what, spec), seen, folder / file, scale_dtype)
                progress("round", len(index), sum(map(len, wanted.values())))
    (folder / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(index)


def rounded(
    folder: Path, node: str, index: Mapping[str, str], spec: QuantSpec, shape: Sequence[int]
) -> QuantizedWeight:
    """Return a weight that :func:`round_weights` wrote, its values read when the model is saved."""
    file = folder / index[node]
    with np.load(file, allow_pickle=False) as stored:
        scale, axis, correction = stored["scale"], int(stored["axis"]), stored["correction"]

    def load() -> ir.TensorProtocol:
        with np.load(file, allow_pickle=False) as stored:
            return ir.tensor(stored["weight"].view(dtype.numpy()))

    dtype = IR_DTYPES[spec.dtype]
    lazy = ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(shape), name=node)
    return QuantizedWeight(tensor=lazy, scale=scale, axis=axis, block=spec.block, correction=correction)


def read_index(folder: Path) -> dict[str, str]:
    """Return node name to file, as :func:`round_weights` wrote it."""
    found: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return found


_Nodes = dict[str, list[tuple[ir.Node, Operands, QuantSpec]]]


def _wanted(model: ir.Model, plan: PrecisionPlan) -> _Nodes:
    """Return the nodes to round by the tensor they read."""
    precisions = {n.node: n.precision for n in plan.quantized()}
    uses = Counter(v for n in model.graph.all_nodes() for v in n.inputs if v is not None and v.is_initializer())
    found: _Nodes = {}
    for node in model.graph:
        what = operands(node)
        precision = precisions.get(node.name or "")
        if precision is None or what is None or what.weight is None:
            continue
        spec = plan.weight_spec(precision, what.weight_shape(node), what.channel_axis)
        weight, value = node.inputs[what.weight], node.inputs[0]
        biased = plan.family == "cpu" and what.bias is not None and spec.block is None
        if node.op_type not in ("MatMul", "Gemm") or biased or weight is None or value is None or uses[weight] > 1:
            continue
        found.setdefault(value.name or "", []).append((node, what, spec))
    return found


def _parts(wanted: _Nodes, memory_bytes: int) -> Iterator[_Nodes]:
    """Yield the tensors whose second moments (and one batch's product) fit the memory together."""
    part: _Nodes = {}
    used = 0
    for tensor, nodes in wanted.items():
        size = 2 * 8 * _channels(*nodes[0][:2]) ** 2
        if part and used + size > memory_bytes:
            yield part
            part, used = {}, 0
        part[tensor] = nodes
        used += size
    if part:
        yield part


def _channels(node: ir.Node, what: Operands) -> int:
    assert what.weight is not None
    weight = node.inputs[what.weight]
    assert weight is not None
    assert weight.shape is not None
    return int(weight.shape.numpy()[1 - (what.channel_axis or 0)])


def _round(place: tuple[ir.Node, Operands, QuantSpec], seen: Moments, file: Path, scale_dtype: npt.DTypeLike) -> None:
    node, what, spec = place
    assert what.weight is not None
    assert what.channel_axis is not None
    value = node.inputs[what.weight]
    assert value is not None
    assert value.const_value is not None
    weight = models.read(value.const_value)
    by_rows = weight if what.channel_axis == 1 else weight.T
    gram = seen.centred
    if spec.block is None:
        axis, scale = what.channel_axis, channel_scales(value, spec, what.channel_axis, scale_dtype)
        steps = scale
    else:
        blocks = block_scales(by_rows, spec, np.diagonal(gram), scale_dtype)
        axis, scale = 1 - what.channel_axis, blocks if what.channel_axis == 1 else blocks.T
        steps = np.repeat(blocks, spec.block, axis=0)

    def store(values: F64) -> F64:
        return _symmetric(values, spec.dtype)

    found = refine(by_rows, gptq(by_rows, gram, steps, store), gram, steps, store)
    correction = seen.mean @ (by_rows.astype(np.float64) - found * steps.astype(np.float64))
    stored = (found if what.channel_axis == 1 else found.T).astype(IR_DTYPES[spec.dtype].numpy())
    with file.open("wb") as stream:
        np.savez(
            stream,
            # numpy's file format knows no float8: the bytes are kept.
            weight=np.ascontiguousarray(stored).view(np.uint8),
            scale=np.ascontiguousarray(scale),
            axis=np.int64(axis),
            correction=correction.astype(np.float32),
        )


def _symmetric(steps: F64, dtype: QuantDType) -> F64:
    found: F64 = nearest(np.clip(steps, lowest(dtype), dtype.qmax), dtype)
    return found
