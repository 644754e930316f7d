"""What a parser or builder says when it refuses a graph, and the ONNX node that it means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import EngineError

if TYPE_CHECKING:
    import tensorrt as trt

WARNING = 2
"""Severities below are errors (``ILogger.Severity``: 0 internal error, 1 error, 2 warning, 3 info, 4 verbose)."""

_NODE = (
    # Ours, from the parser's own fields.
    re.compile(r"\bnode (?P<name>[^;]+?) \([\w.]*\):"),
    re.compile(r"[Cc]annot compile operation '(?P<name>[^']+)'"),
    # The builder's: what its layers came from, and the layer that it could not make.
    re.compile(r"\[ONNX Layer: (?P<name>[^\]]+)\]"),
    re.compile(
        r"(?:[Nn]o|any) implementation for node \{?(?:ForeignNode\[)?(?P<name>[^\s\]}.]+?)(?:\.\.\.|[\s\]}.]|$)"
    ),
    re.compile(r"operation (?P<name>\S+?)(?:_myl\d+_\d+)? (?:cannot|could not|failed)"),
    re.compile(r"\b(?:IBuilder|INetwork)\w*::\w+: Error Code \d+: [\w ]+ \((?P<name>/[^:\s()]+): "),
    re.compile(r"^(?P<name>/[^:\s]+): "),
)


def refused_node(error: EngineError) -> str | None:
    """Return the ONNX node that the builder refused; ``None`` where its message names none.

    Args:
        error: What :func:`engines.compile_check.compile_check` or :func:`engines.tensorrt.build.build_engine` raised.
    """
    for pattern in _NODE:
        found = pattern.search(error.what)
        if found and found["name"] != "?":
            return found["name"].split(" + ")[0]
    return None


def parser_errors(parser: trt.OnnxParser) -> list[str]:
    """Return what the ONNX parser objects to, each with the node's name and operator."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"node {e.node_name() or '?'} ({e.node_operator()}): {e.desc()}" for e in errors]


def builder_errors(messages: Iterable[tuple[int, str]]) -> list[str]:
    """Return the last two messages that say why a build failed."""
    return [message for severity, message in messages if severity < WARNING][-2:]


def refused(who: str, onnx: str, device: str, reasons: Sequence[str]) -> EngineError:
    """Return the error for a graph that was refused.

    Args:
        who: Who refused it: ``TensorRT for RTX's parser``.
        onnx: The graph.
        device: For which GPU (``SM80``).
        reasons: What it said; whitespace is folded, and each is cut after 300 characters.
    """
    text = "; ".join(" ".join(r.split())[:300] for r in reasons) or "it gives no reason"
    return EngineError(
        f"{who} refuses the graph for {device}: {text}",
        where=onnx,
        fix="Keep the node in high precision with a rule, or report the graph.",
    )
