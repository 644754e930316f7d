"""What every pass of ``prepare`` is."""

from __future__ import annotations

import abc
from collections.abc import Iterator

import onnx_ir as ir


class GraphPass(ir.passes.InPlacePass):
    """A pass that changes the model in place and says how many things it changed."""

    name: str
    """Stable name, shown to the user and kept in the report."""

    @abc.abstractmethod
    def change(self, model: ir.Model) -> int:
        """Change ``model`` and return the number of nodes or tensors concerned."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run as an onnx_ir pass."""
        return ir.passes.PassResult(model, modified=self.change(model) > 0)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node: the main graph, its subgraphs, and the local functions with theirs."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Operators whose subgraphs see the values of the graph around them; other operators' subgraphs may not."""


def visible_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes of the main graph and of every subgraph that sees its initializers."""
    yield from ir.traversal.RecursiveGraphIterator(
        model.graph, recursive=lambda node: node.domain == "" and node.op_type in CONTROL_FLOW
    )


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is one of the given operators of the ONNX domain."""
    return node is not None and node.domain == "" and node.op_type in op_types


def has_subgraph(node: ir.Node) -> bool:
    """Whether a node carries a graph (If, Loop, Scan, …)."""
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def is_random(node: ir.Node) -> bool:
    """Whether two runs of the node may differ; a custom operator may always."""
    if node.domain not in ("", "ai.onnx.ml"):
        return True
    return node.op_type in RANDOM_OPS or (node.op_type == "Dropout" and len(node.inputs) > 2)


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """Return a float attribute of a node."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()
