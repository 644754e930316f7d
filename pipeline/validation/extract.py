"""Writes one layer alone, float and quantized, with its inputs and what it must give: a failing layer to reproduce."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.errors import ModelError, StoreError
from pipeline.model import load, save
from pipeline.notices import notice
from pipeline.types import Array, Feeds
from pipeline.validation.tapped import Tapped
from pipeline.validation.transplant import Pairing, Transplant


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """What :func:`extract` wrote.

    Attributes:
        layer: ``layer.onnx``, the nodes in float.
        quantized: ``layer.quantized.onnx``, the same nodes with the Q/DQ pairs they read; ``None`` without a variant,
            or where the variant does not have these nodes.
        inputs: ``inputs.npz``: the layer's inputs as the FP32 model computes them.
        expected: ``expected.npz``: the layer's outputs in the FP32 model.
        expected_quantized: ``expected_quantized.npz``: what the quantized layer gives for the same inputs.
        nodes: The nodes in ``layer.onnx``, in order.
    """

    layer: Path
    quantized: Path | None
    inputs: Path
    expected: Path
    expected_quantized: Path | None
    nodes: tuple[str, ...]


def extract(
    reference: Path, variant: Path | None, nodes: Sequence[str], feeds: Feeds, out: Path, *, threads: int = 0
) -> Extracted:
    """Write the subgraph of ``nodes`` alone.

    Args:
        reference: The FP32 model.
        variant: Its quantized variant.
        nodes: Names of one node, or of the nodes of a block; nodes that lie between them come along.
        feeds: One batch for the whole model.
        out: Folder to write to; made if it is not there.
        threads: Intra-op threads, 0 for one per core.

    Raises:
        ModelError: A name is unknown, the nodes do not bound a subgraph, or the graphs do not correspond.
        EngineError: A model cannot be run.
        StoreError: The folder cannot be written.
    """
    model = load(reference)
    layer = _float_layer(model, nodes)
    names = tuple(node.name or "" for node in layer)
    wanted = [value.name or "" for value in (*layer.inputs, *layer.outputs)]
    tensors = Tapped(reference, [*wanted], threads).infer(feeds) if wanted else {}
    inputs = {value.name or "": tensors[value.name or ""] for value in layer.inputs}
    expected = {value.name or "": tensors[value.name or ""] for value in layer.outputs}
    for value in layer.inputs:
        _describe(value, inputs[value.name or ""])
    quantized = _quantized_layer(model, load(variant), layer, names) if variant is not None else None
    paths = Extracted(
        layer=out / "layer.onnx",
        quantized=out / "layer.quantized.onnx" if quantized is not None else None,
        inputs=out / "inputs.npz",
        expected=out / "expected.npz",
        expected_quantized=out / "expected_quantized.npz" if quantized is not None else None,
        nodes=names,
    )
    _make_folder(out)
    save(ir.Model(layer, ir_version=model.ir_version, functions=list(model.functions.values())), paths.layer)
    _write_npz(paths.inputs, inputs)
    _write_npz(paths.expected, expected)
    if quantized is not None and paths.quantized is not None and paths.expected_quantized is not None:
        save(ir.Model(quantized, ir_version=model.ir_version), paths.quantized)
        with OnnxRuntimeRunner(paths.quantized, threads=threads, optimize=False) as runner:
            _write_npz(paths.expected_quantized, runner.infer({i.name: inputs[i.name] for i in runner.inputs}))
    return paths


def _float_layer(model: ir.Model, nodes: Sequence[str]) -> ir.Graph:
    """Return the subgraph of ``nodes`` as a graph of its own."""
    known = {node.name: node for node in model.graph if node.name}
    for name in nodes:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            raise ModelError(
                "The model has no node of this name.",
                where=name,
                fix=f"Did you mean {near[0]}?" if near else "`python -m pipeline inspect` lists the nodes.",
            )
    chosen = [known[name] for name in nodes]
    made = {value for node in chosen for value in node.outputs}
    inputs = list(dict.fromkeys(v for node in chosen for v in _read(node) if v not in made and not v.is_initializer()))
    outputs = [
        value
        for value in dict.fromkeys(value for node in chosen for value in node.outputs)
        if value.is_graph_output() or not value.uses() or any(user not in chosen for user, _ in value.uses())
    ]
    try:
        layer = ir.convenience.extract(model.graph, inputs, [value for value in outputs if value.name])
    except ValueError as error:
        raise ModelError(
            f"These nodes do not form a layer: {error}",
            where=", ".join(nodes),
            fix="Name one node, or the nodes of one block.",
        ) from error
    # onnx_ir collects them in a set, so their order, and with it the file, would differ from run to run.
    for name in sorted(layer.initializers):
        layer.initializers.add(layer.initializers.pop(name))
    return layer


def _read(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads, the outer tensors that its subgraphs read with it."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        graphs = (
            [attribute.as_graph()]
            if attribute.type == ir.AttributeType.GRAPH
            else list(attribute.as_graphs())
            if attribute.type == ir.AttributeType.GRAPHS
            else []
        )
        for graph in graphs:
            found += [v for inner in graph.all_nodes() for v in inner.inputs if v is not None and v.graph is node.graph]
    return found


def _describe(value: ir.Value, array: Array) -> None:
    """Give a layer's input the type and rank that a graph input needs."""
    value.dtype = ir.DataType.from_numpy(array.dtype)
    if value.shape is None or len(value.shape) != array.ndim:
        value.shape = ir.Shape([None] * array.ndim)


def _quantized_layer(model: ir.Model, variant: ir.Model, layer: ir.Graph, names: Sequence[str]) -> ir.Graph | None:
    """Return the same layer with its Q/DQ pairs, reading FP32 tensors and giving them."""
    pairing = Pairing(model, variant)
    if lacking := [name for name in names if pairing.quantized(name) is None]:
        notice(
            "layer-not-quantized",
            "The quantized model does not have these nodes under their names, so only the float layer is written.",
            where=", ".join(lacking[:3]),
        )
        return None
    inputs = {
        value.name or "": ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(value.dtype))
        for value in layer.inputs
        if value.dtype is not None
    }
    made: dict[str, ir.Value] = {}
    kept: dict[str, ir.Value] = {}

    def resolve(value: ir.Value) -> ir.Value:
        name = value.name or ""
        if value.is_initializer():
            return kept.setdefault(
                name, ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
            )
        if name not in made and name not in inputs:
            raise ModelError(
                "The quantized layer reads a tensor that the float layer does not.",
                where=f"tensor {name}",
                fix="Extract more of the block at once.",
            )
        return made.get(name) or inputs[name]

    transplant = Transplant(pairing=pairing, resolve=resolve, prefix="quantized/")
    for name in names:
        made |= {
            old.name or "": new for old, new in zip(pairing.reference[name].outputs, transplant.node(name), strict=True)
        }
    outputs = []
    for value in layer.outputs:
        give = ir.node("Identity", [made[value.name or ""]], name=f"quantized/{value.name}_output")
        give.outputs[0].name, give.outputs[0].type, give.outputs[0].shape = value.name, value.type, value.shape
        transplant.nodes.append(give)
        outputs.append(give.outputs[0])
    return ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=transplant.nodes,
        initializers=[*kept.values(), *transplant.initializers],
        opset_imports=dict(variant.opset_imports),
        name="layer",
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"The folder cannot be made: {error.strerror}.", where=str(out)) from error


def _write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays under their own names; ``numpy.savez`` takes a tensor called ``file`` for its own argument."""
    try:
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)
    except OSError as error:
        raise StoreError(
            f"The arrays could not be written: {error.strerror}.", where=str(path), fix="Free some disk space."
        ) from error
