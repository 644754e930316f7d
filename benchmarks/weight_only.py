r"""Weights alone on a CPU: MiniLM in INT4 and INT8 beside FP32 and ONNX Runtime's own INT4, size, accuracy and time in one run.

    python -m benchmarks.weight_only --models build/bench/models --work build/bench/work --ort-python .venv/bin/python

Nothing is calibrated. Times are CPU seconds of one thread, medians of runs that take turns, as a ratio to FP32's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benchmarks import peers
from benchmarks.builds import size_bytes, variant
from benchmarks.fidelity import Feeds, compare, load, open_session, outputs
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress

BATCHES = (1, 8)
RUNS = 15
OURS = {
    "ours, INT4 in blocks of 128": {"policy_preset": "int4"},
    "ours, INT4 in blocks of 32": {"policy_preset": "int4", "policy_block_size": "32"},
    "ours, INT8 in blocks of 128": {"policy_preset": "w8a16"},
    "ours, INT8 in blocks of 32": {"policy_preset": "w8a16", "policy_block_size": "32"},
}


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
    for title, settings in OURS.items():
        progress(title)
        files[title] = variant(model, data, given.work, policy_rounding="rtn", **settings)
    python = peers.pythons(given).get("ort")
    made = peers.quantized("ort-int4", python, model, data, 0, given.work) if python is not None else NOT_MEASURED
    files[peers.PEERS["ort-int4"].title] = made
    live = {title: path for title, path in files.items() if isinstance(path, Path)}
    seconds = times(live, heldout)
    reference = outputs(model, heldout)
    rows = []
    for title, path in files.items():
        if not isinstance(path, Path):
            rows.append([title, path, *[""] * 3])
            continue
        found = compare(reference, outputs(path, heldout))
        faster = [f"{seconds['FP32', batch] / seconds[title, batch]:.2f}x" for batch in BATCHES]
        accuracy = f"{found.sqnr_db:.2f}" if title != "FP32" else ""
        rows.append([title, f"{size_bytes(path) / 1e6:.1f}", accuracy, *faster])
    print_table(["model", "size, MB", "held-out SQNR, dB", *(f"speed, batch {b}" for b in BATCHES)], rows)


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
