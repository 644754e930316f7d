"""Every model of onnx's own backend tests through `quantize`, with the count of each outcome.

    python benchmarks/robustness.py                 # all, about 2,000 models
    python benchmarks/robustness.py --every 40      # a sample
    python benchmarks/robustness.py --match conv --verbose

Exits 1 if any model ends in anything but a valid variant that runs or a clean error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.backend_models import DEFECTS, KINDS, Case, Outcome, attempt, cases, walk

START_SECONDS = 60.0
"""A worker's first model pays for the imports and for loading compiled kernels."""


def outcomes(chosen: Sequence[Case], *, workers: int = 2, timeout: float = 60.0) -> Iterator[Outcome]:
    """Yield what becomes of every model; a worker that dies or takes too long is replaced by a new one.

    Args:
        chosen: The models.
        workers: Processes, each of which takes one model after the other.
        timeout: Seconds of wall-clock time for one model.
    """
    pool = [_Worker() for _ in range(min(workers, len(chosen)))]
    left = list(reversed(chosen))
    try:
        for worker in pool:
            worker.give(left.pop(), timeout)
        while busy := [w for w in pool if w.case is not None]:
            wait([w.pipe for w in busy], timeout=1.0)
            for worker in busy:
                outcome = worker.outcome()
                if outcome is None:
                    continue
                yield outcome
                if left:
                    worker.give(left.pop(), timeout)
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """A process that takes models; started again where a model took it down."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # no fork: threads of numba or ONNX Runtime may be running
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self._extra = START_SECONDS

    def give(self, case: Case, timeout: float) -> None:
        self.case = case
        self.started = time.monotonic()
        self.deadline = self.started + timeout + self._extra
        self._extra = 0.0
        self.pipe.send(case)

    def outcome(self) -> Outcome | None:
        """Return the outcome of the model that was given; ``None`` while there is none yet."""
        assert self.case is not None
        name, seconds = self.case.name, time.monotonic() - self.started
        try:
            if self.pipe.poll():
                found: Outcome = replace(self.pipe.recv(), seconds=seconds)
            elif time.monotonic() > self.deadline:
                found = Outcome(name=name, status="hang", detail=f"no answer in {seconds:.0f} s", seconds=seconds)
                self._restart()
            else:
                return None
        except (EOFError, ConnectionError):
            self.process.join(5)
            found = Outcome(name=name, status="crash", detail=f"exit code {self.process.exitcode}", seconds=seconds)
            self._restart()
        self.case = None
        return found

    def _restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _work(pipe: Connection) -> None:
    """Take models until the pipe closes."""
    root = Path(tempfile.mkdtemp(prefix="robustness-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    parent = multiprocessing.parent_process()
    try:
        while parent is None or parent.is_alive():
            if not pipe.poll(5):
                continue
            case: Case = pipe.recv()
            folder = root / "case"
            folder.mkdir()
            found = attempt(case, folder)
            shutil.rmtree(folder)
            pipe.send(found)
    except (EOFError, ConnectionError):
        pass
    finally:
        shutil.rmtree(root, ignore_errors=True)


def table(found: Sequence[Outcome]) -> str:
    """Return the count of every outcome, and how well quantized models compute."""
    lines = [f"{count:6d}  {what}" for what, count in walk(found)]
    lines.append(f"{len(found):6d}  models")
    for family in ("cpu", "gpu-int8"):
        measured = [o.sqnr_db[family] for o in found if o.status == "quantized" and family in o.sqnr_db]
        good = sum(s >= 10 for s in measured)
        lines.append(f"{good:6d}  of {len(measured)} quantized {family} variants reach 10 dB on their calibration data")
    return "\n".join(lines)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; all if not given")
    parser.add_argument("--every", type=int, default=1, help="every N-th model only")
    parser.add_argument("--match", default="", help="only models whose name holds this")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one model")
    parser.add_argument("--verbose", action="store_true", help="show every model")
    return parser.parse_args()


def main() -> int:
    """Run and print; return the exit code."""
    arguments = _arguments()
    chosen = [c for c in cases(arguments.kind or KINDS, every=arguments.every) if arguments.match in c.name]
    found: list[Outcome] = []
    for outcome in outcomes(chosen, workers=arguments.workers, timeout=arguments.timeout):
        found.append(outcome)
        if arguments.verbose or outcome.status in DEFECTS:
            print(f"{outcome.status:20s} {outcome.seconds:6.2f} s  {outcome.name}  {outcome.kind} {outcome.detail}")
        if sys.stderr.isatty():
            print(f"\r{len(found)}/{len(chosen)}", end="", file=sys.stderr)
    print(table(found))
    return 1 if any(o.status in DEFECTS for o in found) else 0


if __name__ == "__main__":
    sys.exit(main())
