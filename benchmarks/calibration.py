"""What calibration costs: CPU time against plain FP32 inference over the same batches, and peak memory.

    python benchmarks/calibration.py minilm.onnx minilm_calib.npz --mask attention_mask

Both sides are whole: a session is made, every batch is run. They take turns, and the table has medians and spreads.
Observed is what an all-linear quantization needs: the inputs of every MatMul, Gemm and Conv and of residual Adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from calibrators.collector import CollectOptions, Request, collect
from pipeline.model import read_proto, sha256
from pipeline.session import run, session
from pipeline.types import Feeds

MATMULS = {"MatMul", "Gemm", "Conv", "ConvTranspose"}


class Batches:
    """The first ``samples`` rows of an ``.npz``, in batches."""

    def __init__(self, path: Path, samples: int, batch: int) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {name: arrays[name][:samples] for name in arrays.files}
        self.samples, self.batch, self.path = len(next(iter(self.arrays.values()))), batch, path

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[Feeds]:
        for start in range(0, self.samples, self.batch):
            yield {name: array[start : start + self.batch] for name, array in self.arrays.items()}

    def digest(self) -> str:
        """Return the hash of the file."""
        return sha256(self.path)


def observed(path: Path) -> list[Request]:
    """Return the activations that an all-linear, attention and residual quantization needs."""
    graph = read_proto(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}

    def is_constant(name: str) -> bool:
        while name in made_by and made_by[name].op_type == "Identity":
            name = made_by[name].input[0]
        return name in constants or (name in made_by and made_by[name].op_type == "Constant")

    found: dict[str, None] = {}
    for node in graph.node:
        inputs = [name for name in node.input[:2] if name and not is_constant(name)]
        if node.op_type in MATMULS or (node.op_type == "Add" and len(inputs) == 2 and _is_residual(node, graph)):
            found.update(dict.fromkeys(inputs))
    return [Request(name) for name in found]


def _is_residual(add: object, graph: object) -> bool:
    """Return whether the sum goes into a normalization or an activation that ends a block."""
    readers = [node for node in graph.node if add.output[0] in node.input]  # type: ignore[attr-defined]
    return any(node.op_type in {"LayerNormalization", "Relu"} for node in readers)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this process that ``work`` takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure_speed(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return CPU seconds of both sides, alternating, after one run of each that is not counted."""
    data, requests = Batches(args.data, args.samples, args.batch), observed(args.model)
    options = CollectOptions(threads=args.threads, mask=args.mask)

    def plain() -> None:
        live = session(args.model, threads=args.threads)
        for feeds in data:
            run(live, None, feeds)

    sides = {"plain FP32 inference": plain, "collect": lambda: collect(args.model, requests, data, options)}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):
        for name, work in sides.items():
            seconds = cpu_seconds(work)
            if repeat:
                found[name].append(seconds)
        print(f"repeat {repeat} of {args.repeats}", file=sys.stderr)
    return found


def measure_memory(args: argparse.Namespace, samples: int) -> int:
    """Return the peak resident set, in bytes, of a process that only collects."""
    command = [sys.executable, __file__, str(args.model), str(args.data), "--memory-of", str(samples)]
    command += ["--batch", str(args.batch), "--threads", str(args.threads)]
    command += ["--mask", args.mask] if args.mask else []
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(result.stdout)["peak_rss_bytes"])


def spread(values: list[float]) -> str:
    """Return the median and the extremes."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help=".npz with an array for every input")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mask", help="input that is 0 at padding; padding is then left out")
    parser.add_argument("--memory", type=int, nargs=2, default=(64, 512), help="two numbers of samples")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        options = CollectOptions(threads=args.threads, mask=args.mask)
        found = collect(args.model, observed(args.model), Batches(args.data, args.memory_of, args.batch), options)
        print(json.dumps({"peak_rss_bytes": found.peak_rss_bytes}))
        return
    times = measure_speed(args)
    ratios = [ours / plain for plain, ours in zip(*times.values(), strict=True)]
    few, many = (measure_memory(args, samples) for samples in args.memory)
    print(f"{args.model.name}, {args.samples} samples, batch {args.batch}, {args.threads or 'all'} thread(s), ", end="")
    print(f"padding {'left out' if args.mask else 'counted'}, median of {args.repeats} (least–most)\n")
    print("| measurement | value |\n|---|---|")
    for name, seconds in times.items():
        print(f"| {name}, CPU s | {spread(seconds)} |")
    print(f"| collect / plain | {spread(ratios)} |")
    print(f"| peak RSS at {args.memory[0]} samples, MB | {few / 1e6:.0f} |")
    print(f"| peak RSS at {args.memory[1]} samples, MB | {many / 1e6:.0f} ({many / few:.3f} x) |")


if __name__ == "__main__":
    main()
