r"""Weights alone on a CPU: MiniLM in INT4, INT8 and NF4 beside FP32 and ONNX Runtime's own INT4, size, accuracy and time in one run.

    python -m benchmarks.weight_only --models build/bench/models --work build/bench/work --ort-python .venv/bin/python

GPTQ and AWQ read 64 calibration samples; all else is rounded without data. Speed is in CPU seconds of one thread, medians of runs that
take turns, as a ratio to FP32's. CPU seconds of quantizing are those of the whole command from a fresh process.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

from benchmarks import peers
from benchmarks.builds import size_bytes
from benchmarks.fidelity import Feeds, compare, load, open_session, outputs
from benchmarks.processes import Cost, measured
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress

BATCHES = (1, 8)
RUNS = 15
OURS: dict[str, tuple[str, ...]] = {
    "ours, INT4 in blocks of 128": ("int4",),
    "ours, INT4 in blocks of 128, AWQ": ("int4", "--policy.rounding", "awq"),
    "ours, INT4 in blocks of 128, GPTQ": ("int4", "--policy.rounding", "gptq"),
    "ours, INT4 in blocks of 32": ("int4", "--policy.block_size", "32"),
    "ours, INT8 in blocks of 128": ("w8a16",),
    "ours, INT8 in blocks of 32": ("w8a16", "--policy.block_size", "32"),
    "ours, NF4 in blocks of 64": ("nf4",),
    "ours, NF4 in blocks of 64, double quantization": ("nf4", "--policy.double_quantization", "true"),
}
"""Title to preset and further flags; a rounding reads calibration data."""
SAMPLES = 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    peers.add_arguments(parser, "ort")
    given = parser.parse_args()
    model, data = given.models / "minilm.onnx", given.models / "minilm_calib.npz"
    heldout = load(given.models / "minilm_eval.npz")
    print_header("Weights alone on a CPU", "benchmarks.weight_only")
    files: dict[str, Path | str] = {"FP32": model}
    costs: dict[str, Cost] = {}
    for index, (title, flags) in enumerate(OURS.items()):
        progress(title)
        folder = given.work / f"weight_only.{index}"
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pipeline", "quantize", str(model), "--target", "cpu", "--precision", *flags]
        if "--policy.rounding" in flags:
            command += ["--calibration", str(data), "--samples", str(SAMPLES), "--method", "minmax"]
        costs[title] = measured([*command, "-o", str(folder)])
        files[title] = folder / "variants/cpu/model.onnx"
    python, title = peers.pythons(given).get("ort"), peers.PEERS["ort-int4"].title
    files[title] = NOT_MEASURED
    if python is not None:
        progress(title)
        files[title] = out = given.work / "weight_only.ort-int4.onnx"
        costs[title] = peers.quantize("ort-int4", python, model, data, 0, out)
    live = {title: path for title, path in files.items() if isinstance(path, Path)}
    seconds = times(live, heldout)
    reference = outputs(model, heldout)
    rows = []
    for title, path in files.items():
        if not isinstance(path, Path):
            rows.append([title, path, *[""] * 4])
            continue
        found = compare(reference, outputs(path, heldout))
        faster = [f"{seconds['FP32', batch] / seconds[title, batch]:.2f}x" for batch in BATCHES]
        accuracy = f"{found.sqnr_db:.2f}" if title != "FP32" else ""
        cost = f"{costs[title].cpu_seconds:.0f}" if title in costs else ""
        rows.append([title, f"{size_bytes(path) / 1e6:.1f}", accuracy, cost, *faster])
    print_table(["model", "size, MB", "held-out SQNR, dB", "CPU s", *(f"speed, batch {b}" for b in BATCHES)], rows)


def times(files: dict[str, Path], data: Feeds) -> dict[tuple[str, int], float]:
    """Return the median CPU seconds of each file and batch size; the files take turns."""
    live = {title: open_session(path) for title, path in files.items()}
    seen: dict[tuple[str, int], list[float]] = {}
    for turn in range(RUNS + 1):
        for batch in BATCHES:
            feeds = {name: values[:batch] for name, values in data.items()}
            for title, session in live.items():
                start = time.process_time()
                session.run(None, feeds)
                if turn:  # the first run prepares
                    seen.setdefault((title, batch), []).append(time.process_time() - start)
    return {key: statistics.median(values) for key, values in seen.items()}


if __name__ == "__main__":
    main()
