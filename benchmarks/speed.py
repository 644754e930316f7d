"""The ``cpu`` engine's speed beside other tools' models and FP32, with the size and accuracy of the very same files.

    python -m benchmarks.speed minilm resnet50 --models build/bench/models --work build/bench/work \
        --ort-python PYTHON --nncf-python PYTHON

All models of a batch size and thread count are open in one process and take turns, in an order that rotates, so that
whatever else the machine does hits all alike. CPU time is the process's own; with one thread it is the time that the
model needs, with two it includes the waiting of the second thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.builds import size_bytes, variant
from benchmarks.fidelity import Feeds, Fidelity, compare, int8_share, load, open_session, outputs
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress, spread

SAMPLES = 64
PEERS = ("ort-dynamic", "nncf-performance", "nncf-mixed", "ort-static-tuned-asymmetric")


@dataclass(slots=True, kw_only=True)
class Row:
    """One file.

    Attributes:
        title: As the table names it.
        path: The file, or why there is none.
        times: (batch, threads) to pairs of CPU and wall milliseconds, one a repeat.
    """

    title: str
    path: Path | str
    times: dict[tuple[int, int], list[tuple[float, float]]] = field(default_factory=dict)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["minilm"], help="models made by benchmarks.models")
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--milliseconds", type=float, default=100, help="least time of one repeat of one model")
    peers.add_arguments(parser, "ort", "nncf")
    given = parser.parse_args()
    print_header(
        "Speed on CPU",
        "benchmarks.speed",
        [
            f"medians of {given.repeats} interleaved repeats (least–most) of at least {given.milliseconds:.0f} ms",
            f"speed-up = FP32's time / the model's, repeat by repeat; calibrated on {SAMPLES} samples",
        ],
    )
    for name in given.names:
        print(f"### {name}\n")
        rows = _rows(name, given)
        data = load(given.models / f"{name}_eval.npz")
        for threads in given.threads:
            for batch in given.batches:
                progress(f"{name}: batch {batch}, {threads} thread(s)")
                take_turns(rows, data, batch, threads, given)
        _accuracy(rows, data)
        for clock, index in (("CPU time", 0), ("wall time", 1)):
            _speed(rows, clock, index, given)


def _rows(name: str, given: argparse.Namespace) -> list[Row]:
    model, data = given.models / f"{name}.onnx", given.models / f"{name}_calib.npz"
    rows = [Row(title="FP32", path=model), Row(title="ours, static", path=variant(model, data, given.work))]
    if name != "resnet50":  # ONNX Runtime's dynamic convolutions are no competition: nobody serves them
        path = variant(model, data, given.work, policy_activations="dynamic")
        rows.append(Row(title="ours, dynamic", path=path))
    known = peers.pythons(given)
    for peer in PEERS:
        python = known.get(peers.PEERS[peer].tool)
        made = NOT_MEASURED if python is None else peers.quantized(peer, python, model, data, SAMPLES, given.work)
        rows.append(Row(title=peers.PEERS[peer].title, path=made))
    return rows


def take_turns(rows: list[Row], data: Feeds, batch: int, threads: int, given: argparse.Namespace) -> None:
    """Time every row on one batch, in turns."""
    feeds = {name: values[np.arange(batch) % len(values)] for name, values in data.items()}
    live = [(row, open_session(row.path, threads)) for row in rows if isinstance(row.path, Path)]
    count: dict[str, int] = {}
    for row, session in live:
        session.run(None, feeds)
        start = time.perf_counter()
        session.run(None, feeds)
        count[row.title] = max(1, round(given.milliseconds / 1e3 / (time.perf_counter() - start)))
        row.times[batch, threads] = []
    for repeat in range(given.repeats):
        turn = repeat % len(live)
        for row, session in live[turn:] + live[:turn]:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(count[row.title]):
                session.run(None, feeds)
            spent = ((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)
            row.times[batch, threads].append((spent[0] / count[row.title], spent[1] / count[row.title]))


def _accuracy(rows: list[Row], data: Feeds) -> None:
    assert isinstance(rows[0].path, Path)
    reference = outputs(rows[0].path, data)
    table = []
    for row in rows:
        if isinstance(row.path, str):
            table.append([row.title, row.path, "", "", ""])
            continue
        found = Fidelity(sqnr_db=float("inf"), cosine=1.0)
        if row is not rows[0]:
            found = compare(reference, outputs(row.path, data))
        share = int8_share(row.path, data)
        megabytes = f"{size_bytes(row.path) / 1e6:.1f}"
        table.append([row.title, megabytes, f"{found.sqnr_db:.2f}", f"{found.cosine:.4f}", f"{share:.1%}"])
    print_table(["model", "size, MB", "held-out SQNR, dB", "cosine", "GEMM FLOPs in INT8"], table)


def _speed(rows: list[Row], clock: str, index: int, given: argparse.Namespace) -> None:
    cases = [(batch, threads) for threads in given.threads for batch in given.batches]
    fp32 = rows[0]
    table = []
    for row in rows:
        cells: list[str] = []
        for case in cases:
            if case not in row.times:
                cells.append(NOT_MEASURED if isinstance(row.path, str) else "")
                continue
            ratios = [a[index] / b[index] for a, b in zip(fp32.times[case], row.times[case], strict=True)]
            milliseconds = statistics.median(t[index] for t in row.times[case])
            cells.append(f"{milliseconds:.1f} ms, {spread(ratios)}x")
        table.append([row.title, *cells])
    names = [f"batch {b}, {t} thread{'s' * (t > 1)}" for b, t in cases]
    print_table([f"{clock}, speed-up", *names], table)


if __name__ == "__main__":
    main()
