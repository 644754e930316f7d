r"""Mixed precision on MiniLM at a given share of the GEMM FLOPs in INT8, beside NNCF with the same nodes left out.

    python -m benchmarks.mixed --models build/bench/models --work build/bench/work --nncf-python PYTHON

Symmetric INT8 for a100, run by ONNX Runtime as the graph stands (optimizations off). The nodes that NNCF leaves out are those
that ours chose, and then the attention matmuls too, which ours never quantizes here. Every row is quantized from nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import onnx

from benchmarks import peers
from benchmarks.accuracy import Bench
from benchmarks.fidelity import compare, int8_share, outputs
from benchmarks.processes import Cost, measured
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--share", type=float, default=0.75, help="least share of the GEMM FLOPs in INT8")
    parser.add_argument("--sqnr", type=float, default=27, help="SQNR to reach on calibration samples, dB")
    peers.add_arguments(parser, "nncf")
    given = parser.parse_args()
    model = given.models / "minilm.onnx"
    bench = Bench(model, given.models / "minilm_eval.npz", given.work / "text")
    print_header("Mixed precision", "benchmarks.mixed", [f"calibrated on {given.samples} samples"])
    rows, chosen = [], []
    for rounding in ("rtn", "gptq"):
        for bound in ({}, {"low_share": given.share}, {"sqnr_db": given.sqnr}):
            title = ", ".join([f"ours, {rounding}", *(f"{key} {value:g}" for key, value in bound.items())])
            progress(title)
            path, cost = _ours(model, given, rounding, bound)
            rows.append([title, *_figures(bench, path, cost)])
            if "low_share" in bound:
                chosen = _chosen(path.with_name("mixed_precision.json"))
    products = [n.name for n in onnx.load(model).graph.node if n.op_type in ("MatMul", "Gemm")]
    weighted = _weighted(model)
    ignored = [n for n in chosen if n in products]
    attention = [n for n in products if n not in weighted]
    for title, nodes in (
        ("NNCF PERFORMANCE", []),
        (f"NNCF PERFORMANCE, the same {len(ignored)} GEMMs left out", ignored),
        ("NNCF PERFORMANCE, those and the attention matmuls left out", [*ignored, *attention]),
    ):
        rows.append([title, *_nncf(title, given, bench, nodes)])
    print_table(["method", "held-out SQNR, dB", "cosine", "GEMM FLOPs in INT8", "CPU s", "peak RSS, MB"], rows)


def _ours(model: Path, given: argparse.Namespace, rounding: str, bound: dict[str, float]) -> tuple[Path, Cost]:
    folder = given.work / ".".join(["mixed", rounding, *bound])
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline", "quantize", str(model), "--precision", "int8", "--target", "a100"]
    command += ["--calibration", str(given.models / "minilm_calib.npz"), "--samples", str(given.samples)]
    command += ["--policy.rounding", rounding, "-o", str(folder)]
    for key, value in bound.items():
        command += [f"--policy.mixed_precision.{key}", str(value)]
    cost = measured(command)
    (path,) = folder.glob("variants/gpu-*/model.onnx")
    return path, cost


def _chosen(file: Path) -> list[str]:
    units = json.loads(file.read_text(encoding="utf-8"))["units"]
    return [node for unit in units if unit["high"] for node in unit["nodes"]]


def _weighted(model: Path) -> set[str]:
    graph = onnx.load(model).graph
    constants = {t.name for t in graph.initializer}
    return {n.name for n in graph.node if any(i in constants for i in n.input[:2])}


def _nncf(title: str, given: argparse.Namespace, bench: Bench, left_out: list[str]) -> list[str]:
    python = peers.pythons(given).get("nncf")
    if python is None:
        return [NOT_MEASURED] * 5
    progress(title)
    out = given.work / f"mixed.nncf.{len(left_out)}.onnx"
    model, data = given.models / "minilm.onnx", given.models / "minilm_calib.npz"
    cost = peers.quantize("nncf-performance", python, model, data, given.samples, out, left_out)
    return _figures(bench, out, cost)


def _figures(bench: Bench, path: Path, cost: Cost) -> list[str]:
    found = compare(bench.reference, outputs(path, bench.data, optimize=False))
    return [
        f"{found.sqnr_db:.2f}",
        f"{found.cosine:.4f}",
        f"{int8_share(path, bench.data):.1%}",
        f"{cost.cpu_seconds:.0f}",
        f"{cost.peak_rss_bytes / 1e6:.0f}",
    ]


if __name__ == "__main__":
    main()
