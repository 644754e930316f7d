"""What one command costs, from an FP32 ``.onnx`` to a published INT8 engine, beside another tool's quantization.

    python -m benchmarks.whole_command --models build/bench/models --nncf-python PYTHON

Ours is ``python -m pipeline build`` in a fresh folder: prepare, calibrate, plan, choose ranges, quantize, check the
fusion, publish, report. The peer's is its ``quantize`` call alone and the saving of the file. CPU seconds and peak
memory are those of the whole process tree, imports included. A row of its own adds validation and latency measurement.
The calibration kernels are compiled at the first run on a machine and kept on disk: the first row starts without them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import peers
from benchmarks.processes import Cost, measured
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress, spread

SAMPLES = 64
PEER = "nncf-performance"


@dataclass(slots=True)
class Side:
    """One command, its costs and, of ours, the seconds of every stage."""

    title: str
    costs: list[Cost] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="minilm", help="a model made by benchmarks.models")
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cold", type=int, default=3, help="repeats without compiled kernels")
    peers.add_arguments(parser, "nncf")
    given = parser.parse_args()
    print_header(
        "Whole command",
        "benchmarks.whole_command",
        [
            f"{given.name}, {SAMPLES} samples, medians of {given.repeats} interleaved runs (least–most), "
            f"{given.cold} without compiled kernels",
        ],
    )
    python = peers.pythons(given).get("nncf")
    warm, cold = Side("ours"), Side("ours, kernels not yet compiled")
    whole, other = Side("ours, with validation and latency"), Side(f"{peers.PEERS[PEER].title}, quantize alone")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for repeat in range(max(given.repeats, given.cold)):
            progress(f"repeat {repeat + 1} of {given.repeats}")
            if repeat < given.cold:
                _ours(cold, given, work, kernels=work / f"cold{repeat}")
            if repeat >= given.repeats:
                continue
            # The first run of all fills this folder and is not counted.
            kernels = work / "cold0"
            _ours(warm, given, work, kernels=kernels)
            if python is not None:
                _peer(other, given, work, python)
            _ours(whole, given, work, kernels=kernels, validate=True)
    _print(warm, cold, other, whole)


def _ours(side: Side, given: argparse.Namespace, work: Path, *, kernels: Path, validate: bool = False) -> None:
    out = work / "build"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline", "build", str(given.models / f"{given.name}.onnx")]
    command += ["--precision", "int8", "--target", "cpu", "--samples", str(SAMPLES), "-o", str(out)]
    command += ["--calibration", str(given.models / f"{given.name}_calib.npz")]
    command += ["--validate", str(given.models / f"{given.name}_eval.npz")] if validate else []
    side.costs.append(measured(command, environment={"NUMBA_CACHE_DIR": str(kernels)}))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    side.stages.append({stage["name"]: stage["seconds"] for stage in report["stages"]})


def _peer(side: Side, given: argparse.Namespace, work: Path, python: Path) -> None:
    model, data = given.models / f"{given.name}.onnx", given.models / f"{given.name}_calib.npz"
    side.costs.append(peers.quantize(PEER, python, model, data, SAMPLES, work / "peer" / "model.onnx"))


def _print(warm: Side, cold: Side, other: Side, whole: Side) -> None:
    rows = []
    for side in (warm, cold, other, whole):
        if not side.costs:
            rows.append([side.title, *[NOT_MEASURED] * 4])
            continue
        cpu = [c.cpu_seconds for c in side.costs]
        ratio = spread([a.cpu_seconds / b for a, b in zip(other.costs, cpu, strict=False)])
        memory = spread([c.peak_rss_bytes / 1e6 for c in side.costs], 0)
        rows.append([side.title, spread(cpu, 1), memory, spread([c.wall_seconds for c in side.costs], 1), ratio])
    print_table(["command", "CPU s", "peak RSS of the tree, MB", "wall s", "the peer's CPU s / its own"], rows)
    names = list(whole.stages[0])
    print("Wall seconds by stage; the rest is starting Python, imports and hashing:\n")
    table = []
    for side in (warm, cold, whole):
        medians = [statistics.median(s[n] for s in side.stages) if n in side.stages[0] else None for n in names]
        rest = statistics.median(c.wall_seconds - sum(s.values()) for c, s in zip(side.costs, side.stages, strict=True))
        table.append([side.title, *["" if m is None else f"{m:.2f}" for m in medians], f"{rest:.2f}"])
    print_table(["", *names, "rest"], table)


if __name__ == "__main__":
    main()
