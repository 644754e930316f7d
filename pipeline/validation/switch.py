"""One model that can quantize any single node: the FP32 graph with a switch at every node to be ranked.

Ranking N nodes with a model each would mean N files and N sessions. Here each node becomes
``If(switch) {the node with its Q/DQ pairs} else {the node}``: one session, and a branch not taken costs nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import kv_cache
from pipeline.errors import ModelError
from pipeline.model import save
from pipeline.types import Array, Feeds, Runner
from pipeline.validation.feeds import fit
from pipeline.validation.transplant import Pairing, Transplant, read_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Switched:
    """The model, and the bool input (scalar) that quantizes each node."""

    model: ir.Model
    switches: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchedRunner:
    """Runs the FP32 model with any of its nodes quantized.

    Attributes:
        runner: Of the model with switches; graph optimizations are off.
        switches: Node name to its switches: its own, and those of nodes that read quantized tensors for it.
    """

    runner: Runner
    switches: dict[str, tuple[str, ...]]

    def infer(self, feeds: Feeds, on: Collection[str] = ()) -> dict[str, Array]:
        """Return the outputs, without a cache's, with the nodes ``on`` quantized.

        Raises:
            DataError: An input is missing.
            EngineError: ONNX Runtime fails on the batch.
        """
        turned = {switch for node in on for switch in self.switches[node]}
        states = {s: np.asarray(s in turned) for own in self.switches.values() for s in own}
        outputs = self.runner.infer(fit(self.runner, {**feeds, **states}))
        return {name: values for name, values in outputs.items() if not kv_cache.is_present(name)}


@contextmanager
def switched(reference: ir.Model, variant: ir.Model, nodes: Sequence[str], *, threads: int) -> Iterator[SwitchedRunner]:
    """Yield a runner of the FP32 model with switches at each of ``nodes``; see :func:`add_switches`."""
    read = read_for(reference, variant, nodes)
    places = list(dict.fromkeys(place for own in read.values() for place in own))
    with tempfile.TemporaryDirectory(prefix="enginewright-layers-") as folder:
        path = Path(folder) / "switched.onnx"
        made = add_switches(reference, variant, places)
        save(made.model, path)
        with OnnxRuntimeRunner(path, threads=threads, optimize=False) as runner:
            switches = {node: tuple(made.switches[place] for place in own) for node, own in read.items()}
            yield SwitchedRunner(runner=runner, switches=switches)


def add_switches(reference: ir.Model, variant: ir.Model, nodes: Sequence[str]) -> Switched:
    """Return the FP32 model with a switch at each of ``nodes``; with all switches off it computes what FP32 does.

    Args:
        reference: The FP32 model; it is changed.
        variant: Its quantized variant, of the same opset.
        nodes: Names that both graphs have.

    Raises:
        ModelError: The graphs have different opsets, or do not correspond around a node.
    """
    if reference.opset_imports.get("") != variant.opset_imports.get(""):
        raise ModelError(
            f"The FP32 graph has opset {reference.opset_imports.get('')}, "
            f"the quantized one {variant.opset_imports.get('')}.",
            fix="Give the FP32 model from which this quantized model was made.",
        )
    for domain, version in variant.opset_imports.items():
        reference.opset_imports.setdefault(domain, version)
    pairing = Pairing(reference, variant)
    switches = {}
    # All branches are made before any node is replaced: the pairing then sees the FP32 graph whole.
    planned = [(name, *_quantized_branch(pairing, name, index)) for index, name in enumerate(nodes)]
    for index, (name, branch, initializers) in enumerate(planned):
        switch = ir.Value(name=f"switch_{index}", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        reference.graph.inputs.append(switch)
        for initializer in initializers:
            reference.graph.register_initializer(initializer)
        _replace(reference.graph, pairing.reference[name], branch, switch)
        switches[name] = switch.name or ""
    return Switched(model=reference, switches=switches)


def _quantized_branch(pairing: Pairing, name: str, index: int) -> tuple[ir.Graph, list[ir.Value]]:
    transplant = Transplant(pairing=pairing, resolve=lambda value: value, prefix=f"switch_{index}/")
    outputs = transplant.node(name)
    graph = ir.Graph([], outputs, nodes=transplant.nodes, name=f"switch_{index}_quantized")
    return graph, transplant.initializers


def _replace(graph: ir.Graph, node: ir.Node, quantized: ir.Graph, switch: ir.Value) -> None:
    copy = ir.Node(
        node.domain,
        node.op_type,
        list(node.inputs),
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=f"{switch.name}_float/{node.name}",
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.type, new.shape = f"{switch.name}_float/{old.name}", old.type, old.shape
    plain = ir.Graph([], list(copy.outputs), nodes=[copy], name=f"{switch.name}_float")
    choice = ir.Node(
        "",
        "If",
        [switch],
        [ir.AttrGraph("then_branch", quantized), ir.AttrGraph("else_branch", plain)],
        num_outputs=len(node.outputs),
        name=f"{switch.name}/{node.name}",
    )
    for old, new in zip(node.outputs, choice.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [choice], list(node.outputs), list(choice.outputs))
