"""What torch's long messages mean, in a sentence that names the input, the line or the operator."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pipeline.errors import SourceError


def untraceable(error: BaseException, inputs: Sequence[str], where: str) -> SourceError:
    """Return why ``torch.export`` failed.

    Args:
        error: What it raised.
        inputs: Names of the inputs, in order.
        where: The source.
    """
    text = str(error)
    constant = re.search(
        r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\] as dynamic but your code .*constant \((\d+)\)", text
    )
    if constant:
        name, axis, size = inputs[int(constant.group(1))], constant.group(2), constant.group(3)
        return SourceError(
            f"The model works only with {size} elements on axis {axis} of input {name!r}, which should be dynamic.",
            where=where,
            fix="Make its code independent of that size, or leave the axis out of dynamic_shapes, the factory's "
            "third result ({} keeps every size fixed).",
        )
    if "data-dependent" in text:
        line = re.search(r'The following call raised this error:\s+File "([^"]+)", line (\d+)', text)
        return SourceError(
            "The model's Python code decides by a tensor's value, which a graph cannot.",
            where=f"{where} ({line.group(1)}:{line.group(2)})" if line else where,
            fix="Use torch.where, or torch.cond to keep both branches in the graph.",
        )
    return SourceError(
        f"torch cannot trace the model: {first_line(error)}",
        where=where,
        fix="Call torch.export.export on it to see more, or export it to .onnx yourself and give that file.",
    )


def untranslatable(error: BaseException, where: str) -> SourceError:
    """Return why a traced program could not be written as ONNX."""
    text = "\n".join(str(cause) for cause in _chain(error))
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if operator:
        return SourceError(
            f"The operator {operator.group(1)} has no ONNX form.",
            where=where,
            fix="Write it with standard torch operators, or export to .onnx yourself with a translation for it.",
        )
    return SourceError(
        f"torch cannot write the model as ONNX: {first_line(list(_chain(error))[-1])}",
        where=where,
        fix="Export it to .onnx yourself and give that file.",
    )


def first_line(error: BaseException) -> str:
    """Return the first line of a message that has any text, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:400] if lines else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
