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
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.fake import nearest
from pipeline.quantize.gptq import gptq, refine
from pipeline.quantize.moments import F64, MOST_TAPPED, Moments, Tap, second_moments
from pipeline.quantize.products import Product, Reading, product
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
    """Write every quantized MatMul, Gemm and Conv weight of ``plan``, rounded by GPTQ; return how many.

    A weight that several nodes read stays with round-to-nearest.

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
        tap = Tap(path, list(dict.fromkeys(tensor for tensor, _ in part)), mask=options.mask, threads=options.threads)
        readings: dict[str, list[Reading]] = {}
        for tensor, reading in part:
            readings.setdefault(tensor, []).append(reading)
        moments = second_moments(tap, data, readings)
        for key, products in part.items():
            seen = moments.pop(key)
            for found, spec in products:
                file = f"{len(index):05}.npz"
                index[found.node.name or ""] = file
                _round(found, spec, seen, folder / file, scale_dtype, signed=plan.signed_scales)
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


_Wanted = dict[tuple[str, Reading], list[tuple[Product, QuantSpec]]]


def _wanted(model: ir.Model, plan: PrecisionPlan) -> _Wanted:
    """Return the products to round by the tensor they read and how they read it."""
    precisions = {n.node: n.precision for n in plan.quantized()}
    uses = Counter(v for n in model.graph.all_nodes() for v in n.inputs if v is not None and v.is_initializer())
    found: _Wanted = {}
    for node in model.graph:
        precision, made = precisions.get(node.name or ""), product(node)
        if precision is None or made is None or made.what.weight is None:
            continue
        spec = plan.weight_spec(precision, made.shape, made.what.channel_axis)
        weight, value = node.inputs[made.what.weight], node.inputs[0]
        if weight is not None and value is not None and uses[weight] == 1:
            found.setdefault((value.name or "", made.reading), []).append((made, spec))
    return found


def _parts(wanted: _Wanted, memory_bytes: int) -> Iterator[_Wanted]:
    """Yield the tensors whose second moments (and one batch's product) fit the memory together."""
    part: _Wanted = {}
    used = 0
    for key, products in wanted.items():
        groups, summed = products[0][0].channels.shape
        size = 2 * 8 * groups * summed**2
        if part and (used + size > memory_bytes or len(part) == MOST_TAPPED):
            yield part
            part, used = {}, 0
        part[key] = products
        used += size
    if part:
        yield part


def _round(
    made: Product, spec: QuantSpec, seen: Moments, file: Path, scale_dtype: npt.DTypeLike, *, signed: bool
) -> None:
    assert made.what.weight is not None
    assert made.what.channel_axis is not None
    value = made.node.inputs[made.what.weight]
    assert value is not None
    weights, grams = made.weight(), seen.centred
    if spec.block is None:
        axis, scale = made.what.channel_axis, channel_scales(value, spec, made.what.channel_axis, scale_dtype)
        steps = scale.reshape(len(weights), 1, -1)
    else:
        blocks = block_scales(weights[0], spec, np.diagonal(grams[0]), scale_dtype, signed=signed)
        axis, scale = 1 - made.what.channel_axis, blocks if made.what.channel_axis == 1 else blocks.T
        steps = np.repeat(blocks, spec.block, axis=0)[None]

    def store(values: F64) -> F64:
        return _symmetric(values, spec.dtype)

    found = np.empty(weights.shape)
    correction = np.empty((len(weights), weights.shape[2]))
    for group, (weight, gram, step) in enumerate(zip(weights, grams, steps, strict=True)):
        found[group] = refine(weight, gptq(weight, gram, step, store), gram, step, store)
        lost = weight.astype(np.float64) - found[group] * step.astype(np.float64)
        correction[group] = seen.mean[group] @ lost
    stored = made.stored(found).astype(IR_DTYPES[spec.dtype].numpy())
    with file.open("wb") as stream:
        np.savez(
            stream,
            # numpy's file format knows no float8: the bytes are kept.
            weight=np.ascontiguousarray(stored).view(np.uint8),
            scale=np.ascontiguousarray(scale),
            axis=np.int64(axis),
            correction=correction.reshape(-1).astype(np.float32),
        )


def _symmetric(steps: F64, dtype: QuantDType) -> F64:
    found: F64 = nearest(np.clip(steps, lowest(dtype), dtype.qmax), dtype)
    return found
