"""What runs on a node of the cluster. Inputs come from Ray's object store, the result goes back the same way."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.collector import CollectOptions, Request, Statistics, collect
from pipeline.errors import PipelineError
from pipeline.executors.library import library
from pipeline.executors.machine import Machine, differing, this_machine
from pipeline.executors.nodes import unlike
from pipeline.executors.sending import Sent, received
from pipeline.notices import Notice, collecting
from pipeline.running.memory import weights_within
from pipeline.types import Feeds, Progress

_REPORT_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A task as it travels.

    Attributes:
        key: Names it in reports of progress.
        function: As :class:`pipeline.executors.executor.Task` has it.
        graphs: The files it reads.
        arguments: What else it takes.
        software: The driver's: a node that joined after the driver looked is asked here.
        weight_memory: What the recipe lets a model's weights take, bytes; ``None`` leaves it to the node.
    """

    key: str
    function: Callable[..., Any]
    graphs: tuple[Sent, ...]
    arguments: tuple[Any, ...]
    software: dict[str, str]
    weight_memory: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What came of it: a value, or the error that the user can act on; the notices given; the node's identifier."""

    value: Any
    error: PipelineError | None
    notices: tuple[Notice, ...]
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a task is: the node of each attempt so far, and steps done of all in the last one."""

    nodes: tuple[str, ...]
    done: int
    total: int


class Watch:
    """An actor beside the driver that workers report to and the driver reads."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    def begin(self, key: str, node: str) -> None:
        """Note that an attempt at a task begins on a node."""
        before = self._states.get(key)
        self._states[key] = State(nodes=(*(before.nodes if before else ()), node), done=0, total=1)

    def report(self, key: str, done: int, total: int) -> None:
        """Note how far a task is."""
        self._states[key] = replace(self._states[key], done=done, total=total)

    def read(self) -> dict[str, State]:
        """Return every task's state."""
        return self._states


def machine() -> Machine:
    """Return the facts of this node."""
    return this_machine()


def run(work: Work, watch: Any) -> Done:
    """Do one task on this node."""
    node = library().get_runtime_context().get_node_id()
    # In order with the reports that follow: one caller's calls to an actor are.
    watch.begin.remote(work.key, node)
    value: Any = None
    failed: PipelineError | None = None
    scratch_folder = tempfile.TemporaryDirectory(prefix="enginewright-")
    with scratch_folder as folder, collecting() as notices, weights_within(work.weight_memory):
        try:
            if other := differing(work.software, this_machine().software):
                raise unlike(platform.node(), other)
            graphs = [received(sent, Path(folder, str(i))) for i, sent in enumerate(work.graphs)]
            scratch = Path(folder, "scratch")
            scratch.mkdir()
            value = work.function(*graphs, *work.arguments, scratch=scratch, progress=_reporting(work.key, watch))
        except PipelineError as error:
            failed = _as_the_driver_knows_it(error, work.graphs, folder)
    return Done(value=value, error=failed, notices=tuple(notices), node=node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Calibration data in the object store: the next batch travels while one is computed.

    Attributes:
        references: To feeds, in order.
        samples: How many samples they hold.
    """

    references: tuple[Any, ...]
    samples: int

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[Feeds]:
        ray = library()
        for index, reference in enumerate(self.references):
            ray.wait(list(self.references[index + 1 : index + 2]) or [reference], timeout=0, fetch_local=True)
            # Arrays in the object store are read-only; compiled loops want ordinary ones.
            yield {name: np.array(value) for name, value in ray.get(reference).items()}

    def digest(self) -> str:
        """Never needed: the driver, which has the data, keys the stage."""
        raise NotImplementedError


def collect_shard(
    model: Path,
    requests: Sequence[Request],
    batches: Batches,
    options: CollectOptions,
    *,
    scratch: Path,
    progress: Progress,
) -> Statistics:
    """Return the statistics of one shard."""
    return collect(model, requests, batches, options, progress)


def _reporting(key: str, watch: Any) -> Progress:
    said = 0.0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _REPORT_SECONDS or done >= total:
            said = now
            watch.report.remote(key, done, total)

    return progress


def _as_the_driver_knows_it(error: PipelineError, graphs: Sequence[Sent], folder: str) -> PipelineError:
    """Name the driver's files instead of this machine's copies."""
    where, what = error.where, error.what
    for index, sent in enumerate(graphs):
        copied = str(Path(folder, str(index))) + os.sep
        own = sent.folder + os.sep
        where, what = where.replace(copied, own), what.replace(copied, own)
    return type(error)(what, where=where, fix=error.fix)
