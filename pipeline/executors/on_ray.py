"""Work on the nodes of a Ray cluster: calibration in shards, and each target's tasks where its accelerator is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibrators.collector import CollectOptions, Request, Statistics
from calibrators.observation import batch_rows
from engines.target import Target
from engines.tensorrt.flavour import Flavour
from pipeline.errors import MissingError, RecipeError
from pipeline.executors.cluster import Cluster, States, Submitted
from pipeline.executors.executor import LocalExecutor, Task, Waiting
from pipeline.executors.library import library
from pipeline.executors.nodes import Placement, place, shard_cpus, shards_at_once
from pipeline.executors.sending import Sent, send
from pipeline.executors.worker import Batches, Done, Work, collect_shard
from pipeline.notices import notice
from pipeline.running.memory import given_memory
from pipeline.types import CalibrationData, Feeds, Progress

SHARDS_EACH = 2
"""Shards for every place that runs one: when a node is lost half of its work is done, and fast nodes take more of them."""


class RayExecutor:
    """Sends work to the cluster that ``RAY_ADDRESS`` names, or to the one on this machine.

    Files and data go through Ray's object store; no folder is assumed to be shared. User code (data or a model that is
    ``module:callable``) runs in this process only.

    Raises:
        MissingError: Ray is not installed, there is no cluster, or a node has other software than this process.
    """

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._sent: dict[Path, Sent] = {}
        self._calls = itertools.count(1)

    def collect(
        self,
        model: Path,
        requests: Sequence[Request],
        data: CalibrationData,
        options: CollectOptions,
        progress: Progress,
    ) -> Statistics:
        """Collect in shards and add them up; the result is that of one run, bit for bit, on like processors.

        Raises:
            RecipeError: ``options`` ask for one shard only.
        """
        if options.shard is not None:
            raise RecipeError(
                "The executor ray cuts the data into shards by itself.",
                where="--shard",
                fix="Leave --shard out, or give --executor local.",
            )
        if len(data) == 0:
            return LocalExecutor().collect(model, requests, data, options, progress)  # says what is wrong
        nodes = self._cluster.nodes
        cpus = shard_cpus(nodes, options.threads)
        shards = shards_at_once(nodes, cpus) * SHARDS_EACH
        graph, wanted, call = send(model), list(requests), next(self._calls)
        submitted: dict[str, Submitted] = {}
        batches: dict[str, int] = {}
        for index, part in enumerate(_parts(data, shards, progress)):
            key = f"calibrate/{call}/{index}"
            work = Work(
                key=key,
                function=collect_shard,
                graphs=(graph,),
                arguments=(wanted, part, replace(options, threads=cpus)),
                software=self._cluster.software,
                weight_memory=given_memory(),
            )
            submitted[key] = self._cluster.submit(work, Placement(cpus=cpus))
            batches[key] = len(part.references)

        def show(states: States) -> None:
            total = sum(batches.values())
            done = sum(batches[k] * s.done / max(s.total, 1) for k, s in states.items() if k in batches)
            progress("calibrate", min(int(done), total), total)

        parts = [_value(done) for done in self._cluster.wait(submitted, show).values()]
        progress("calibrate", sum(batches.values()), sum(batches.values()))
        return Statistics.merge(parts)

    def installed(self, flavour: Flavour, device: Target) -> str | None:
        """Return the version on the nodes that would work on the target; ``None`` where there is none."""
        try:
            return place(self._cluster.nodes, device, flavour).tensorrt
        except MissingError:  # `submit` says why
            return None

    def submit(self, task: Task) -> Waiting:
        """Start a task on a node with the target's accelerator.

        Raises:
            MissingError: There is no such node; it is also said as a notice, because a build goes on without.
        """
        try:
            placement = place(self._cluster.nodes, task.device, task.flavour)
        except MissingError as error:
            notice("no-node", error.what, where=error.where)
            raise
        for path in task.graphs:
            if path not in self._sent:
                self._sent[path] = send(path)
        graphs = tuple(self._sent[path] for path in task.graphs)
        work = Work(
            key=task.name,
            function=task.function,
            graphs=graphs,
            arguments=task.arguments,
            software=self._cluster.software,
            weight_memory=given_memory(),
        )
        submitted = self._cluster.submit(work, placement)

        def wait(scratch: Path, progress: Progress) -> Any:
            def show(states: States) -> None:
                for key, state in states.items():
                    if not key.startswith("calibrate/"):
                        progress(f"{key} on {self._cluster.place(state.nodes[-1])}", state.done, state.total)

            return _value(self._cluster.wait({task.name: submitted}, show)[task.name])

        return wait

    def close(self) -> None:
        """Stop what still runs and leave the cluster."""
        self._cluster.close()


def _value(done: Done) -> Any:
    if done.error is not None:
        raise done.error
    return done.value


def _parts(data: CalibrationData, shards: int, progress: Progress) -> Iterator[Batches]:
    """Put the batches into the object store and yield them in at most ``shards`` parts, each as soon as it is read.

    Parts are runs of neighbouring batches, about equal: data tells its samples, and batches may differ in size.
    """
    ray = library()
    references: list[Any] = []
    samples, size, read = 0, 0, 0
    for feeds in data:
        size = size or _batches_each(data, feeds, shards)
        references.append(ray.put(feeds))
        samples += batch_rows(feeds)
        read += batch_rows(feeds)
        progress("send", min(read, len(data)), len(data))
        if len(references) == size:
            yield Batches(references=tuple(references), samples=samples)
            references, samples = [], 0
    if references:
        yield Batches(references=tuple(references), samples=samples)


def _batches_each(data: CalibrationData, first: Feeds, shards: int) -> int:
    return math.ceil(math.ceil(len(data) / max(batch_rows(first), 1)) / shards)
