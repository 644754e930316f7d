"""Quantizes one model with another tool; runs in that tool's own Python environment and imports nothing from here.

``PEER_PYTHON -P benchmarks/quantize_peer.py METHOD MODEL.onnx CALIBRATION.npz SAMPLES OUT.onnx [LEFT_OUT.txt]``

The last file names nodes that stay as they are, one a line; NNCF alone reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8
GEMMS = ["MatMul", "Gemm", "Conv"]
Feeds = dict[str, Any]
LEFT_OUT: list[str] = []


def main() -> None:
    """Quantize as the command line says."""
    method, model, data, samples, out, *rest = sys.argv[1:]
    with np.load(data) as arrays:
        rows = {name: arrays[name][: int(samples)] for name in arrays.files}
    count = len(next(iter(rows.values())))
    feeds = [{k: v[i : i + BATCH] for k, v in rows.items()} for i in range(0, count, BATCH)]
    if rest:
        LEFT_OUT.extend(Path(rest[0]).read_text().split("\n"))
    METHODS[method](Path(model), feeds, Path(out))


def ort_dynamic(model: Path, feeds: list[Feeds], out: Path) -> None:
    """ONNX Runtime, dynamic activations: needs no data."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = _prepared(model, out)
    quantize_dynamic(prepared, out, per_channel=True, weight_type=QuantType.QInt8)
    prepared.unlink()


def ort_static(method: str, *, tuned: bool | None = None, **options: Any) -> Callable[[Path, list[Feeds], Path], None]:
    """ONNX Runtime, static Q/DQ.

    Args:
        method: Its calibrator.
        tuned: Quantize the inputs of matmuls and convolutions with a constant weight and nothing else, with symmetric
            activations if ``True``; ``None`` leaves the placement as it is.
        options: For ``quantize_static``.
    """

    def quantize(model: Path, feeds: list[Feeds], out: Path) -> None:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        prepared = _prepared(model, out)
        if tuned is not None:
            extra: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": GEMMS, "QuantizeBias": False}
            extra |= {"QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}, "ActivationSymmetric": tuned}
            options.update(op_types_to_quantize=GEMMS, nodes_to_exclude=_attention(prepared), extra_options=extra)
        quantize_static(
            prepared,
            out,
            _reader(feeds),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
            **options,
        )
        prepared.unlink()

    return quantize


def ort_int4(model: Path, feeds: list[Feeds], out: Path) -> None:
    """ONNX Runtime, INT4 weights in symmetric blocks of 128 (MatMulNBits), all products with a constant but the last one."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    proto = onnx.load(model)
    last = [n.name for n in proto.graph.node if n.op_type == "MatMul"][-1]
    tool = MatMulNBitsQuantizer(proto, block_size=128, is_symmetric=True, nodes_to_exclude=[last])
    tool.process()
    tool.model.save_model_to_file(str(out), True)


def nncf(preset: str) -> Callable[[Path, list[Feeds], Path], None]:
    """NNCF post-training quantization with a preset."""

    def quantize(model: Path, feeds: list[Feeds], out: Path) -> None:
        import nncf as tool
        import onnx

        kind = tool.ModelType.TRANSFORMER if "attention_mask" in feeds[0] else None
        found = tool.quantize(
            onnx.load(model),
            tool.Dataset(feeds),
            subset_size=len(feeds),
            preset=tool.QuantizationPreset(preset),
            model_type=kind,
            ignored_scope=tool.IgnoredScope(names=LEFT_OUT) if LEFT_OUT else None,
        )
        onnx.save(found, out)

    return quantize


def modelopt(method: str, mode: str = "int8") -> Callable[[Path, list[Feeds], Path], None]:
    """NVIDIA Model-Optimizer, INT8 or INT4 weights in blocks of 128."""

    def quantize(model: Path, feeds: list[Feeds], out: Path) -> None:
        from modelopt.onnx.quantization import quantize as tool

        shapes = ",".join(f"{k}:{'x'.join(map(str, v.shape))}" for k, v in feeds[0].items())
        data = {name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]}
        tool(
            str(model),
            quantize_mode=mode,
            calibration_data=data if len(data) > 1 else next(iter(data.values())),
            calibration_method=method,
            calibration_shapes=shapes,
            calibration_eps=["cpu"],
            output_path=str(out),
            high_precision_dtype="fp32",
            **({"block_size": 128} if mode == "int4" else {}),
        )

    return quantize


METHODS: dict[str, Callable[[Path, list[Feeds], Path], None]] = {
    "ort-dynamic": ort_dynamic,
    "ort-int4": ort_int4,
    "ort-static": ort_static("MinMax"),
    "ort-static-gemm-entropy": ort_static("Entropy", op_types_to_quantize=GEMMS),
    "ort-static-tuned-symmetric": ort_static("MinMax", tuned=True),
    "ort-static-tuned-asymmetric": ort_static("MinMax", tuned=False),
    "nncf-performance": nncf("performance"),
    "nncf-mixed": nncf("mixed"),
    "modelopt-max": modelopt("max"),
    "modelopt-entropy": modelopt("entropy"),
    "modelopt-int4-awq": modelopt("awq_clip", "int4"),
}


def _prepared(model: Path, out: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = out.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(model, prepared)
    except Exception:  # its symbolic shape inference gives up on some models; the tool's own advice is to skip it
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
    return prepared


def _reader(feeds: list[Feeds]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[Feeds] = iter(feeds)

        def get_next(self) -> Feeds | None:
            return next(self.left, None)

    return Reader()


def _attention(model: Path) -> list[str]:
    """Return the matmuls of two activations."""
    import onnx

    graph = onnx.load(model).graph
    constants = {t.name for t in graph.initializer} | {
        o for n in graph.node if n.op_type == "Constant" for o in n.output
    }
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] not in constants]


if __name__ == "__main__":
    main()
