"""What a second node of a Ray cluster brings: calibration and per-target builds on one machine, one node and two.

    pip install '.[ray,rtx,examples]' && python -m benchmarks.models --only minilm
    python -m benchmarks.scaling minilm

The nodes are real Ray nodes of one CPU each on this machine, with a head that takes no work, so nothing crosses a network,
and on two cores the driver shares them with the nodes. *Calibration* is the stage ``calibrate``, *targets* the stage ``engines``
of ``rtx4090`` and ``rtx5090``: a compile check with FP16 beside it and an engine for each, one node claiming each accelerator.
Every run starts in a copy of one directory that was built up to the stage before; what it wrote is compared with the first run's.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import print_header, print_table, progress
from pipeline.build import BuildOptions, build
from pipeline.executors.on_ray import RayExecutor
from pipeline.recipe import Recipe, parse

STORE_BYTES = 512 << 20
TARGETS = {"rtx4090": "GeForce-RTX-4090", "rtx5090": "GeForce-RTX-5090"}
BEFORE = {"calibrate": "prepare", "engines": "quantize"}
SAME = {"calibrate": "calibration/*.safetensors", "engines": "checks/*/*.json"}
"""What must be the same in every run. Engines are not: two builds of one engine for SM120 differ on one machine too."""


@dataclass(frozen=True)
class Run:
    """One run: wall-clock seconds, those of joining the cluster among them, and the hash of what it wrote."""

    seconds: float
    joining: float
    written: str


def main() -> None:
    """Measure what the command line asks for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="minilm")
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/scaling"))
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=BEFORE, nargs="+", default=list(BEFORE))
    given = parser.parse_args()
    load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
    notes = [
        f"load of the machine before the run (1, 5, 15 minutes): {load}",
        f"median of {given.repeats}; one thread a node",
    ]
    print_header(f"More than one node: {given.model}", "benchmarks.scaling", notes)
    for stage in given.only:
        _measure(given, stage)


def _measure(given: argparse.Namespace, stage: str) -> None:
    prepared = given.work / f"before-{stage}"
    shutil.rmtree(given.work, ignore_errors=True)
    build(_recipe(given, "local"), prepared, options=BuildOptions(until=BEFORE[stage]))
    found: dict[str, list[Run]] = {"local": [], "1 node": [], "2 nodes": []}
    for repeat in range(given.repeats):  # in turns, so that what else the machine does meets all alike
        for name, runs in found.items():
            progress(f"{stage} {repeat + 1}/{given.repeats}: {name}")
            with _cluster(int(name[0])) if name != "local" else contextlib.nullcontext():
                runs.append(_once(given, stage, prepared, "local" if name == "local" else "ray"))
    (written,) = {run.written for runs in found.values() for run in runs}  # else the bytes differ: nothing to publish
    alone = statistics.median(run.seconds for run in found["local"])
    one = statistics.median(run.seconds - run.joining for run in found["1 node"])
    rows = []
    for name, runs in found.items():
        seconds, joining = (
            statistics.median(values) for values in zip(*((r.seconds, r.joining) for r in runs), strict=True)
        )
        low, high = (choose(r.seconds for r in runs) for choose in (min, max))
        work = seconds - joining
        rows.append(
            [
                name,
                f"{seconds:.1f} ({low:.1f}–{high:.1f})",
                f"{joining:.1f}",
                f"{work:.1f}",
                f"{alone / work:.2f}x",
                f"{one / work:.2f}x",
            ]
        )
    print(f"### Stage `{stage}`\n")
    print_table(["where", "seconds", "joining the cluster", "the rest", "local / the rest", "1 node / the rest"], rows)
    print(f"\nThe same bytes in every run: `{SAME[stage]}`, SHA-256 {written[:12]}.\n", flush=True)


def _recipe(given: argparse.Namespace, executor: str) -> Recipe:
    return parse(
        {
            "source": {"onnx": str(given.models / f"{given.model}.onnx")},
            "calibration": {"data": str(given.models / f"{given.model}_calib.npz"), "samples": given.samples},
            "policy": {"preset": "int8", "smooth": "off"},
            "targets": list(TARGETS),
            "threads": 1,
            "executor": executor,
        }
    )


def _once(given: argparse.Namespace, stage: str, prepared: Path, executor: str) -> Run:
    directory = given.work / "run"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(prepared, directory)
    joining = 0.0
    if executor == "ray":
        started = time.perf_counter()
        RayExecutor().close()
        joining = time.perf_counter() - started
    started = time.perf_counter()
    build(_recipe(given, executor), directory, options=BuildOptions(until=stage))
    seconds = time.perf_counter() - started
    total = hashlib.sha256()
    for file in sorted(directory.glob(SAME[stage])):
        total.update(file.read_bytes())
    return Run(seconds, joining, total.hexdigest())


@contextlib.contextmanager
def _cluster(nodes: int) -> Iterator[None]:
    """Run a cluster of so many nodes; the accelerators are shared out among them."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for index in range(nodes):
            claimed = [name for i, name in enumerate(TARGETS.values()) if i % nodes == index]
            resources = {f"accelerator_type:{name}": 1 for name in claimed}
            cluster.add_node(num_cpus=1, resources=resources, object_store_memory=STORE_BYTES)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield
    finally:
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


if __name__ == "__main__":
    main()
