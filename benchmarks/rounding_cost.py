r"""What rounding the INT4 weight of one large layer costs: to nearest, by AWQ and by GPTQ, beside Model-Optimizer's AWQ clip.

    python -m benchmarks.rounding_cost --work build/bench/work --modelopt-python PYTHON

One MatMul with a random weight of heavy tails, blocks of 128; its inputs are correlated and one channel in a hundred is twenty times
as large, as in language models. 16 samples of 128 tokens calibrate, four others are held out. Costs are those of the whole command
from a fresh process; the held-out SQNR is of the graph as it stands (ONNX Runtime's optimizations off).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks import peers
from benchmarks.fidelity import Array, compare, outputs
from benchmarks.processes import Cost, measured
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress

SHAPES = ((4096, 4096), (4096, 11008))
"""Of a 7-billion-parameter language model: an attention projection, and the FFN's first."""
METHODS = {"ours, round to nearest": "rtn", "ours, AWQ": "awq", "ours, GPTQ": "gptq"}
PEER = "modelopt-int4-awq"
TOKENS, CALIBRATION, HELD_OUT = 128, 16, 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    peers.add_arguments(parser, "modelopt")
    given = parser.parse_args()
    print_header("What rounding one layer costs", "benchmarks.rounding_cost")
    rows = []
    for summed, columns in SHAPES:
        folder = given.work / f"rounding_cost.{summed}x{columns}"
        shutil.rmtree(folder, ignore_errors=True)
        model, data, heldout = _layer(folder, summed, columns)
        reference = outputs(model, heldout, optimize=False)
        for title, rounding in METHODS.items():
            progress(f"{summed} x {columns}: {title}")
            cost, path = _ours(folder, model, data, rounding)
            rows.append(
                _row(title, summed, columns, cost, compare(reference, outputs(path, heldout, optimize=False)).sqnr_db)
            )
        python = peers.pythons(given).get("modelopt")
        title = peers.PEERS[PEER].title
        if python is None:
            rows.append([title, f"{summed} x {columns}", NOT_MEASURED, "", "", ""])
            continue
        progress(f"{summed} x {columns}: {title}")
        out = folder / "peer.onnx"
        cost = peers.quantize(PEER, python, model, data, CALIBRATION, out)
        rows.append(
            _row(title, summed, columns, cost, compare(reference, outputs(out, heldout, optimize=False)).sqnr_db)
        )
    columns_ = ["method", "layer", "held-out SQNR, dB", "CPU s", "CPU s per million parameters", "peak RSS, MB"]
    print_table(columns_, rows)


def _layer(folder: Path, summed: int, columns: int) -> tuple[Path, Path, dict[str, Array]]:
    """Write one MatMul and its calibration data; return both and the held-out inputs."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    weight = (draw.standard_t(5, size=(summed, columns)) / np.sqrt(summed)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", TOKENS, summed])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", TOKENS, columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), model)
    mixing = draw.normal(size=(64, summed)).astype(np.float32) / 8
    loud = np.where(draw.uniform(size=summed) < 0.01, 20, 1).astype(np.float32)
    samples = CALIBRATION + HELD_OUT
    values = draw.normal(size=(samples, TOKENS, summed)).astype(np.float32)
    values += draw.normal(size=(samples, TOKENS, 64)).astype(np.float32) @ mixing
    values *= loud
    np.savez(folder / "data.npz", x=values[:CALIBRATION])
    return model, folder / "data.npz", {"x": values[CALIBRATION:]}


def _ours(folder: Path, model: Path, data: Path, rounding: str) -> tuple[Cost, Path]:
    """Quantize with the command and return its cost and the variant, which computes in FP32 what is not stored in INT4."""
    recipe = {
        "source": {"onnx": str(model.resolve())},
        "calibration": {"data": str(data.resolve()), "samples": CALIBRATION, "method": "minmax"},
        "policy": {"preset": "fp32", "rounding": rounding, "rules": [{"op_type": "MatMul", "precision": "int4"}]},
        "targets": ["a100"],
    }
    file, out = folder / f"{rounding}.yaml", folder / rounding
    file.write_text(json.dumps(recipe), encoding="utf-8")
    cost = measured([sys.executable, "-m", "pipeline", "quantize", "-r", str(file), "-o", str(out)])
    return cost, out / "variants/gpu-int4/model.onnx"


def _row(title: str, summed: int, columns: int, cost: Cost, sqnr_db: float) -> list[str]:
    each = cost.cpu_seconds / (summed * columns / 1e6)
    figures = [f"{sqnr_db:.2f}", f"{cost.cpu_seconds:.0f}", f"{each:.2f}", f"{cost.peak_rss_bytes / 1e6:.0f}"]
    return [title, f"{summed} x {columns}", *figures]


if __name__ == "__main__":
    main()
