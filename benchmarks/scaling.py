"""What a second node of a Ray cluster brings: calibration and per-target builds on one machine, one node and two.

    pip install '.[ray,rtx,examples]' && python -m benchmarks.models --only minilm
    python -m benchmarks.scaling minilm

The nodes are real Ray nodes of one CPU each on this machine, with a head that takes no work, so nothing crosses a network,
and the driver shares the cores with the nodes. *Calibration* is the stage ``calibrate``, *targets* the stage ``engines``
of ``rtx4090`` and ``rtx5090``: a compile check with FP16 beside it and an engine for each, one node claiming each accelerator.
Every run starts in a copy of one directory that was built up to the stage before; what it wrote is compared with the first run's.

Seconds by the clock depend on what else the machine does. So CPU seconds stand beside them: those of the driver, and those of the
busiest node (its worker processes and their children, sampled). Their sum is what the run takes where every node has a core of
its own and nothing overlaps, and the speed-up is one machine's CPU seconds over it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.tables import print_header, print_table, progress
from pipeline.build import BuildOptions, build
from pipeline.executors.on_ray import RayExecutor
from pipeline.recipe import Recipe, parse

STORE_BYTES = 512 << 20
TARGETS = {"rtx4090": "GeForce-RTX-4090", "rtx5090": "GeForce-RTX-5090"}
BEFORE = {"calibrate": "prepare", "engines": "quantize"}
SAME = {"calibrate": "calibration/*.safetensors", "engines": "checks/*/*.json"}
"""What must be the same in every run. Engines are not: two builds of one engine for SM120 differ on one machine too."""


SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Run:
    """One run: wall-clock seconds, those of joining the cluster among them, CPU seconds, and the hash of what it wrote."""

    seconds: float
    joining: float
    driver_cpu: float
    busiest_cpu: float
    written: str


class NodesCpu:
    """Adds up the CPU seconds of each node's worker processes, as far as samples see them.

    Args:
        raylets: Process id of every working node's raylet.
    """

    def __init__(self, raylets: list[int]) -> None:
        self._seconds: dict[int, dict[int, float]] = {raylet: {} for raylet in raylets}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> NodesCpu:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def busiest(self) -> float:
        """Return the CPU seconds of the node that used most; 0 without nodes."""
        return max((sum(found.values()) for found in self._seconds.values()), default=0.0)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            for raylet, found in self._seconds.items():
                for worker in _workers(raylet):
                    with contextlib.suppress(psutil.Error):  # it ended meanwhile
                        used = worker.cpu_times()
                        found[worker.pid] = used.user + used.system


def _workers(raylet: int) -> Iterator[psutil.Process]:
    """Yield a node's worker processes and what they started; not Ray's own agents."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(raylet).children():
            if "".join(child.cmdline()[:1]).startswith("ray::"):
                yield child
                yield from child.children(recursive=True)


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
            with _cluster(0 if name == "local" else int(name[0])) as raylets:
                runs.append(_once(given, stage, prepared, raylets))
    (written,) = {run.written for runs in found.values() for run in runs}  # else the bytes differ: nothing to publish
    alone = statistics.median(run.driver_cpu for run in found["local"])
    rows = []
    for name, runs in found.items():
        columns = zip(*((r.seconds, r.joining, r.driver_cpu, r.busiest_cpu) for r in runs), strict=True)
        seconds, joining, driver, busiest = (statistics.median(column) for column in columns)
        low, high = (choose(r.seconds for r in runs) for choose in (min, max))
        rows.append(
            [
                name,
                f"{seconds:.1f} ({low:.1f}–{high:.1f})",
                f"{joining:.1f}",
                f"{driver:.1f}",
                f"{busiest:.1f}",
                f"{alone / (driver + busiest):.2f}x",
            ]
        )
    print(f"### Stage `{stage}`\n")
    print_table(["where", "seconds", "joining", "driver CPU s", "busiest node CPU s", "speed-up by CPU"], rows)
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


def _once(given: argparse.Namespace, stage: str, prepared: Path, raylets: list[int]) -> Run:
    directory = given.work / "run"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(prepared, directory)
    joining, executor = 0.0, "ray" if raylets else "local"
    if raylets:
        started = time.perf_counter()
        RayExecutor().close()
        joining = time.perf_counter() - started
    with NodesCpu(raylets) as nodes:
        started, cpu = time.perf_counter(), sum(os.times()[:4])
        build(_recipe(given, executor), directory, options=BuildOptions(until=stage))
        seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu
    total = hashlib.sha256()
    for file in sorted(directory.glob(SAME[stage])):
        total.update(file.read_bytes())
    return Run(seconds, joining, cpu, nodes.busiest(), total.hexdigest())


@contextlib.contextmanager
def _cluster(count: int) -> Iterator[list[int]]:
    """Run a cluster of so many working nodes, among which the accelerators are shared out; yield their raylets' process ids."""
    if count == 0:
        yield []
        return
    from ray.cluster_utils import Cluster

    # Ray runs workers at niceness 15, which on a shared machine is another measurement than one node's own.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    raylets = []
    try:
        for index in range(count):
            claimed = [name for i, name in enumerate(TARGETS.values()) if i % count == index]
            resources = {f"accelerator_type:{name}": 1 for name in claimed}
            node = cluster.add_node(num_cpus=1, resources=resources, object_store_memory=STORE_BYTES)
            raylets.append(node.all_processes["raylet"][0].process.pid)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield raylets
    finally:
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


if __name__ == "__main__":
    main()
