"""What calibration costs: CPU time beside plain FP32 inference, memory as samples grow, and entropy beside a peer's.

    python -m benchmarks.calibration minilm bert --models build/bench/models --work build/bench/work --ort-python PYTHON

*Speed*: collecting a sketch of every tensor that ``int8-all`` quantizes, against ONNX Runtime running the same FP32
model over the same batches and nothing else. Both sides are whole (a session is made, every batch is run) and take
turns. *Memory*: the peak of a process that only collects. *Entropy*: whole processes, from the FP32 file to the Q/DQ
file with ranges by KL divergence, and the same without what FP32 inference alone over the samples costs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.processes import measured
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress, spread
from calibrators.collector import CollectOptions, Request, collect
from pipeline import model as models
from pipeline.graph.prepare import prepare
from pipeline.graph.roles import find_roles
from pipeline.policy.planning import plan
from pipeline.quantize.insertion.sites import sites
from pipeline.recipe import PolicyConfig, Preset
from pipeline.running.session import run, session
from pipeline.types import Feeds

BATCH = 8
MASK = "attention_mask"
PEER = "ort-static-gemm-entropy"
PARTS = ("speed", "memory", "entropy")


class Batches:
    """The first ``samples`` rows of an ``.npz``, in batches."""

    def __init__(self, path: Path, samples: int) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {name: arrays[name][:samples] for name in arrays.files}
        self.samples, self.path = len(next(iter(self.arrays.values()))), path

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[Feeds]:
        for start in range(0, self.samples, BATCH):
            yield {name: array[start : start + BATCH] for name, array in self.arrays.items()}

    def digest(self) -> str:
        """Return the hash of the file."""
        return models.sha256(self.path)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["minilm"], help="models made by benchmarks.models")
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--samples", type=int, default=64, help="for speed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--memory", type=int, nargs=2, default=(64, 512), help="two numbers of samples; the first model"
    )
    parser.add_argument("--entropy", type=int, default=256, help="samples for entropy; the first model")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--collect", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--infer", type=Path, help=argparse.SUPPRESS)
    peers.add_arguments(parser, "ort")
    given = parser.parse_args()
    if given.collect or given.infer:  # a child that does one thing and is measured from outside
        data = Batches(given.models / f"{given.names[0]}_calib.npz", given.samples)
        gather(given.collect, requests(given.collect), data) if given.collect else infer(given.infer, data)
        return
    print_header(
        "Calibration",
        "benchmarks.calibration",
        [f"batch {BATCH}, medians of {given.repeats} interleaved repeats (least–most)"],
    )
    given.work.mkdir(parents=True, exist_ok=True)
    if "speed" in given.only:
        columns = ["speed", "plain FP32 inference, CPU s", "collect, CPU s", "ratio", "ratio, padding counted too"]
        print_table(columns, [speed(name, given) for name in given.names])
    if "memory" in given.only:
        columns = ["memory", *[f"peak RSS at {n} samples, MB" for n in given.memory], "ratio"]
        print_table(columns, [memory(given)])
    if "entropy" in given.only:
        title = f"entropy, {given.entropy} samples, CPU s"
        print_table([title, "whole process", "without FP32 inference", "peak RSS, MB"], entropy(given))


def canonical(name: str, given: argparse.Namespace) -> Path:
    """Return the canonical graph of a model, made once."""
    out: Path = given.work / f"{name}.fp32.onnx"
    if not out.exists():
        prepare(given.models / f"{name}.onnx", out)
    return out


def requests(path: Path) -> list[Request]:
    """Return a sketch for every activation that ``int8-all`` quantizes, on either kind of target."""
    model = models.load(path)
    policy = PolicyConfig(preset=Preset.INT8_ALL)
    found = [sites(model, plan(model, find_roles(model), policy, family)) for family in ("cpu", "gpu-int8")]
    return [Request(tensor) for tensor in dict.fromkeys(site.tensor for group in found for site in group)]


def infer(path: Path, data: Batches) -> None:
    """Run the FP32 model over the data."""
    live = session(path, threads=1)
    for feeds in data:
        run(live, None, feeds)


def gather(path: Path, wanted: list[Request], data: Batches, *, mask: bool = True) -> None:
    """Collect ``wanted``, without padding where the data says what that is."""
    has_mask = mask and MASK in data.arrays
    collect(path, wanted, data, CollectOptions(threads=1, mask=MASK if has_mask else None))


def speed(name: str, given: argparse.Namespace) -> list[str]:
    """Return a table row: CPU seconds of both sides, alternating, after one run of each that is not counted."""
    path, data = canonical(name, given), Batches(given.models / f"{name}_calib.npz", given.samples)
    wanted = requests(path)
    sides: list[Callable[[], None]] = [lambda: infer(path, data), lambda: gather(path, wanted, data)]
    if MASK in data.arrays:
        sides.append(lambda: gather(path, wanted, data, mask=False))
    times: list[list[float]] = [[] for _ in sides]
    for repeat in range(given.repeats + 1):
        progress(f"{name}: repeat {repeat} of {given.repeats}")
        for seconds, side in zip(times, sides, strict=True):
            started = time.process_time()
            side()
            if repeat:
                seconds.append(time.process_time() - started)
    ratios = [spread([b / a for a, b in zip(times[0], other, strict=True)]) for other in times[1:]]
    title = f"{name}, {len(data)} samples, {len(wanted)} tensors, 1 thread"
    return [title, spread(times[0]), spread(times[1]), ratios[0], ratios[1] if len(ratios) > 1 else "no padding"]


def memory(given: argparse.Namespace) -> list[str]:
    """Return a table row: the peak resident set of processes that only collect."""
    name = given.names[0]
    few, many = (_child("--collect", canonical(name, given), samples, given)[1] for samples in given.memory)
    return [name, f"{few / 1e6:.0f}", f"{many / 1e6:.0f}", f"{many / few:.3f}"]


def entropy(given: argparse.Namespace) -> list[list[str]]:
    """Return table rows: ours, the peer's, and how many times cheaper ours is."""
    name, python = given.names[0], peers.pythons(given).get("ort")
    model, data = given.models / f"{name}.onnx", given.models / f"{name}_calib.npz"
    out = given.work / "entropy"
    plain: list[float] = []
    ours: list[tuple[float, int]] = []
    theirs: list[tuple[float, int]] = []
    command = [sys.executable, "-m", "pipeline", "quantize", str(model), "--precision", "int8", "--target", "cpu"]
    command += ["--calibration", str(data), "--samples", str(given.entropy), "--method", "entropy"]
    command += ["--threads", "1", "-o", str(out)]
    for repeat in range(given.repeats):
        progress(f"entropy: repeat {repeat + 1} of {given.repeats}")
        plain.append(_child("--infer", canonical(name, given), given.entropy, given)[0])
        shutil.rmtree(out, ignore_errors=True)
        cost = measured(command)
        ours.append((cost.cpu_seconds, cost.peak_rss_bytes))
        if python is not None:
            cost = peers.quantize(PEER, python, model, data, given.entropy, given.work / "entropy.peer.onnx")
            theirs.append((cost.cpu_seconds, cost.peak_rss_bytes))
    title = peers.PEERS[PEER].title
    rows = [["FP32 inference alone", spread(plain, 1), "", ""], _row("ours", ours, plain)]
    if not theirs:
        return [*rows, [title, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED]]
    whole = [b / a for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    extra = [(b - p) / (a - p) for (a, _), (b, _), p in zip(ours, theirs, plain, strict=True)]
    return [
        *rows,
        _row(title, theirs, plain),
        ["ours is cheaper by", f"{spread(whole, 1)}x", f"{spread(extra, 1)}x", ""],
    ]


def _row(title: str, costs: list[tuple[float, int]], plain: list[float]) -> list[str]:
    extra = [cpu - p for (cpu, _), p in zip(costs, plain, strict=True)]
    return [title, spread([cpu for cpu, _ in costs], 1), spread(extra, 1), spread([rss / 1e6 for _, rss in costs], 0)]


def _child(what: str, path: Path, samples: int, given: argparse.Namespace) -> tuple[float, int]:
    """Return the CPU seconds and the peak resident set, in bytes, of a process that does one thing."""
    command = [sys.executable, "-m", "benchmarks.calibration", given.names[0], "--models", str(given.models)]
    cost = measured([*command, "--samples", str(samples), what, str(path)])
    return cost.cpu_seconds, cost.peak_rss_bytes


if __name__ == "__main__":
    main()
