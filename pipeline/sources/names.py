"""Names and metadata of a graph that torch exported: names that a person can use, and nothing that varies.

torch's exporter calls a node ``node_MatMul_63`` and keeps the module path, the source line and the file name beside
it as metadata. The module path becomes the name (``/encoder/layer.0/attention/self/query/MatMul``), so that globs in
rules work; the rest goes, because it holds paths of the machine and would make equal exports differ.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDED = "pkg.onnxscript.optimizer.folded_from"


def tidy(model: ir.Model, *, wrapper: str, dims: Mapping[str, Mapping[int, str]]) -> None:
    """Rename nodes, tensors and symbolic dimensions of ``model`` in place and drop its metadata.

    Args:
        model: As torch's exporter made it.
        wrapper: Name of the outermost submodule, which is ours and is left out of names; empty if there is none.
        dims: Input name to axis to the name that its dimension gets.
    """
    _rename_dims(model, dims)
    _rename_initializers(model, wrapper)
    _rename_nodes(model, wrapper)
    _drop_metadata(model)


def _graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function
        yield from function.subgraphs()


def _rename_nodes(model: ir.Model, wrapper: str) -> None:
    taken: set[str] = set()
    kept = {id(value) for graph in _graphs(model) for value in (*graph.inputs, *graph.outputs)}
    for node in model.graph.all_nodes():
        node.name = _unique(f"{module_path(node, wrapper)}/{node.op_type}", taken)
        for index, value in enumerate(node.outputs):
            if value.name and id(value) not in kept:
                value.name = f"{node.name}_output_{index}"


def module_path(node: ir.Node, wrapper: str = "") -> str:
    """Return the path of the torch module that made the node (``/encoder/layer.0/attention/self/query``).

    It is empty where torch's exporter left none in the node's metadata. ``wrapper`` is a module that is left out of it.
    """
    scopes = [s for s in _literal(node.metadata_props.get(_SCOPES)) if s and not s.startswith("_empty_nn_module")]
    path, previous = "", ""
    for scope in scopes[:-1]:  # the last one is the operator, numbered by torch
        if scope != wrapper:
            path += "/" + scope.removeprefix(f"{previous}." if previous else "")
        previous = scope
    return path


def _rename_initializers(model: ir.Model, wrapper: str) -> None:
    graph = model.graph
    values = [value for value in graph.initializers.values() if not value.is_graph_output()]
    outside = {value.name or "" for value in (*graph.inputs, *graph.outputs)} | {
        value.name or "" for node in graph.all_nodes() for value in node.outputs
    }
    wanted: dict[str, str] = {}
    taken = set(outside)
    prefix = f"{wrapper}." if wrapper else ""
    # Parameters keep their names; a folded constant (a transposed weight) takes its parameter's if that is gone.
    for value in sorted(values, key=lambda v: _FOLDED in v.metadata_props):
        assert value.name is not None
        origin = _literal(value.metadata_props.get(_FOLDED))
        base = (origin[0] if len(origin) == 1 else value.name).removeprefix(prefix)
        wanted[value.name] = _unique(base, taken)
    for value in values:  # in two steps, as a new name may be another one's old name
        assert value.name is not None
        del graph.initializers[value.name]
        value.name = wanted[value.name]
    for value in values:
        graph.register_initializer(value)


def _rename_dims(model: ir.Model, dims: Mapping[str, Mapping[int, str]]) -> None:
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in dims.get(value.name or "", {}).items():
            dim = value.shape[axis] if value.shape is not None else None
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value not in names:
                names[dim.value] = name if name not in names.values() else f"{value.name}_{axis}"
    if not names:
        return
    pattern = re.compile("|".join(rf"\b{re.escape(old)}\b" for old in sorted(names, key=len, reverse=True)))

    def new(dim: int | ir.SymbolicDim) -> int | str | None:
        return (
            dim if isinstance(dim, int) else pattern.sub(lambda m: names[m.group()], dim.value) if dim.value else None
        )

    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([new(dim) for dim in value.shape])


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in _graphs(model):
        yield from graph.inputs
        if isinstance(graph, ir.Graph):
            yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _drop_metadata(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.name = "model"
    for graph in _graphs(model):
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.metadata_props.clear()


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _literal(text: str | None) -> list[str]:
    value = ast.literal_eval(text) if text else []
    return [str(item) for item in value]
