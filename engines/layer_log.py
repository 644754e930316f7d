"""Read the compiled layers that TensorRT for RTX prints with a verbose logger and detailed profiling verbosity.

One line a layer::

    Name: …, LayerType: gemm, Inputs: [ { Name: …, Dimensions: [8,128], …, Datatype: Int8, … }, …], Constants: […],
    Outputs: […], TacticName: …, StreamId: 0, Metadata: [ONNX Layer: …][ONNX Layer: …]
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from engines.compiled_layers import CompiledLayer, LayerTensor

_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1f\s]*(?:\[ONNX Layer: |$))")


def parse_layers(messages: Iterable[str]) -> tuple[CompiledLayer, ...]:
    """Return the layers in a builder's log messages, in order; none if it printed none."""
    return tuple(
        layer
        for message in messages
        if "LayerType: " in message
        for line in message.splitlines()
        if (layer := _parse(line))
    )


def _parse(line: str) -> CompiledLayer | None:
    head, marker, rest = line.partition(", LayerType: ")
    if not marker or not head.lstrip().startswith("Name: "):
        return None
    kind, _, rest = rest.partition(", Inputs: [")
    inputs, _, rest = rest.partition(", Outputs: [")
    inputs, _, constants = inputs.partition(", Constants: [")
    outputs, _, rest = _until_tail(rest)
    tactic = re.search(r"TacticName: (.*?)(?:, StreamId|, Metadata|$)", rest)
    metadata = rest.partition("Metadata: ")[2]
    return CompiledLayer(
        name=head.lstrip().removeprefix("Name: "),
        kind=kind,
        tactic=tactic[1] if tactic else "",
        inputs=_tensors(inputs),
        constants=_tensors(constants),
        outputs=_tensors(outputs),
        origins=origins(metadata),
    )


def origins(metadata: str) -> tuple[str, ...]:
    """Return the ONNX nodes in a layer's metadata (``[ONNX Layer: a]…[ONNX Layer: b]``), each once."""
    return tuple(dict.fromkeys(_ORIGIN.findall(metadata)))


def _until_tail(text: str) -> tuple[str, str, str]:
    tail = re.search(r"\], (?:TacticName|StreamId|ParameterType|Metadata)", text)
    return (text[: tail.start()], "]", text[tail.start() + 3 :]) if tail else (text, "", "")


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(name=m["name"], shape=tuple(int(d) for d in m["shape"].split(",") if d), dtype=m["dtype"])
        for m in _TENSOR.finditer(text)
    )
