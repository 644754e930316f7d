"""What TensorRT for RTX says of a graph: one child process is asked many times, so that a crash cannot end the run."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from engines.compile_check import CHECKABLE
from engines.compiled_layers import CompiledLayers
from engines.layer_log import parse_layers

Outcome = Literal["accepted", "parser", "builder", "crash"]
PATIENCE_SECONDS = 120
WARNING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a graph.

    Attributes:
        outcome: ``accepted``, or who refused it.
        message: What the one who refused said.
        warnings: What was logged as a warning or worse.
        layers: The compiled layers of an accepted graph.
    """

    outcome: Outcome
    message: str = ""
    warnings: tuple[str, ...] = ()
    layers: CompiledLayers | None = None

    @property
    def refused(self) -> bool:
        return self.outcome != "accepted"

    @property
    def compiled(self) -> CompiledLayers:
        assert self.layers is not None, f"{self.outcome}: {self.message}"
        return self.layers


class Oracle:
    """A live child process; a context manager."""

    def __init__(self) -> None:
        self._child: Any = None
        self._line: Connection | None = None

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def ask(self, model: bytes, capability: tuple[int, int]) -> Verdict:
        """Parse and build a serialized model of static shapes for one of ``CHECKABLE``."""
        if self._child is None:
            self._start()
        assert self._line is not None
        self._line.send((model, CHECKABLE[capability]))
        try:
            answer = self._line.recv() if self._line.poll(PATIENCE_SECONDS) else None
        except (EOFError, ConnectionResetError):
            answer = None
        if answer is None:
            self._stop()
            return Verdict(outcome="crash")
        assert isinstance(answer, Verdict)
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._child.start()
        theirs.close()

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._child = self._line = None


def _serve(line: Connection) -> None:
    import tensorrt_rtx as trt

    messages: list[tuple[int, str]] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.append((int(severity), message))

    log = Log()
    while True:
        model, capability = line.recv()
        messages.clear()
        answer = _compile(trt, log, messages, model, capability)
        line.send(answer)
        if answer.outcome == "builder":
            # After a build that was refused, the next one in the same process is judged for the refused one's GPU.
            _compile(trt, log, messages, _nothing(), capability)


def _compile(trt: Any, log: Any, messages: list[tuple[int, str]], model: bytes, capability: str) -> Verdict:
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return Verdict(outcome="parser", message="; ".join(e.desc() for e in errors)[:500], warnings=_said(messages))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        failed = [text for severity, text in messages if severity < WARNING]
        return Verdict(outcome="builder", message="; ".join(failed)[-500:], warnings=_said(messages))
    layers = CompiledLayers(
        builder=f"tensorrt-rtx {trt.__version__}",
        compute_capability=capability,
        engine_bytes=engine.nbytes,
        layers=parse_layers(text for _, text in messages),
    )
    return Verdict(outcome="accepted", warnings=_said(messages), layers=layers)


def _said(messages: list[tuple[int, str]]) -> tuple[str, ...]:
    return tuple(text for severity, text in messages if severity <= WARNING)


def _nothing() -> bytes:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "nothing", ends[:1], ends[1:])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
