"""A report as a build of a small encoder for two targets would write it."""

from __future__ import annotations

from typing import Any

from pipeline.report.contract import (
    Calibration,
    Compiled,
    Histogram,
    Kernel,
    NodePrecision,
    Notice,
    Report,
    Source,
    Stage,
    Target,
    TargetStatus,
    Tensor,
    TensorRange,
)
from pipeline.report.measured import Validation, nothing_measured


def latency(batch: int, engine_ms: float, fp32_ms: float) -> dict[str, Any]:
    def times(ms: float) -> dict[str, float]:
        return {"p50": ms, "p90": 1.1 * ms, "min": 0.9 * ms, "max": 1.5 * ms, "cpu_p50": 1.9 * ms}

    speed = fp32_ms / engine_ms
    return {
        **times(engine_ms),
        "batch": batch,
        "runs": 25,
        "fp32": times(fp32_ms),
        "speedup": speed,
        "speedup_min": speed,
        "speedup_cpu": speed,
        "fp16": None,
        "speedup_fp16": None,
    }


def metrics(sqnr_db: float | None = 16.31, **changes: Any) -> dict[str, Any]:
    return {
        "count": 49152,
        "nonfinite": 0,
        "exact": False,
        "sqnr_db": sqnr_db,
        "cosine": 0.98842,
        "cosine_min": 0.9613,
        "max_abs": 1.0213,
        "mean_abs": 0.0412,
        "relative_l2": 0.153,
        "top1_agreement": 0.9271,
        "exact_match": None,
    } | changes


def validation(**changes: Any) -> Validation:
    outputs = {"last_hidden_state": metrics(), "pooled": metrics(22.5)}
    values: dict[str, Any] = {
        "verdict": "passed",
        "gates": [
            {"key": "sqnr_db", "condition": ">= 15", "value": 16.31, "reference": None, "passed": True, "reason": None},
            {
                "key": "task.pearson",
                "condition": ">= 99% of fp32",
                "value": 0.841,
                "reference": 0.8457,
                "passed": True,
                "reason": None,
            },
        ],
        "mode": "measured",
        "samples": 64,
        "threads": 2,
        "device": None,
        "outputs": outputs,
        "stages": {"engine": outputs, "qdq_plain": {"last_hidden_state": metrics(16.4), "pooled": metrics(22.6)}},
        "task": {"name": "embedding-similarity", "fp32": {"pearson": 0.8457}, "engine": {"pearson": 0.841}},
        "latency_ms": {"b1": latency(1, 9.87, 17.67), "b8": latency(8, 71.2, 129.6)},
        "engine_bytes": 58_912_001,
        "fp32_bytes": 90_359_571,
        "layers": [
            {
                "node": "encoder/layer.3/output/dense/MatMul",
                "local_sqnr_db": 14.2,
                "isolated_sqnr_db": 21.0,
                "noise_share": 0.412,
            },
            {
                "node": "encoder/layer.0/attention/query/MatMul",
                "local_sqnr_db": None,
                "isolated_sqnr_db": 41.7,
                "noise_share": 0.021,
            },
        ],
        "not_measured": {},
    }
    return Validation.model_validate(values | changes)


def plan(count: int = 6) -> tuple[NodePrecision, ...]:
    roles = [
        ("attention_query", "MatMul", "int8", "preset int8: projections"),
        ("attention_scores", "MatMul", "fp32", "preset int8: attention core stays high"),
        ("attention_softmax", "Softmax", "fp32", "softmax stays high"),
        ("ffn_up", "MatMul", "int8", "preset int8: FFN"),
        ("ffn_down", "MatMul", "int8", "rule 1: {role: ffn_down, precision: int8}"),
        ("norm", "LayerNormalization", "fp32", "norms stay high"),
    ]
    return tuple(
        NodePrecision(
            variant="cpu",
            node=f"encoder/layer.{block}/{role}/{op}",
            op_type=op,
            role=role,
            block=block,
            precision=precision,
            rule=rule,
        )
        for block in range(count)
        for role, op, precision, rule in roles
    )


def ranges(count: int = 6) -> tuple[TensorRange, ...]:
    return tuple(
        TensorRange(
            variant="cpu",
            tensor=f"encoder/layer.{block}/ffn_up/input",
            dtype="uint8",
            method="mse" if block % 2 else "minmax",
            min=-3.25,
            max=7.5,
            scale=0.04215686,
            zero_point=77,
            alternatives={"minmax": 12.5, "mse": 11.25, "percentile": 301.0, "entropy": 88.0},
            options={"minmax": (-3.5, 8.0), "mse": (-3.25, 7.5), "percentile": (-2.0, 4.0), "entropy": (-2.5, 5.0)},
            histogram=Histogram(min=-3.5, max=8.0, counts=(1, 20, 900, 50_000, 800, 30, 2, 0, 1)) if block else None,
        )
        for block in range(count)
    )


SOURCE = Source(
    kind="huggingface",
    name="all-MiniLM-L6-v2",
    task="feature-extraction",
    sha256="5d3c" * 16,
    opset=21,
    fp32_bytes=90_359_571,
    max_relative_difference=3.1e-7,
    inputs=(
        Tensor(name="input_ids", dtype="int64", shape=("batch", "sequence")),
        Tensor(name="attention_mask", dtype="int64", shape=("batch", None)),
    ),
    outputs=(Tensor(name="last_hidden_state", dtype="float32", shape=("batch", "sequence", 384)),),
)


def report(**changes: Any) -> Report:
    parts: dict[str, Any] = {
        "name": "minilm",
        "versions": {"python": "3.11.9", "onnxruntime": "1.31.0", "enginewright": "0.1.0"},
        "source": SOURCE,
        "calibration": Calibration(
            samples=512, seconds=41.2, fp32_forward_seconds=36.9, peak_rss_bytes=1_210_000_000, method="auto"
        ),
        "precision_plan": plan(),
        "ranges": ranges(),
        "targets": {
            "cpu": Target(
                status=TargetStatus.BUILT,
                reason=None,
                variant="cpu",
                engine="engines/cpu/model.onnx",
                bytes=58_912_001,
                seconds=1.4,
                compiled=None,
            ),
            "a100": Target(
                status=TargetStatus.COMPILE_CHECKED,
                reason="no A100 in this machine; compiled for sm80 with TensorRT for RTX",
                variant="gpu-int8",
                engine=None,
                bytes=None,
                seconds=12.8,
                compiled=Compiled(
                    builder="tensorrt-rtx 1.7.1",
                    compute_capability="SM80",
                    proxy_for=None,
                    estimate_ms=0.104,
                    requested=36,
                    met=36,
                    not_met=(),
                    fp16=None,
                    kernels=74,
                    fused_attention=6,
                    low_precision_flops_share=0.913,
                    bytes_moved=205_000_000,
                    engine_bytes=39_000_000,
                    layers=tuple(
                        Kernel(
                            name=f"__myl_gemm_{i}",
                            kind="gemm",
                            types="Int8 x Int8 -> Half",
                            bytes_moved=10**6 + i,
                            nodes=3,
                        )
                        for i in range(3)
                    ),
                ),
            ),
        },
        "validation": {"cpu": validation(), "a100": nothing_measured("no engine was run on this machine")},
        "repository": "triton/minilm",
        "notices": (
            Notice(
                code="few-samples",
                message="64 samples are few for calibration; 100 to 500 are usual.",
                where="calibration.data",
            ),
        ),
        "stages": (
            Stage(name="export", seconds=8.1, fresh=False),
            Stage(name="collect", seconds=41.2, fresh=True),
            Stage(name="quantize/cpu", seconds=3.4, fresh=True),
            Stage(name="validate/cpu", seconds=22.0, fresh=True),
        ),
        "manifest": "manifest.json",
    }
    return Report(**(parts | changes))


def slower_report() -> Report:
    rows = {"b1": latency(1, 20.0, 10.0), "b8": latency(8, 71.2, 129.6)}
    failed = {
        "key": "speedup",
        "condition": ">= 1",
        "value": 0.5,
        "reference": None,
        "passed": False,
        "reason": None,
    }
    changed = validation(latency_ms=rows, gates=[failed], verdict="failed")
    return report(
        validation={"cpu": changed, "a100": nothing_measured("no engine was run on this machine")}, repository=None
    )
