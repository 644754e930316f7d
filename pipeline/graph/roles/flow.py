"""The graph as signals: which tensors are constant, which carry data, and walks along the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.graph.roles import ops

if TYPE_CHECKING:
    import onnx_ir as ir

_BUDGET = 1000
"""Nodes that :meth:`Flow.between` looks at before it gives up: many blocks' worth, and it keeps the search linear."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Where a walk ended (nodes it did not pass, in topological order) and what it passed."""

    ends: list[ir.Node]
    passed: set[ir.Node]


class Flow:
    """An index of one graph, made in one pass over its nodes.

    Attributes:
        nodes: The graph's nodes in topological order.
        position: Their index in that order.
        weights: Layers (matrix products and convolutions with one constant operand) and that operand.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes: tuple[ir.Node, ...] = tuple(graph)
        self.position: dict[ir.Node, int] = {node: index for index, node in enumerate(self.nodes)}
        self.weights: dict[ir.Node, ir.Value] = {}
        self._constants: set[ir.Value] = set()
        self._data: dict[ir.Node, tuple[ir.Value, ...]] = {}
        self._consumers: dict[ir.Value, list[ir.Node]] = {}
        for node in self.nodes:
            if _is_constant_node(node, self.is_constant):
                self._constants.update(node.outputs)
                self._data[node] = ()
                continue
            self._data[node] = self._find_data(node)
            for value in dict.fromkeys(self._data[node]):
                self._consumers.setdefault(value, []).append(node)
            weight = self._find_weight(node)
            if weight is not None:
                self.weights[node] = weight

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is an initializer, computed from constants alone, or a part of such."""
        return value is not None and (value in self._constants or value.is_initializer())

    def data(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """Return the inputs through which the signal enters ``node``: no constants, shapes, indices or conditions."""
        return self._data[node]

    def consumers(self, node: ir.Node) -> list[ir.Node]:
        """Return the nodes that read the signal ``node`` makes, each once, in topological order."""
        found = dict.fromkeys(n for value in node.outputs for n in self._consumers.get(value, ()))
        return list(found) if len(node.outputs) == 1 else sorted(found, key=self.position.__getitem__)

    def producer(self, value: ir.Value) -> ir.Node | None:
        """Return the node of this graph that makes ``value``."""
        node = value.producer()
        return node if node in self.position else None

    def is_gemm(self, node: ir.Node) -> bool:
        """Whether ``node`` is a matrix product with a constant weight."""
        return node in self.weights and node.op_type in ops.GEMM

    def is_depthwise(self, node: ir.Node) -> bool:
        """Whether ``node`` is a convolution that keeps its channels apart (group == input channels)."""
        group = node.attributes.get_int("group", 1)
        if node not in self.weights or node.op_type not in ops.CONV or group <= 1:
            return False
        shape = static_shape(self.weights[node])
        # Weights are [out, in / group, ...] in Conv and [in, out / group, ...] in ConvTranspose.
        return shape is not None and (shape[0] == group if node.op_type == "ConvTranspose" else shape[1] == 1)

    def is_contraction(self, node: ir.Node) -> bool:
        """Whether ``node`` multiplies two activations as matrices."""
        return node.op_type in ops.GEMM and len(self._data[node]) >= 2 and node not in self.weights

    def root(self, value: ir.Value) -> ir.Value:
        """Return the tensor of which ``value`` is a rearranged copy."""
        node = self.producer(value)
        while node is not None and node.op_type in ops.LAYOUT and len(self._data[node]) == 1:
            value = self._data[node][0]
            node = self.producer(value)
        return value

    def back(self, value: ir.Value, through: Callable[[ir.Node], bool]) -> Walk:
        """Walk against the data from ``value``, passing the nodes that ``through`` lets."""
        start = self.producer(value)
        return self._walk([start] if start else [], through, self._producers)

    def forward(self, node: ir.Node, through: Callable[[ir.Node], bool]) -> Walk:
        """Walk along the data from the outputs of ``node``, passing the nodes that ``through`` lets."""
        return self._walk(self.consumers(node), through, self.consumers)

    def between(self, source: ir.Value, target: ir.Value) -> list[ir.Node]:
        """Return the nodes on data paths from ``source`` to ``target`` in topological order; empty if there is none."""
        start, end = self.producer(source), self.producer(target)
        lowest = self.position[start] if start else -1
        if end is None or self.position[end] <= lowest:
            return []
        ancestors, stack, reached = {end}, [end], False
        while stack:
            node = stack.pop()
            for value in self._data[node]:
                reached = reached or value is source
                producer = self.producer(value)
                if producer is not None and producer not in ancestors and self.position[producer] > lowest:
                    ancestors.add(producer)
                    stack.append(producer)
            if len(ancestors) > _BUDGET:
                return []
        if not reached:
            return []
        path: dict[ir.Node, None] = {}
        for node in sorted(ancestors, key=self.position.__getitem__):
            if any(value is source or value.producer() in path for value in self._data[node]):
                path[node] = None
        return list(path) if end in path else []

    def _producers(self, node: ir.Node) -> Iterator[ir.Node]:
        for value in self._data[node]:
            producer = self.producer(value)
            if producer is not None:
                yield producer

    def _walk(
        self,
        start: list[ir.Node],
        through: Callable[[ir.Node], bool],
        following: Callable[[ir.Node], Iterable[ir.Node]],
    ) -> Walk:
        seen, stack = set(start), list(start)
        ends: list[ir.Node] = []
        passed: set[ir.Node] = set()
        while stack:
            node = stack.pop()
            if not through(node):
                ends.append(node)
                continue
            passed.add(node)
            for other in following(node):
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        return Walk(sorted(ends, key=self.position.__getitem__), passed)

    def _find_data(self, node: ir.Node) -> tuple[ir.Value, ...]:
        if node.op_type in ops.NO_DATA:
            return ()
        inputs: list[ir.Value | None] = list(node.inputs)
        if node.op_type == "Where":
            inputs = inputs[1:]
        elif node.op_type in ops.FIRST_INPUT_DATA and inputs and not self.is_constant(inputs[0]):
            inputs = inputs[:1]
        return tuple(value for value in inputs if value is not None and not self.is_constant(value))

    def _find_weight(self, node: ir.Node) -> ir.Value | None:
        if node.op_type in ops.CONV or node.op_type in ops.BLOCKS:
            weight = node.inputs[1] if len(node.inputs) > 1 else None
            return weight if self.is_constant(weight) and self._data[node] else None
        if node.op_type not in ops.GEMM or len(node.inputs) < 2:
            return None
        left, right = node.inputs[:2]
        if left is None or right is None or self.is_constant(left) == self.is_constant(right):
            return None
        weight = left if self.is_constant(left) else right
        return weight if _contracts(node, weight, is_left=weight is left) else None


def node_key(node: ir.Node) -> str:
    """Return the node's name, or its first output's where a raw graph has none."""
    return node.name or next((value.name for value in node.outputs if value.name), "") or ""


def initializer(value: ir.Value) -> ir.Value:
    """Return the initializer that ``value`` rearranges or converts, or ``value`` itself."""
    node = value.producer()
    while node is not None and node.op_type in ops.LAYOUT and node.inputs and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def is_floating(value: ir.Value) -> bool:
    """Whether ``value``, a constant, holds floating-point numbers, as far as the graph says."""
    source = initializer(value)
    dtype = source.const_value.dtype if source.const_value is not None else source.dtype
    return dtype is not None and bool(dtype.is_floating_point())


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """Return the shape of ``value`` where every dimension is known."""
    shape = value.shape if value.shape is not None or value.const_value is None else value.const_value.shape
    if shape is None:
        return None
    dims = tuple(dim for dim in shape if isinstance(dim, int))
    return dims if len(dims) == len(shape) else None


def _is_constant_node(node: ir.Node, is_constant: Callable[[ir.Value | None], bool]) -> bool:
    if node.op_type == "Constant":
        return True
    given = [value for value in node.inputs if value is not None]
    if node.op_type in ("Slice", "Split") and given and is_floating(given[0]):
        given = given[:1]  # a part of a weight is one, though an exporter computed its bounds from shapes
    has_graphs = any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values())
    random = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")
    return bool(given) and not has_graphs and not random and all(is_constant(value) for value in given)


def _contracts(node: ir.Node, weight: ir.Value, *, is_left: bool) -> bool:
    """Whether the product sums over a weight dimension longer than 1 (outer products of RoPE do not)."""
    if node.op_type == "Einsum":
        terms, _, result = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
        labels = [set(term) for term in terms.split(",")]
        return len(labels) == 2 and bool((labels[0] & labels[1]) - set(result) - {"."})
    shape = static_shape(weight)
    if shape is None:
        return True
    if len(shape) < 2:
        return False
    flag = "transA" if is_left else "transB"
    transposed = (
        bool(node.attributes.get_int(flag, 0)) if node.op_type in ("Gemm", "FusedGemm", "FusedMatMul") else False
    )
    return shape[-1 if is_left != transposed else -2] > 1
