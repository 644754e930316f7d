"""The nodes of a cluster: which of them work on a target, and whether they compute the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.target import Target
from engines.tensorrt.flavour import Flavour
from pipeline.errors import MissingError
from pipeline.executors.machine import Machine, differing
from pipeline.notices import notice

RESOURCE = "accelerator_type:"
"""Ray names a node's accelerator by a resource: ``accelerator_type:A100``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that takes work.

    Attributes:
        id: Ray's identifier, hex digits.
        host: The machine's name or address.
        cpus: CPUs that Ray may use there.
        accelerators: Ray's names of its accelerators.
        machine: Its software and processor.
    """

    id: str
    host: str
    cpus: int
    accelerators: frozenset[str]
    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a task may run.

    Attributes:
        resource: What its node must have; ``None`` is any node with the CPUs.
        cpus: CPUs that it takes.
        gpus: GPUs that it takes.
        tensorrt: Version there; ``None`` if it is not installed.
    """

    resource: str | None = None
    cpus: int = 1
    gpus: int = 0
    tensorrt: str | None = None

    @property
    def needs(self) -> str:
        """What a node must have, in words."""
        return self.resource or f"{self.cpus} CPU{'' if self.cpus == 1 else 's'}"

    def fits(self, resources: Mapping[str, float]) -> bool:
        """Return whether a node with these resources in all could ever take the task."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **({self.resource: 0.001} if self.resource else {})}
        return all(resources.get(name, 0) >= amount for name, amount in wanted.items())


def accelerator(device: Target) -> str:
    """Return Ray's name of a target's accelerator: ``A100``, ``GeForce-RTX-4090``."""
    return f"GeForce-{device.title.replace(' ', '-')}" if device.title.startswith("RTX") else device.title


def place(nodes: Sequence[Node], device: Target, flavour: Flavour) -> Placement:
    """Return where work on a target goes.

    TensorRT builds on the GPU that the engine is for, so its node must have it. TensorRT for RTX compiles for a GPU without
    using one: the target's own node is taken where there is one, any other otherwise.

    Raises:
        MissingError: No node has the accelerator, or those that have it differ in TensorRT.
    """
    name = accelerator(device)
    own = [node for node in nodes if name in node.accelerators]
    if not own and flavour is Flavour.TENSORRT:
        there = ", ".join(sorted({a for node in nodes for a in node.accelerators})) or "none"
        raise MissingError(
            f"No node of the Ray cluster has {RESOURCE}{name}, on which the {device.title} engine is built; "
            f"accelerators there: {there}.",
            where=f"target {device.name}",
            fix="Add such a node and run the same command again; everything else of the build is reused.",
        )
    versions = {node.machine.tensorrt.get(flavour) for node in own or nodes}
    if len(versions) > 1:
        listed = ", ".join(sorted(version or "none" for version in versions))
        raise MissingError(
            f"The nodes that could work on {device.title} differ in {flavour.label}: {listed}.",
            where=f"target {device.name}",
            fix="Start all of them from one image.",
        )
    return Placement(
        resource=f"{RESOURCE}{name}" if own else None,
        gpus=1 if flavour is Flavour.TENSORRT else 0,
        tensorrt=next(iter(versions), None),
    )


def check_alike(nodes: Sequence[Node], driver: Machine) -> None:
    """Refuse nodes with other software than the driver's; say where processors differ.

    Raises:
        MissingError: Names the node, the package and both versions.
    """
    for node in nodes:
        if other := differing(driver.software, node.machine.software):
            raise unlike(node.host, other)
    processors = {driver.processor, *(node.machine.processor for node in nodes)}
    if len(processors) > 1:
        notice(
            "different-processors",
            f"The nodes have different processors ({'; '.join(sorted(processors))}), whose FP32 kernels may round "
            "differently: statistics need not be those of one machine, bit for bit.",
            where="executor: ray",
        )


def unlike(host: str, other: str) -> MissingError:
    """Return the error for a node with other software than the driver's."""
    return MissingError(
        f"The node {host} has {other}.",
        where="executor: ray",
        fix="Start every node from one image or environment: other versions compute other bytes.",
    )


def shard_cpus(nodes: Sequence[Node], threads: int) -> int:
    """Return the CPUs that a calibration shard takes: ``threads``, or all of the smallest node's; no more than a node has."""
    sizes = [node.cpus for node in nodes]
    return min(threads, max(sizes)) if threads else min(sizes)


def shards_at_once(nodes: Sequence[Node], cpus: int) -> int:
    """Return how many shards of ``cpus`` CPUs run side by side; at least 1."""
    return max(1, sum(node.cpus // cpus for node in nodes))
