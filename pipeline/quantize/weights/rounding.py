"""Round the weights of one variant with GPTQ or AWQ, as the plan says for each, and keep them in a folder, one file a weight.

Both here minimize the error about its mean, because the mean error is a constant for each output channel, which the bias
takes up exactly (bias correction, Nagel et al. 2019, section 4.2). That matters most where the input is far from zero on
average: behind a shift, or GELU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pipeline import model as models
from pipeline.policy.plan import NodePlan, PrecisionPlan
from pipeline.quantize.products import Product, Reading, product
from pipeline.quantize.weights.awq import clipped_scales
from pipeline.quantize.weights.fake import nearest
from pipeline.quantize.weights.gptq import gptq, refine
from pipeline.quantize.weights.moments import F64, Moments, Tap, fitting, moment_bytes, second_moments
from pipeline.quantize.weights.weight import IR_DTYPES, QuantizedWeight, block_scales, channel_scales, lowest
from pipeline.types import Array, Feeds, Progress, QuantDType, QuantSpec, silent

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
    """Write every quantized MatMul, Gemm and Conv weight of ``plan`` that GPTQ or AWQ rounds; return how many.

    AWQ here rounds to nearest in clipped blocks; it scaled the inputs before, in the float model.

    Weights whose files are in the folder already are left as they are: so a rounding that was killed goes on.
    A weight that several nodes read stays with round-to-nearest.

    Args:
        path: The float model.
        plan: What is quantized, and how each weight is rounded.
        data: Calibration batches, read once for every part that fits the memory.
        folder: Where ``index.json`` and one ``.npz`` a weight (``weight``, ``scale`` and ``correction`` float32) go.
        options: Padding, threads, memory.
        progress: Told of every weight under ``round``.
    """
    model = models.load(path)
    wanted = _wanted(model, plan)
    folder.mkdir(parents=True, exist_ok=True)
    every = [made.node.name or "" for products in wanted.values() for made, _ in products]
    index = {node: f"{number:05}.npz" for number, node in enumerate(every)}
    before = {node for node, file in index.items() if (folder / file).exists()}
    done = len(before)
    progress("round", done, len(index))
    sizes = {key: moment_bytes(products[0][0]) for key, products in wanted.items()}
    for part in fitting(sizes, options.memory_bytes):
        left = {key: [(made, entry) for made, entry in wanted[key] if made.node.name not in before] for key in part}
        if not any(left.values()):
            continue
        # All of the part is tapped: a session with other outputs may sum in another order.
        tap = Tap(path, list(dict.fromkeys(tensor for tensor, _ in part)), mask=options.mask, threads=options.threads)
        readings: dict[str, list[Reading]] = {}
        for tensor, reading in part:
            readings.setdefault(tensor, []).append(reading)
        moments = second_moments(tap, data, readings)
        for key in part:
            seen = moments.pop(key)
            for found, entry in left[key]:
                spec = plan.weight_spec(entry)
                made = _ROUND[entry.rounding or ""](
                    found, spec, seen.centred, plan.scale_dtype, signed=plan.signed_scales
                )
                _write(found, spec, seen, made, folder / index[found.node.name or ""])
                done += 1
                progress("round", done, len(index))
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


_Wanted = dict[tuple[str, Reading], list[tuple[Product, NodePlan]]]


def _wanted(model: ir.Model, plan: PrecisionPlan) -> _Wanted:
    """Return the products to round by the tensor they read and how they read it."""
    entries = {n.node: n for n in plan.quantized() if n.rounding in _ROUND}
    uses = Counter(v for n in model.graph.all_nodes() for v in n.inputs if v is not None and v.is_initializer())
    found: _Wanted = {}
    for node in model.graph:
        entry, made = entries.get(node.name or ""), product(node)
        if entry is None or made is None or made.what.weight is None:
            continue
        weight, value = node.inputs[made.what.weight], node.inputs[0]
        if weight is not None and value is not None and uses[weight] == 1:
            found.setdefault((value.name or "", made.reading), []).append((made, entry))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rounded:
    """A rounded weight as matrices, one for each group of channels.

    Attributes:
        values: What is stored, float64 ``[groups, products summed, outputs]``.
        steps: The scale of each value, in a shape that broadcasts over ``values``.
        scale: What is stored beside it, along ``axis``.
        axis: See :class:`pipeline.quantize.weights.weight.QuantizedWeight`.
    """

    values: F64
    steps: Array
    scale: Array
    axis: int


def _by_gptq(made: Product, spec: QuantSpec, grams: F64, scale_dtype: npt.DTypeLike, *, signed: bool) -> _Rounded:
    weights = made.weight()
    if spec.block is None:
        steps, scale, axis = _channel_steps(made, spec, scale_dtype)
    else:
        found = block_scales(weights[0], spec, np.diagonal(grams[0]), scale_dtype, signed=signed)
        steps, scale, axis = _block_steps(made, spec.block, found)

    def store(values: F64) -> F64:
        return _symmetric(values, spec.dtype)

    values = np.empty(weights.shape)
    for group, (weight, gram, step) in enumerate(zip(weights, grams, steps, strict=True)):
        values[group] = refine(weight, gptq(weight, gram, step, store), gram, step, store)
    return _Rounded(values=values, steps=steps, scale=scale, axis=axis)


def _by_awq(made: Product, spec: QuantSpec, grams: F64, scale_dtype: npt.DTypeLike, *, signed: bool) -> _Rounded:
    weights = made.weight()
    if spec.block is None:
        steps, scale, axis = _channel_steps(made, spec, scale_dtype)
    else:
        found = clipped_scales(weights[0], spec, grams[0], scale_dtype, signed=signed)
        steps, scale, axis = _block_steps(made, spec.block, found)
    values = _symmetric(weights / steps.astype(np.float64), spec.dtype)
    return _Rounded(values=values, steps=steps, scale=scale, axis=axis)


def _channel_steps(made: Product, spec: QuantSpec, scale_dtype: npt.DTypeLike) -> tuple[Array, Array, int]:
    """Return one step for each output channel, for the rounding and as it is stored, and the axis that it is stored along."""
    assert made.what.weight is not None
    assert made.what.channel_axis is not None
    value = made.node.inputs[made.what.weight]
    assert value is not None
    scale = channel_scales(value, spec, made.what.channel_axis, scale_dtype)
    return scale.reshape(made.reading.groups, 1, -1), scale, made.what.channel_axis


def _block_steps(made: Product, block: int, found: Array) -> tuple[Array, Array, int]:
    """The same of blocks whose scales are ``found``, ``[blocks, outputs]``."""
    axis = made.what.channel_axis
    assert axis is not None
    return np.repeat(found, block, axis=0)[None], found if axis == 1 else found.T, 1 - axis


def _write(made: Product, spec: QuantSpec, seen: Moments, found: _Rounded, file: Path) -> None:
    lost = made.weight().astype(np.float64) - found.values * found.steps.astype(np.float64)
    correction = (seen.mean[:, None] @ lost)[:, 0]
    stored = made.stored(found.values).astype(IR_DTYPES[spec.dtype].numpy())
    begun = file.with_suffix(".tmp")
    with begun.open("wb") as stream:
        np.savez(
            stream,
            # numpy's file format knows no float8: the bytes are kept.
            weight=np.ascontiguousarray(stored).view(np.uint8),
            scale=np.ascontiguousarray(found.scale),
            axis=np.int64(found.axis),
            correction=correction.reshape(-1).astype(np.float32),
        )
    begun.replace(file)


_ROUND = {"gptq": _by_gptq, "awq": _by_awq}


def _symmetric(steps: F64, dtype: QuantDType) -> F64:
    found: F64 = nearest(np.clip(steps, lowest(dtype), dtype.qmax), dtype)
    return found
