"""The cluster as the driver sees it: its nodes, and tasks that are waited for while nodes come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import EngineError, MissingError
from pipeline.executors import worker
from pipeline.executors.library import connect, library, scheduling
from pipeline.executors.machine import this_machine
from pipeline.executors.nodes import RESOURCE, Node, Placement, check_alike
from pipeline.executors.worker import Done, State, Work
from pipeline.notices import notice

RETRIES = 3
"""How often a task starts again when its node or its process is lost."""
WAIT_FOR_NODE_SECONDS = 120.0
"""How long a task waits for a node after the last one that could run it was lost: a pod takes about a minute to return."""
_POLL_SECONDS = 0.5
_NODES_SECONDS = 2.0
"""How often the list of nodes is looked at: it comes from the head."""
_PROBE_SECONDS = 180.0

States = Mapping[str, State]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A task on its way: Ray's reference to what will come of it, and where it may run."""

    reference: Any
    work: Work
    placement: Placement


class Cluster:
    """A running Ray cluster that this process has joined.

    Raises:
        MissingError: Ray is not installed, there is no cluster, no node takes work, or a node has other software.
    """

    def __init__(self) -> None:
        self._joined = connect()
        self._ray = library()
        self._watch: Any = None
        self._going: dict[str, Submitted] = {}
        self._attempts: dict[str, int] = {}
        try:
            self.nodes = _nodes()
            driver = this_machine()
            check_alike(self.nodes, driver)
        except BaseException:
            self.close()
            raise
        here = self._ray.get_runtime_context().get_node_id()
        stay = scheduling().NodeAffinitySchedulingStrategy(here, soft=False)
        self._watch = self._ray.remote(worker.Watch).options(num_cpus=0, scheduling_strategy=stay).remote()
        self._run = self._ray.remote(worker.run)
        self.software = driver.software
        self._hosts = {node.id: node.host for node in self.nodes}

    def submit(self, work: Work, placement: Placement) -> Submitted:
        """Start a task on a node that the placement allows."""
        options: dict[str, Any] = {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "max_retries": RETRIES}
        # A task that reads from a node which dies sees a broken connection.
        options["retry_exceptions"] = [OSError, self._ray.exceptions.RaySystemError]
        if placement.resource is not None:
            options["resources"] = {placement.resource: 0.001}
        reference = self._run.options(**options).remote(work, self._watch)
        submitted = Submitted(reference=reference, work=work, placement=placement)
        self._going[work.key] = submitted
        return submitted

    def wait(self, wanted: Mapping[str, Submitted], show: Callable[[States], None]) -> dict[str, Done]:
        """Return what came of every task, by key, in the order of ``wanted``.

        Args:
            wanted: Tasks by key.
            show: Told now and then how far every task of this cluster is.

        Raises:
            MissingError: The last node that could run a task was lost and none came in its place.
            EngineError: A task's node or process was lost time and again.
        """
        left = {submitted.reference: submitted for submitted in wanted.values()}
        found: dict[str, Done] = {}
        waiting_since: float | None = None
        looked = time.monotonic()
        while left:
            ready, _ = self._ray.wait(list(left), num_returns=len(left), timeout=_POLL_SECONDS)
            states: States = self._ray.get(self._watch.read.remote())
            self._say_what_runs_again(states)
            for reference in ready:
                key = left.pop(reference).work.key
                found[key] = self._result(key, reference)
            show(states)
            if time.monotonic() - looked < _NODES_SECONDS:
                continue
            nodes, looked = self._ray.nodes(), time.monotonic()
            homeless = [submitted for submitted in left.values() if not _fits(nodes, submitted.placement)]
            for submitted in homeless:
                if submitted.placement.resource is not None and not submitted.placement.gpus:
                    moved = self._move(left.pop(submitted.reference))
                    left[moved.reference] = moved
            stuck = [submitted for submitted in homeless if submitted.reference in left]
            waiting_since = (waiting_since or time.monotonic()) if stuck else None
            if waiting_since is not None:
                self._wait_for_a_node(stuck[0], time.monotonic() - waiting_since)
        return {key: found[key] for key in wanted}

    def place(self, node: str) -> str:
        """Return a node as people know it: its machine's name and the start of Ray's identifier."""
        return f"{self._hosts.get(node, 'a new machine')} ({node[:8]})"

    def close(self) -> None:
        """Stop tasks that are still going on, and leave the cluster if this object joined it."""
        if self._joined:
            self._ray.shutdown()  # Ray stops the tasks of a driver that leaves
            return
        for submitted in self._going.values():
            self._ray.cancel(submitted.reference, force=True)
        if self._watch is not None:
            self._ray.kill(self._watch)

    def _result(self, key: str, reference: Any) -> Done:
        self._going.pop(key, None)
        errors = self._ray.exceptions
        try:
            done: Done = self._ray.get(reference)
        except errors.RayTaskError:
            raise  # the work itself failed in a way that is a bug
        except errors.RayError as error:
            raise EngineError(
                f"The cluster gave up on {key} after {RETRIES + 1} attempts: {' '.join(str(error).split())[:300]}",
                where="executor: ray",
                fix="Look at the nodes' memory and at `ray status`; run again to go on with the rest.",
            ) from error
        for item in done.notices:
            notice(item.code, item.message, where=item.where)
        return done

    def _say_what_runs_again(self, states: States) -> None:
        for key, state in states.items():
            before, now = self._attempts.get(key, 1), len(state.nodes)
            if now > before:
                notice(
                    "node-lost",
                    f"{key} runs again, on {self.place(state.nodes[-1])}: {self.place(state.nodes[-2])} or its process "
                    "was lost.",
                    where="executor: ray",
                )
            self._attempts[key] = now

    def _move(self, submitted: Submitted) -> Submitted:
        """Start a task that needs no GPU anew on any node: the last one of its accelerator was lost."""
        key = submitted.work.key
        notice(
            "no-node-left",
            f"No node with {submitted.placement.resource} is left for {key}, which needs no GPU and goes to another.",
            where="executor: ray",
        )
        self._ray.cancel(submitted.reference, force=True)
        return self.submit(submitted.work, replace(submitted.placement, resource=None))

    def _wait_for_a_node(self, submitted: Submitted, seconds: float) -> None:
        key, needed = submitted.work.key, submitted.placement.needs
        notice(
            "no-node-left",
            f"No node with {needed} is left for {key}; waiting up to {WAIT_FOR_NODE_SECONDS:.0f} s for one to join.",
            where="executor: ray",
        )
        if seconds > WAIT_FOR_NODE_SECONDS:
            self._ray.cancel(submitted.reference, force=True)
            self._going.pop(key, None)
            raise MissingError(
                f"The nodes with {needed} were lost, and none joined in {WAIT_FOR_NODE_SECONDS:.0f} s.",
                where=key,
                fix="Start such a node and run the same command again: what is finished is not done again.",
            )


def _nodes() -> tuple[Node, ...]:
    """Return every node that takes work, with the facts that it tells of itself."""
    ray = library()
    alive = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    if not alive:
        raise MissingError(
            "No node of the Ray cluster has a CPU to work on.",
            where="executor: ray",
            fix="Start worker nodes: `ray start --address HOST:6379`.",
        )
    probe, strategy = ray.remote(worker.machine), scheduling().NodeAffinitySchedulingStrategy
    asked = [
        probe.options(num_cpus=0, scheduling_strategy=strategy(n["NodeID"], soft=False), max_retries=0).remote()
        for n in alive
    ]
    found = []
    for entry, reference in zip(alive, asked, strict=True):
        try:
            machine = ray.get(reference, timeout=_PROBE_SECONDS)
        except ray.exceptions.RayError as error:
            raise MissingError(
                f"The node {entry['NodeManagerHostname']} does not run this package: {_last_line(error)}",
                where="executor: ray",
                fix="Install the same environment on every node (`ray status` lists them), or stop the node.",
            ) from error
        accelerators = frozenset(r.removeprefix(RESOURCE) for r in entry["Resources"] if r.startswith(RESOURCE))
        found.append(
            Node(
                id=entry["NodeID"],
                host=entry["NodeManagerHostname"],
                cpus=int(entry["Resources"]["CPU"]),
                accelerators=accelerators,
                machine=machine,
            )
        )
    return tuple(sorted(found, key=lambda node: node.id))


def _fits(nodes: list[dict[str, Any]], placement: Placement) -> bool:
    return any(n["Alive"] and placement.fits(n["Resources"]) for n in nodes)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
