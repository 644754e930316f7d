"""Give every node and value in the model, subgraphs included, a name of its own that is the same next time."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from pipeline.graph.passes.graph_pass import GraphPass


class NameEverything(GraphPass):
    """Keep names that are unique; the others become ``<op_type>_<n>``, values ``<name>_<n>``.

    The names of the model's inputs and outputs never change. Rules, roles and precision plans refer to node names.
    """

    name = "name-everything"

    def change(self, model: ir.Model) -> int:
        """Return the number of names given."""
        nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        return _name_nodes(nodes) + _name_values(model, nodes)


def _name_nodes(nodes: list[ir.Node]) -> int:
    used = Counter(node.name for node in nodes)
    taken = {name for name, count in used.items() if name and count == 1}
    numbers: Counter[str] = Counter()
    count = 0
    for node in nodes:
        if node.name in taken and used[node.name] == 1:
            continue
        node.name = _next(node.op_type, numbers, taken)
        count += 1
    return count


def _next(base: str, numbers: Counter[str], taken: set[str]) -> str:
    while True:
        name = f"{base}_{numbers[base]}"
        numbers[base] += 1
        if name not in taken:
            taken.add(name)
            return name


def _name_values(model: ir.Model, nodes: list[ir.Node]) -> int:
    fixed = [*model.graph.inputs, *model.graph.outputs]
    values: dict[ir.Value, None] = dict.fromkeys(fixed)
    for graph in model.graphs():
        values.update(dict.fromkeys((*graph.inputs, *graph.initializers.values())))
    for node in nodes:
        values.update(dict.fromkeys(node.outputs))
    taken = {value.name for value in fixed if value.name}
    numbers: Counter[str] = Counter()
    count = 0
    for value in list(values)[len(dict.fromkeys(fixed)) :]:
        absent = not value.name and not value.uses() and not value.is_graph_output()
        if absent:
            value.name = ""  # an optional output that nobody wants
            continue
        if not value.name or value.name in taken:
            producer = value.producer()
            value.name = _next(value.name or (f"{producer.name}_output" if producer else "value"), numbers, taken)
            count += 1
        taken.add(value.name or "")
    return count
