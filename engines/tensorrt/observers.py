"""What TensorRT calls back while it builds: our logger and our progress monitor."""

from __future__ import annotations

import threading

from engines.tensorrt.binding import trt
from pipeline.types import Progress

STEPS = 1000
"""A build's progress is told in thousandths: TensorRT's phases nest, and their number is not known in advance."""


class MessageLog(trt.ILogger):
    """Keeps every message with its severity: compiled layers are read from the verbose ones, reasons from the errors."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[tuple[int, str]] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        """Keep a message; TensorRT's own call, which must not raise."""
        self.messages.append((int(severity), message))


class BuildProgress(trt.IProgressMonitor):
    """Turns TensorRT's nested phases into one figure that never falls.

    Args:
        stage: Name to report under.
        progress: Told the thousandths that are done.
    """

    def __init__(self, stage: str, progress: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._stage = stage
        self._progress = progress
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._told = 0
        # TensorRT calls from several threads.
        self._lock = threading.Lock()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Note a phase and the one that it is a step of."""
        with self._lock:
            self._phases[phase_name] = (parent_phase, max(num_steps, 1), 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Report progress; ``True`` lets the build go on."""
        with self._lock:
            parent, steps, _ = self._phases.get(phase_name, (None, 1, 0))
            self._phases[phase_name] = (parent, steps, min(step + 1, steps))
            done = int(STEPS * self._fraction(phase_name))
            tell = done > self._told
            self._told = max(done, self._told)
        if tell:
            self._progress(self._stage, done, STEPS)
        return True

    def phase_finish(self, phase_name: str) -> None:
        """Forget a phase; the outermost one ends the build."""
        with self._lock:
            parent, _, _ = self._phases.pop(phase_name, (None, 1, 0))
            tell = parent is None and not self._phases and self._told < STEPS
            self._told = STEPS if tell else self._told
        if tell:
            self._progress(self._stage, STEPS, STEPS)

    def _fraction(self, phase_name: str) -> float:
        """Return how much of the whole build is done, seen from one running phase."""
        inner, name = 0.0, phase_name
        for _ in range(len(self._phases) + 1):
            parent, steps, done = self._phases.get(name, (None, 1, 0))
            inner = min((done + inner) / steps, 1.0)
            if parent is None or parent not in self._phases:
                return inner
            name = parent
        return inner
