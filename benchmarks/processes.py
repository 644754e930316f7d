"""Runs a command and measures what it and all its children cost."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

SAMPLING_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a process tree cost.

    Attributes:
        cpu_seconds: User and system time of the process and every child that it waited for.
        wall_seconds: From start to end.
        peak_rss_bytes: The largest sum of resident sets over the tree, sampled every 20 ms. (The kernel's own peak of a
            child is no use: it includes what the parent held when it forked.)
        peak_anonymous_bytes: The same without the pages of mapped files and shared memory (RssAnon).
        text: What it printed.
    """

    cpu_seconds: float
    wall_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    text: str


def measured(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Cost:
    """Run ``command`` and return its cost.

    Args:
        command: Program and arguments.
        environment: Variables to set beside this process's own.

    Raises:
        RuntimeError: It failed; the message ends with what it printed last.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        peak = [0, 0]
        watcher = threading.Thread(target=_watch, args=(child.pid, peak))
        watcher.start()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        watcher.join()
        output.seek(0)
        text = output.read().decode(errors="replace")
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {text.strip()[-500:]}")
    return Cost(
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        wall_seconds=wall,
        peak_rss_bytes=peak[0],
        peak_anonymous_bytes=peak[1],
        text=text,
    )


def _watch(pid: int, peak: list[int]) -> None:
    """Keep the largest resident set of the tree in ``peak``, all of it and its anonymous part, until its root ends."""
    try:
        root = psutil.Process(pid)
        while root.status() != psutil.STATUS_ZOMBIE:
            seen = [_resident(process) for process in (root, *root.children(recursive=True))]
            peak[:] = [max(before, sum(now)) for before, now in zip(peak, zip(*seen, strict=True), strict=True)]
            time.sleep(SAMPLING_SECONDS)
    except psutil.Error:  # the root was waited for
        return


def _resident(process: psutil.Process) -> tuple[int, int]:
    """Return the resident bytes, and those of them that are no file's or shared (Linux; elsewhere all of them)."""
    try:
        seen = process.memory_info()
    except psutil.Error:  # it ended since it was listed
        return 0, 0
    return int(seen.rss), int(seen.rss - getattr(seen, "shared", 0))
