"""What every executor does, and the one that does it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from calibrators.collector import CollectOptions, Request, Statistics, collect
from engines.target import Target
from engines.tensorrt.flavour import Flavour, ready
from pipeline.types import CalibrationData, Progress

Waiting = Callable[[Path, Progress], Any]
"""Takes a scratch folder and where to report progress; returns a task's result, or raises what the task raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Work on one target that may be done elsewhere.

    Attributes:
        name: The stage it belongs to, such as ``engines/a100``.
        function: Importable by name; called as ``function(*graphs, *arguments, scratch=..., progress=...)`` with a folder
            for temporary files. Arguments and result are pickled where the work is done elsewhere.
        graphs: ONNX files that the function reads; their external data goes with them.
        arguments: What else it takes; no paths, because another machine has other files.
        device: The target.
        flavour: The TensorRT that the function needs.
    """

    name: str
    function: Callable[..., Any]
    graphs: tuple[Path, ...]
    arguments: tuple[object, ...]
    device: Target
    flavour: Flavour


class Executor(Protocol):
    """Does the work of a build."""

    def collect(
        self,
        model: Path,
        requests: Sequence[Request],
        data: CalibrationData,
        options: CollectOptions,
        progress: Progress,
    ) -> Statistics:
        """Return what :func:`calibrators.collector.collect` returns, to the last bit."""
        ...

    def installed(self, flavour: Flavour, device: Target) -> str | None:
        """Return the version of the TensorRT that would work on a target; ``None`` where there is none."""
        ...

    def submit(self, task: Task) -> Waiting:
        """Accept a task and return what waits for its result.

        Raises:
            MissingError: There is nowhere to do it.
        """
        ...

    def close(self) -> None:
        """Stop what is still going on and let go of everything held elsewhere."""
        ...


class LocalExecutor:
    """Does everything in this process; a task runs when its result is waited for."""

    def collect(
        self,
        model: Path,
        requests: Sequence[Request],
        data: CalibrationData,
        options: CollectOptions,
        progress: Progress,
    ) -> Statistics:
        """Collect here."""
        return collect(model, requests, data, options, progress)

    def installed(self, flavour: Flavour, device: Target) -> str | None:
        """Return the version installed here."""
        return ready(flavour)

    def submit(self, task: Task) -> Waiting:
        """Return what runs the task."""
        return lambda scratch, progress: task.function(
            *task.graphs, *task.arguments, scratch=scratch, progress=progress
        )

    def close(self) -> None:
        """Nothing is held."""
