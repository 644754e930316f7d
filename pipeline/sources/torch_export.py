"""torch modules and exported programs to ONNX. The only module that imports torch."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from pipeline.errors import SourceError
from pipeline.notices import notice
from pipeline.sources import sizes, structure, torch_errors
from pipeline.types import Array, Feeds

_WRAPPER = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """How to call a module.

    Attributes:
        args: Positional arguments; tensors or numpy arrays, nested in dicts, lists and tuples, and constants.
        kwargs: Keyword arguments, likewise.
        dims: Flat input name to axis to the name of a dynamic dimension (or a ``torch.export.Dim``); ``None`` makes
            axis 0 of all inputs that share the first one's size the batch.
        outputs: Keys of the result to export; empty for all.
        others: More sets of inputs, of other sizes; one is made from the first if none is given.
        call: Calls the module with ``args`` and ``kwargs``, where that is not done plainly.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dims: Any = None
    outputs: tuple[str, ...] = ()
    others: tuple[Feeds, ...] = ()
    call: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A program and what it must compute.

    Attributes:
        program: What torch recorded.
        dims: Input name to axis to the name of its dynamic dimension.
        cases: Inputs and torch's outputs for them; the first is the sample.
        wrapper: Name of our module around the user's, left out of names; empty if there is none.
    """

    program: torch.export.ExportedProgram
    dims: dict[str, dict[int, str]]
    cases: tuple[tuple[Feeds, dict[str, Array]], ...]
    wrapper: str = ""


class _Flat(torch.nn.Module):
    """A module that takes and returns tensors only, in the order of their names."""

    def __init__(self, model: torch.nn.Module, example: Example) -> None:
        super().__init__()
        self.model = model
        self._template = (example.args, dict(example.kwargs))
        self._outputs = example.outputs
        self._call = example.call or (lambda module, *args, **kwargs: module(*args, **kwargs))
        self.names: list[str] = []

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = iter(tensors)
        args, kwargs = structure.rebuild(self._template, lambda leaf: next(left) if _is_tensor(leaf) else leaf)
        result = self._call(self.model, *args, **kwargs)
        if self._outputs:
            result = {key: result[key] for key in self._outputs}
        named = _tensors(result)
        self.names = list(named)
        seen: set[int] = {id(tensor) for tensor in tensors}
        flat = []
        for tensor in named.values():  # an ONNX output has one name, so a tensor that has one already is copied
            flat.append(tensor.clone() if id(tensor) in seen else tensor)
            seen.add(id(tensor))
        return tuple(flat)


def is_module(value: Any) -> bool:
    """Return whether ``value`` is a torch module."""
    return isinstance(value, torch.nn.Module)


def trace(
    model: torch.nn.Module,
    example: Example,
    *,
    where: str,
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Traced:
    """Record what ``model`` does with ``example``, in float32 and evaluation mode.

    Args:
        model: The model; it is changed to float32 and evaluation mode.
        example: How to call it.
        where: The source, for errors.
        around: Entered while recording but not while computing the reference outputs.

    Raises:
        SourceError: The model fails on its example, is random, or cannot be traced.
    """
    model.eval().float()
    names = _input_names(model, example)
    leaves = [leaf for _, leaf in structure.flatten((example.args, dict(example.kwargs))) if _is_tensor(leaf)]
    sample = {name: _array(leaf) for name, leaf in zip(names, leaves, strict=True)}
    dims = sizes.default_dims(sample) if example.dims is None else sizes.parse(example.dims, sample, where)
    sample = sizes.at_least_two(sample, dims)
    flat = _Flat(model, example)
    others = example.others or (sizes.others(sample, dims),)
    cases = _references(
        lambda feeds: _named(flat, flat(*map(_tensor, feeds.values())), names), (sample, *others), where
    )
    shapes = (
        tuple(
            {axis: torch.export.Dim.DYNAMIC if isinstance(d, str) else d for axis, d in dims.get(n, {}).items()} or None
            for n in names
        ),
    )
    with _quiet(), torch.no_grad(), around():
        try:
            program = torch.export.export(flat, tuple(map(_tensor, sample.values())), dynamic_shapes=shapes)
        except Exception as error:  # tracing runs the model's own code, which can raise anything
            raise torch_errors.untraceable(error, list(sample), where) from error
    labels = {name: {axis: sizes.label(d, name, axis) for axis, d in axes.items()} for name, axes in dims.items()}
    return Traced(program=program, dims=labels, cases=cases, wrapper=_WRAPPER)


def read_program(path: Path) -> Traced:
    """Return the program in a ``.pt2`` file, with its own example inputs. This can run code that is in the file.

    Raises:
        SourceError: The file is no ``.pt2``, has no example inputs, or is not in float32.
    """
    where = str(path)
    try:
        with _quiet():
            program = torch.export.load(path)
    except Exception as error:  # unpickling can raise anything
        raise SourceError(
            f"torch cannot load the file: {torch_errors.first_line(error)}",
            where=where,
            fix="Write it with torch.export.save, with the torch version that is installed here.",
        ) from error
    if program.example_inputs is None:
        raise SourceError("The program has no example inputs.", where=where, fix="Write it with torch.export.save.")
    half = {str(t.dtype) for t in program.state_dict.values() if t.dtype in (torch.float16, torch.bfloat16)}
    if half:
        raise SourceError(
            f"The program computes in {', '.join(sorted(half))}; the export must be float32.",
            where=where,
            fix="Call .float() on the model before torch.export.export.",
        )
    names = [str(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    leaves = [leaf for _, leaf in structure.flatten(program.example_inputs) if _is_tensor(leaf)]
    sample = {name: _array(leaf) for name, leaf in zip(names, leaves, strict=True)}
    dims, others = _program_dims(program, names)
    module = program.module(check_guards=False)

    def call(feeds: Feeds) -> dict[str, Array]:
        left = iter([_tensor(feeds[name]) for name in names])
        args, kwargs = structure.rebuild(program.example_inputs, lambda leaf: next(left) if _is_tensor(leaf) else leaf)
        named = _tensors(module(*args, **kwargs))
        return {name: _array(t) for name, t in zip(_distinct(named, names), named.values(), strict=True)}

    second = {n: sizes.resize(a, {axis: others[d] for axis, d in dims.get(n, {}).items()}) for n, a in sample.items()}
    return Traced(program=program, dims=dims, cases=_references(call, (sample, second), where))


def translate(traced: Traced, *, opset: int, where: str) -> ir.Model:
    """Return the ONNX graph of a traced program.

    Raises:
        SourceError: An operator has no ONNX form, or an output would be lost.
    """
    sample, outputs = traced.cases[0]
    with _quiet():
        try:
            exported = torch.onnx.export(
                traced.program,
                opset_version=opset,
                dynamo=True,
                optimize=True,
                verbose=False,
                input_names=list(sample),
                output_names=list(outputs),
            )
        except Exception as error:  # the exporter's exception classes are private
            raise torch_errors.untranslatable(error, where) from error
    assert exported is not None
    assert exported.exported_program is not None
    _say_state(exported.exported_program, where)
    found = [value.name for value in exported.model.graph.outputs]
    if found != list(outputs):
        raise SourceError(
            f"The exported graph has the outputs {found} where the model has {list(outputs)}.",
            where=where,
            fix="Return tensors that depend on the inputs, each once.",
        )
    written = exported.model.opset_imports.get("")
    if written != opset:
        raise SourceError(
            f"torch wrote opset {written} where {opset} was asked for.",
            where=where,
            fix="Ask for an opset that this torch version writes (source.opset).",
        )
    return exported.model


def _say_state(program: torch.export.ExportedProgram, where: str) -> None:
    changed = sorted(name.removeprefix(f"{_WRAPPER}.") for name in program.graph_signature.buffers_to_mutate.values())
    if changed:
        notice(
            "stateful-model",
            f"The model changes its buffers while running ({', '.join(changed[:3])}); the exported graph does not.",
            where=where,
        )


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor | np.ndarray)


def _tensor(value: Any) -> torch.Tensor:
    """Return a copy, so that a model which writes into its inputs does not change ours; floats as float32."""
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _array(value: Any) -> Array:
    array: Array = _tensor(value).detach().cpu().numpy()
    return array


def _input_names(model: torch.nn.Module, example: Example) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named: list[tuple[str, Any]] = []
    for index, arg in enumerate(example.args):
        named += structure.flatten(arg, positional[index] if index < len(positional) else f"input_{index}")
    named += structure.flatten(dict(example.kwargs))
    return _distinct([name for name, leaf in named if _is_tensor(leaf)], [])


def _tensors(result: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a result by name; ``None`` is left out, anything else that is no tensor is refused."""
    leaves = [(n, leaf) for n, leaf in structure.flatten(result, "" if isinstance(result, dict) else "output")]
    for name, leaf in leaves:
        if leaf is not None and not isinstance(leaf, torch.Tensor):
            raise SourceError(
                f"The model's output {name!r} is a {type(leaf).__name__} and not a tensor.",
                fix="Return tensors, in dicts, lists or tuples.",
            )
    found = {name: leaf for name, leaf in leaves if leaf is not None}
    if not found:
        raise SourceError("The model returns no tensor.", fix="Return tensors, in dicts, lists or tuples.")
    return found


def _named(flat: _Flat, result: Sequence[torch.Tensor], inputs: list[str]) -> dict[str, Array]:
    return {name: _array(tensor) for name, tensor in zip(_distinct(flat.names, inputs), result, strict=True)}


def _distinct(names: Any, taken: list[str]) -> list[str]:
    made: list[str] = []
    for name in names:
        candidate, count = name, 0
        while candidate in made or candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        made.append(candidate)
    return made


def _references(
    call: Callable[[Feeds], dict[str, Array]], feeds: Sequence[Feeds], where: str
) -> tuple[tuple[Feeds, dict[str, Array]], ...]:
    """Return each feed with torch's outputs for it; the first is computed twice, to find randomness."""
    made = []
    with _quiet(), torch.no_grad():
        for feed in (feeds[0], *feeds):
            try:
                made.append((feed, call(feed)))
            except SourceError as error:
                raise SourceError(error.what, where=where, fix=error.fix) from error
            except Exception as error:  # the model's own code
                sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in feed.items())
                raise SourceError(
                    f"The model fails on its example inputs ({sizes}): {type(error).__name__}: {torch_errors.first_line(error)}",
                    where=where,
                    fix="If it takes only one size, name the dynamic dimensions as the factory's third result; "
                    "{} means none.",
                ) from error
    for name, value in made[0][1].items():
        if value.size and value.dtype.kind == "f" and not np.isfinite(value).any():
            raise SourceError(
                f"The model's output {name!r} holds no finite number on its example inputs.",
                where=where,
                fix="Look for NaN or infinity in the weights and the example inputs.",
            )
        if not np.array_equal(value, made[1][1][name], equal_nan=value.dtype.kind == "f"):
            raise SourceError(
                f"The model gives another {name!r} each time it runs, so no export of it can be checked.",
                where=where,
                fix="Turn off dropout and other randomness, and keep no state from one call to the next.",
            )
    return tuple(made[1:])


def _program_dims(
    program: torch.export.ExportedProgram, names: list[str]
) -> tuple[dict[str, dict[int, str]], dict[str, int]]:
    """Return the dynamic dimensions of a program's inputs, named, and for each name a size other than the example's."""
    dims: dict[str, dict[int, str]] = {}
    others: dict[str, int] = {}
    symbols: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in names:
            continue
        for axis, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt):
                continue
            symbol = size.node.expr
            name = symbols.setdefault(str(symbol), "batch" if axis == 0 and not symbols else f"{node.name}_{axis}")
            dims.setdefault(node.name, {})[axis] = name
            bounds = program.range_constraints.get(symbol)
            low, high = (int(bounds.lower), bounds.upper) if bounds is not None else (2, 3)
            hint = int(size.node.hint)
            others[name] = hint + 1 if hint + 1 <= high else max(hint - 1, low)
    return dims, others


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's prints, warnings and log lines away from the user; what matters is checked and said by us."""
    torch_log = logging.getLogger("torch")
    levels = {log: log.level for log in (torch_log, logging.getLogger("onnxscript"), logging.getLogger("onnx_ir"))}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for log in levels:
            log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for log, level in levels.items():
                log.setLevel(level)
