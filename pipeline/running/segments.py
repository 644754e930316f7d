"""Cut a graph into segments whose weights fit into memory one segment at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx

from pipeline.stored_tensors import nbytes, tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of neighbouring nodes of a graph in topological order.

    Attributes:
        nodes: Them.
        weights: The initializers that they read.
        inputs: What else they read: graph inputs and outputs of earlier segments, in the order of first use.
        outputs: What they compute.
    """

    nodes: tuple[onnx.NodeProto, ...]
    weights: tuple[onnx.TensorProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def weight_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes of all tensors that are stored with a model."""
    return sum(map(nbytes, tensors(model)))


def segments(graph: onnx.GraphProto, limit_bytes: int) -> list[Segment]:
    """Return the graph in segments with at most ``limit_bytes`` of weights each, but at least one node.

    A cut is made where the fewest tensors cross, among the places that leave a segment at least half full: between two
    blocks of a transformer that is one tensor, and no group of Q/DQ nodes and their operator is taken apart.

    Args:
        graph: Its nodes in topological order.
        limit_bytes: Most bytes of weights in a segment; a node that reads more has a segment of its own.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = list(graph.node)
    read = [list(dict.fromkeys(_reads(node))) for node in nodes]
    crossing = _crossing(nodes, read, weights)
    found = []
    begin = 0
    while begin < len(nodes):
        end = _end(begin, read, nodes, weights, limit_bytes, crossing)
        found.append(_segment(nodes[begin:end], read[begin:end], weights))
        begin = end
    return found


def _end(
    begin: int,
    read: Sequence[list[str]],
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, onnx.TensorProto],
    limit_bytes: int,
    crossing: Sequence[int],
) -> int:
    """Return where the segment ends that begins at node ``begin``."""
    held, seen = 0, set[str]()
    places: list[int] = []
    for index in range(begin, len(nodes)):
        new = {name for name in read[index] if name in weights} - seen
        more = sum(nbytes(weights[name]) for name in new) + sum(nbytes(t) for t in _own(nodes[index]))
        if index > begin and held + more > limit_bytes:
            return min(places, key=lambda place: (crossing[place], -place)) if places else index
        held, seen = held + more, seen | new
        if 2 * held >= limit_bytes:
            places.append(index + 1)
    return len(nodes)


def _own(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors that a node holds in its attributes."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        for graph in _graphs(attribute):
            yield from graph.initializer
            for inner in graph.node:
                yield from _own(inner)


def _crossing(
    nodes: Sequence[onnx.NodeProto], read: Sequence[list[str]], weights: dict[str, onnx.TensorProto]
) -> list[int]:
    """Return for every place before a node how many tensors are made before it and read behind it."""
    made = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    last = {name: index for index, names in enumerate(read) for name in names if name in made and name not in weights}
    change = [0] * (len(nodes) + 1)
    for name, index in last.items():
        change[made[name] + 1] += 1
        change[index + 1] -= 1
    total, found = 0, []
    for step in change:
        total += step
        found.append(total)
    return found


def _segment(
    nodes: Sequence[onnx.NodeProto], read: Sequence[list[str]], weights: dict[str, onnx.TensorProto]
) -> Segment:
    outputs = list(dict.fromkeys(name for node in nodes for name in node.output if name))
    names = list(dict.fromkeys(name for part in read for name in part))
    inner = set(outputs) | {name for node in nodes for name in _local(node)}
    return Segment(
        nodes=tuple(nodes),
        weights=tuple(weights[name] for name in names if name in weights),
        inputs=tuple(name for name in names if name not in weights and name not in inner),
        outputs=tuple(outputs),
    )


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node reads, and what the graphs inside it read (their own tensors too)."""
    yield from (name for name in node.input if name)
    for graph in _inside(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (value.name for value in graph.output)


def _local(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that belong to the graphs inside a node."""
    for graph in _inside(node):
        yield from (value.name for value in graph.input)
        yield from (tensor.name for tensor in graph.initializer)
        for inner in graph.node:
            yield from inner.output
            yield from _local(inner)


def _inside(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from _graphs(attribute)


def _graphs(attribute: onnx.AttributeProto) -> Iterable[onnx.GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
