r"""What smoothing and GPTQ bring on MiniLM, beside NNCF and Model-Optimizer: accuracy, and the cost of the whole command.

    python -m benchmarks.methods --models build/bench/models --work build/bench/work --nncf-python PYTHON \
        --modelopt-python PYTHON

All 36 projections and FFN, symmetric INT8, FP8, both, or INT4 weights in blocks of 128, run by ONNX Runtime as the graph stands
(optimizations off), so that no CPU kernel's saturation or lack of a type plays a part. Every row is quantized from nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks import peers
from benchmarks.accuracy import Bench
from benchmarks.fidelity import compare, int8_share, outputs
from benchmarks.processes import measured
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress

METHODS = {
    "a100": (
        ("round to nearest", "int8", "auto", "off", "rtn"),
        ("smoothing", "int8", "minmax", "auto", "rtn"),
        ("GPTQ", "int8", "auto", "off", "gptq"),
        ("smoothing and GPTQ", "int8", "minmax", "auto", "gptq"),
        ("round to nearest", "int4", "minmax", "off", "rtn"),
        ("AWQ", "int4", "minmax", "off", "awq"),
        ("GPTQ", "int4", "minmax", "off", "gptq"),
    ),
    "l40s": (
        ("round to nearest", "fp8", "minmax", "off", "rtn"),
        ("GPTQ", "fp8", "minmax", "off", "gptq"),
        ("smoothing and GPTQ", "fp8", "minmax", "auto", "gptq"),
        ("smoothing and GPTQ", "fp8-int8", "minmax", "auto", "gptq"),
    ),
}
"""Target to (title, preset, calibration method, smoothing, rounding)."""
PEER_ROWS = {"nncf-performance": "int8", "modelopt-int4-awq": "int4"}
"""Peer to the preset that it stands beside."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--only", help="measure the rows of one preset alone")
    peers.add_arguments(parser, "nncf", "modelopt")
    given = parser.parse_args()
    model, data = given.models / "minilm.onnx", given.models / "minilm_calib.npz"
    bench = Bench(model, given.models / "minilm_eval.npz", given.work / "text")
    print_header("Smoothing and rounding", "benchmarks.methods", [f"calibrated on {given.samples} samples"])
    rows = []
    for target, methods in METHODS.items():
        for title, preset, calibrator, smooth, rounding in methods:
            if given.only not in (None, preset):
                continue
            progress(f"{preset}: {title}")
            folder = given.work / f"methods.{preset}.{smooth}.{rounding}"
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "pipeline", "quantize", str(model), "--precision", preset]
            command += ["--target", target, "--calibration", str(data), "--samples", str(given.samples)]
            command += ["--method", calibrator, "--policy.smooth", smooth, "--policy.rounding", rounding]
            cost = measured([*command, "-o", str(folder)])
            (path,) = folder.glob("variants/gpu-*/model.onnx")
            rows.append([f"ours, {title}", preset, *_figures(bench, path), f"{cost.cpu_seconds:.0f}",
                         f"{cost.peak_rss_bytes / 1e6:.0f}"])  # fmt: skip
    for name, preset in PEER_ROWS.items():
        if given.only in (None, preset):
            rows.append([peers.PEERS[name].title, preset, *_peer(name, given, bench)])
    print_table(["method", "preset", "held-out SQNR, dB", "cosine", "GEMM FLOPs", "CPU s", "peak RSS, MB"], rows)


def _figures(bench: Bench, path: Path) -> list[str]:
    found = compare(bench.reference, outputs(path, bench.data, optimize=False))
    return [f"{found.sqnr_db:.2f}", f"{found.cosine:.4f}", f"{int8_share(path, bench.data):.1%}"]


def _peer(name: str, given: argparse.Namespace, bench: Bench) -> list[str]:
    python = peers.pythons(given).get(peers.PEERS[name].tool)
    if python is None:
        return [NOT_MEASURED] * 5
    progress(peers.PEERS[name].title)
    out = given.work / f"methods.{name}.onnx"
    cost = peers.quantize(
        name, python, given.models / "minilm.onnx", given.models / "minilm_calib.npz", given.samples, out
    )
    return [*_figures(bench, out), f"{cost.cpu_seconds:.0f}", f"{cost.peak_rss_bytes / 1e6:.0f}"]


if __name__ == "__main__":
    main()
