r"""Ranges at run time on a CPU: MiniLM in INT8 with one range a tensor, one a token, and LLM.int8()'s outlier columns in float.

    python -m benchmarks.run_time_ranges --models build/bench/models --work build/bench/work

Times are CPU seconds of one thread, medians of runs that take turns, as a ratio to FP32's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.builds import variant
from benchmarks.fidelity import compare, load, outputs
from benchmarks.tables import print_header, print_table, progress
from benchmarks.weight_only import BATCHES, times

OURS = {
    "static, not smoothed": {"policy_smooth": "off"},
    "static, smoothed": {"policy_smooth": "auto"},
    "dynamic, per tensor": {"policy_activations": "dynamic"},
    "dynamic, per token": {"policy_activations": "dynamic-per-token"},
    "dynamic, per tensor, columns beyond 6 in float": {
        "policy_activations": "dynamic",
        "policy_llm_int8_threshold": "6",
    },
    "dynamic, per token, columns beyond 6 in float (LLM.int8())": {
        "policy_activations": "dynamic-per-token",
        "policy_llm_int8_threshold": "6",
    },
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    given = parser.parse_args()
    model, data = given.models / "minilm.onnx", given.models / "minilm_calib.npz"
    heldout = load(given.models / "minilm_eval.npz")
    print_header(
        "Ranges at run time on a CPU", "benchmarks.run_time_ranges", [f"calibrated on {given.samples} samples"]
    )
    files = {"FP32": model}
    for title, settings in OURS.items():
        progress(title)
        files[title] = variant(model, data, given.work, samples=given.samples, **settings)
    seconds, reference = times(files, heldout), outputs(model, heldout)
    rows = []
    for title, path in files.items():
        found = compare(reference, outputs(path, heldout))
        figures = [f"{found.sqnr_db:.2f}", f"{found.cosine:.4f}"] if title != "FP32" else ["", ""]
        rows.append([title, *figures, *(f"{seconds['FP32', b] / seconds[title, b]:.2f}x" for b in BATCHES)])
    print_table(["activations", "held-out SQNR, dB", "cosine", *(f"speed, batch {b}" for b in BATCHES)], rows)


if __name__ == "__main__":
    main()
