"""ONNX Runtime on the CPU: the one place that makes a session, so that threads, logging and errors are the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort

from pipeline.errors import EngineError

SLOW_FUSIONS = ["SkipLayerNormFusion"]
"""Add + LayerNormalization in one kernel takes 3-4 x the time of the two on CPUs (6-12 % of MiniLM's whole time). Variants
for ``cpu`` are written so that it does not happen when they are served; here FP32 gets the same."""


class Session(Protocol):
    """What is used of an ONNX Runtime session; :class:`pipeline.running.segments.SegmentedSession` has it too."""

    def run(self, outputs: Any, feeds: Any, /) -> Any:
        """Return some outputs (all if ``None``) of one batch."""
        ...

    def get_inputs(self) -> Any:
        """Return the inputs: ``name``, ``type`` such as ``tensor(float)``, ``shape``."""
        ...

    def get_outputs(self) -> Any:
        """Return the outputs likewise."""
        ...


def session(
    model: Path | bytes,
    *,
    threads: int = 0,
    optimize: bool = True,
    folder: Path | None = None,
    made_from: Path | None = None,
    save_optimized: Path | None = None,
    profile: Path | None = None,
    spin: bool = False,
    prepack: bool = True,
) -> ort.InferenceSession:
    """Return an ONNX Runtime session on the CPU provider.

    Args:
        model: A file, or a serialized model.
        folder: Where the external data of a serialized model is.
        made_from: The file that a serialized model was made from, for errors.
        threads: Intra-op threads; 0 lets ONNX Runtime choose (one per core).
        optimize: ``False`` runs every node as it stands in the graph (Q/DQ groups are not fused).
        save_optimized: Where to write the graph after ONNX Runtime's own optimizations, to see what it fused.
        profile: Prefix of the profile that ONNX Runtime writes; ``end_profiling()`` of the session gives its name.
        spin: Threads that wait for the next operator keep a core busy, as ONNX Runtime does when it serves. It shortens
            a request by little and costs a fifth more CPU time, so only what measures latency asks for it.
        prepack: Copy weights into the layout that kernels like best; ``False`` leaves them mapped from their file.

    Raises:
        EngineError: ONNX Runtime refuses the model; its message is kept.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimize else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # it keeps the most that was ever needed, in powers of two
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
        # Without a file for the weights a large model would not fit into one protobuf.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{save_optimized.name}.data"
        )
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        source = model if isinstance(model, bytes) else str(model)
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
        )
    except Exception as error:  # ONNX Runtime's exception classes share no public base
        file = model if isinstance(model, Path) else made_from
        where = str(file) if file else f"the model in {folder}" if folder else "a model in memory"
        said = _short(error)
        raise EngineError(f"ONNX Runtime cannot load the model: {said}", where=where, fix=_remedy(said)) from error


def run(live: Session, outputs: list[str] | None, feeds: dict[str, Any]) -> list[Any]:
    """Run a session, with ONNX Runtime's failure as an :class:`EngineError`."""
    try:
        return live.run(outputs, feeds)  # type: ignore[no-any-return]
    except EngineError:
        raise
    except Exception as error:  # see above
        raise failed(error) from error


def failed(error: BaseException) -> EngineError:
    """Return the error for what ONNX Runtime raised while it ran a model."""
    return EngineError(
        f"ONNX Runtime failed while running the model: {_short(error)}",
        fix="Check that the data fits the model's inputs.",
    )


_NOISE = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : "  # the code and its name
    r"|Load model from .*? failed: ?"
    r"|\S*onnxruntime/\S+\.(?:cc|h):\d+ .*?\)(?: const)? (?=\S)"  # file, line and the C++ signature
)


def _short(error: BaseException) -> str:
    """Return ONNX Runtime's message without what only its developers can use."""
    return _NOISE.sub("", " ".join(str(error).split()))[:500]


def _remedy(said: str) -> str:
    """Return what to do about a model that does not load."""
    if "model IR version" in said or ("pset" in said and "under development" in said):
        return f"Export the model with an older opset, or install an onnxruntime newer than {ort.__version__}."
    if "Could not find an implementation" in said or "kernel is not supported" in said or "not a registered" in said:
        return "ONNX Runtime's CPU provider lacks this operator for these types: export the model without it."
    return "Run `onnx.checker.check_model` on the model and look at the node or operator that the message names."
