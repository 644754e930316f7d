"""What a model larger than memory costs: time, memory and bytes a second beside a plain copy of its file.

    python -m benchmarks.large --parameters 6.7e9 --precision int4 w8a16 int8

A Llama-shaped model with random weights is written, ``python -m pipeline quantize`` (for ``--target cpu`` ``build``) is run
on it in a fresh folder for every precision, and everything is deleted. ``int4`` (blocks of 128) and ``w8a16`` round weights
alone to nearest and need no data; ``int8`` is calibrated on 8 samples of 32 tokens (min/max, no smoothing);
``int8-dynamic``, on ``cpu`` only, needs no data. The model is in FP16, for ``--target cpu``, where FP16 is not quantized, in FP32. GB/s is the model's bytes over
wall seconds. Memory is that of the whole process tree, sampled every 20 ms: RSS counts the pages of files that are
mapped, RssAnon is what the process has itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.llama import TOKENS, VOCABULARY, Shape, shape_of, write
from benchmarks.processes import Cost, measured
from benchmarks.tables import print_header, print_table, progress

SAMPLES = 8
OPTIONS = {
    "int4": ["--precision", "int4"],
    "int8": ["--precision", "int8", "--method", "minmax", "--policy.smooth", "off", "--calibration.batch_size", "4",
             "--calibration", "data.npz"],
    "w8a16": ["--precision", "w8a16"],
    "int8-dynamic": ["--precision", "int8", "--policy.activations", "dynamic"],
}  # fmt: skip
COLUMNS = ["", "wall s", "CPU s", "GB/s", "peak RSS GB", "peak RssAnon GB", "written GB", "stages: s (GB/s)"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--precision", nargs="+", choices=OPTIONS, default=["int4", "int8"])
    parser.add_argument("--target", default="a100")
    parser.add_argument("--memory-mb", type=int, default=1024, help="passed on to the command")
    parser.add_argument("--folder", type=Path, help="where the model and the builds go (four times the model's size)")
    given = parser.parse_args()
    shape = shape_of(given.parameters)
    dtype = ir.DataType.FLOAT if given.target == "cpu" else ir.DataType.FLOAT16
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        work = Path(folder)
        progress(f"writing {shape.parameters / 1e9:.2f} billion parameters")
        size = prepare(work, shape, dtype)
        print_header(
            "A model larger than memory",
            "benchmarks.large",
            [
                f"model: {shape.parameters / 1e9:.2f} billion parameters, width {shape.width}, {shape.layers} layers, "
                f"{size / 1e9:.2f} GB, {dtype.name}; target {given.target}, memory_mb {given.memory_mb}",
            ],
        )
        rows = [_row("`cp` of the model and `sync`", copied(work), {}, size, size)]
        for name in given.precision:
            rows.append(_row(name, *run(work, name, given), size))
            progress(" | ".join(rows[-1]))
        print_table(COLUMNS, rows)


def prepare(work: Path, shape: Shape, dtype: ir.DataType) -> int:
    """Write the model and some samples into ``work``; return the model's bytes."""
    write(work / "model.onnx", shape, dtype)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (SAMPLES, TOKENS))
    np.savez(work / "data.npz", input_ids=ids)
    return sum(file.stat().st_size for file in work.glob("model.onnx*"))


def run(work: Path, name: str, given: argparse.Namespace) -> tuple[Cost, dict[str, float], int]:
    """Return what the command cost, the seconds of its stages, and the variant's bytes."""
    progress(name)
    out, command = work / "build", "build" if given.target == "cpu" else "quantize"
    options = [str(work / o) if o == "data.npz" else o for o in OPTIONS[name]]
    options += ["--target", given.target, "--memory-mb", str(given.memory_mb), "-o", str(out)]
    cost = measured([sys.executable, "-m", "pipeline", command, str(work / "model.onnx"), *options])
    seconds: dict[str, float] = defaultdict(float)
    for record in sorted((out / ".stages").glob("*.json"), key=lambda file: file.stat().st_mtime_ns):
        stage = json.loads(record.read_text(encoding="utf-8")).get("seconds")
        if isinstance(stage, float):
            seconds[record.name.partition(".")[0]] += stage
    variant = sum(file.stat().st_size for file in out.glob("variants/*/model.onnx*"))
    shutil.rmtree(out)
    return cost, seconds, variant


def copied(work: Path) -> Cost:
    """Copy the model's weights with ``cp`` until they are on the disk."""
    copy = work / "copy"
    cost = measured(["sh", "-c", f"cp '{work}/model.onnx.data' '{copy}' && sync '{copy}'"])
    copy.unlink()
    return cost


def _row(title: str, cost: Cost, seconds: Mapping[str, float], variant: int, size: int) -> list[str]:
    return [
        title,
        f"{cost.wall_seconds:.0f}",
        f"{cost.cpu_seconds:.0f}",
        _rate(size, cost.wall_seconds),
        f"{cost.peak_rss_bytes / 1e9:.2f}",
        f"{cost.peak_anonymous_bytes / 1e9:.2f}",
        f"{variant / 1e9:.2f}",
        ", ".join(f"{name} {value:.0f} ({_rate(size, value)})" for name, value in seconds.items() if value >= 1),
    ]


def _rate(size: int, seconds: float) -> str:
    return f"{size / seconds / 1e9:.3f}"


if __name__ == "__main__":
    main()
