"""Recognise a GELU that an exporter wrote out, and make it one Gelu node.

    exact:  0.5 x (1 + erf(x / sqrt(2)))
    tanh:   0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

(Hendrycks and Gimpel 2016, arXiv:1606.08415.) Exporters associate the three factors x, 0.5 and (1 + …) in every way,
so the walk starts at the Erf or Tanh and multiplies whatever it meets, instead of matching one tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from pipeline.graph.passes.constants import scalar_of
from pipeline.graph.passes.graph_pass import GraphPass, is_op

TOLERANCE = 1e-3
"""Exporters round sqrt(2) and 0.044715 to between 3 and 8 digits."""


@dataclass(slots=True)
class _Product:
    """A value as ``factor`` times the product of ``terms``."""

    factor: float
    terms: list[ir.Value]


class FuseGelu(GraphPass):
    """Fuse decomposed GELU, exact or by tanh."""

    name = "fuse-gelu"

    def change(self, model: ir.Model) -> int:
        """Return the number of activations fused. The model must be of opset >= 20."""
        count = 0
        for node in list(model.graph):
            if node.graph is None or not is_op(node, "Erf", "Tanh"):
                continue
            x = _erf_input(node) if node.op_type == "Erf" else _tanh_input(node)
            if x is not None and _fuse(model.graph, node, x, "none" if node.op_type == "Erf" else "tanh"):
                count += 1
        return count


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=TOLERANCE)


def _product(value: ir.Value | None, stop: ir.Value | None = None) -> _Product:
    """Take products, quotients by constants, and small powers apart."""
    made = _Product(1.0, [])
    pending = [value]
    while pending:
        current = pending.pop()
        if current is None:
            continue
        scalar = scalar_of(current)
        node = current.producer()
        if scalar is not None:
            made.factor *= scalar
        elif current is not stop and is_op(node, "Mul") and node is not None:
            pending.extend(node.inputs)
        elif current is not stop and node is not None and is_op(node, "Div") and scalar_of(node.inputs[1]):
            made.factor /= scalar_of(node.inputs[1]) or 1.0
            pending.append(node.inputs[0])
        elif (
            current is not stop and node is not None and is_op(node, "Pow") and scalar_of(node.inputs[1]) in (2.0, 3.0)
        ):
            pending.extend([node.inputs[0]] * int(scalar_of(node.inputs[1]) or 1))
        else:
            made.terms.append(current)
    return made


def _erf_input(erf: ir.Node) -> ir.Value | None:
    """Return x of erf(x / sqrt(2)); x itself may be a product, so only the last factor is taken off."""
    node = erf.inputs[0].producer() if erf.inputs[0] is not None else None
    if node is None or not is_op(node, "Mul", "Div"):
        return None
    x, constant = node.inputs[0], scalar_of(node.inputs[1])
    if constant is None and node.op_type == "Mul":
        x, constant = node.inputs[1], scalar_of(node.inputs[0])
    if constant is None or not constant:
        return None
    return x if _close(constant if node.op_type == "Mul" else 1 / constant, math.sqrt(0.5)) else None


def _tanh_input(tanh: ir.Node) -> ir.Value | None:
    """Return x of tanh(sqrt(2/pi) (x + 0.044715 x^3)), also written as sqrt(2/pi) x (1 + 0.044715 x^2)."""
    outer = _product(tanh.inputs[0])
    adds = [t for t in outer.terms if is_op(t.producer(), "Add")]
    if not _close(outer.factor, math.sqrt(2 / math.pi)) or not adds:
        return None
    for inner in adds:
        others = list(outer.terms)
        others.remove(inner)
        add = inner.producer()
        assert add is not None
        for one, cubic in (add.inputs[:2], add.inputs[1::-1]):
            x = others[0] if others else one
            power = _product(cubic, stop=x)
            fits = _close(power.factor, 0.044715) and all(term is x for term in power.terms)
            if not fits or x is None or len(others) > 1:
                continue
            if others and scalar_of(one) == 1.0 and len(power.terms) == 2:
                return x
            if not others and one is x and len(power.terms) == 3:
                return x
    return None


def _fuse(graph: ir.Graph, root: ir.Node, x: ir.Value, approximate: str) -> bool:
    plus = _only_user(root.outputs[0])
    if plus is None or not is_op(plus, "Add") or 1.0 not in (scalar_of(plus.inputs[0]), scalar_of(plus.inputs[1])):
        return False
    last = _last_product(plus.outputs[0], x)
    if last is None:
        return False
    output = last.outputs[0]
    fused = ir.node(
        "Gelu",
        [x],
        {"approximate": approximate} if approximate != "none" else {},
        name=last.name,
        outputs=[ir.Value(name=output.name, type=output.type, shape=output.shape)],
    )
    graph.insert_after(last, fused)
    output.replace_all_uses_with(fused.outputs[0], replace_graph_outputs=True)
    output.name = None
    return True


def _last_product(value: ir.Value, x: ir.Value) -> ir.Node | None:
    """Follow the products that ``value`` enters until they amount to ``0.5 x value``; return the last one."""
    current = value
    for _ in range(3):
        node = _only_user(current)
        if node is None or not is_op(node, "Mul", "Div"):
            return None
        terms = _expand(node.outputs[0], x, value)
        if terms is None:
            return None
        factor, xs = terms
        if xs == 1 and math.isclose(factor, 0.5, rel_tol=1e-6):
            return node
        if xs > 1:
            return None
        current = node.outputs[0]
    return None


def _expand(value: ir.Value, x: ir.Value, root: ir.Value) -> tuple[float, int] | None:
    """Write ``value`` as ``factor * x^n * root``; ``None`` if anything else is in it."""
    factor, count, seen = 1.0, 0, 0
    pending: list[ir.Value | None] = [value]
    while pending:
        current = pending.pop()
        scalar = scalar_of(current)
        node = current.producer() if current is not None else None
        if current is x:
            count += 1
        elif current is root:
            seen += 1
        elif scalar is not None:
            factor *= scalar
        elif node is not None and is_op(node, "Mul"):
            pending.extend(node.inputs)
        elif node is not None and is_op(node, "Div") and scalar_of(node.inputs[1]):
            factor /= scalar_of(node.inputs[1]) or 1.0
            pending.append(node.inputs[0])
        else:
            return None
    return (factor, count) if seen == 1 else None


def _only_user(value: ir.Value) -> ir.Node | None:
    users = value.uses()
    return next(iter(users)).node if len(users) == 1 and not value.is_graph_output() else None
