"""What became of one target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.compiled_layers import CompiledLayers
from engines.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A compile check.

    Attributes:
        layers: The variant's compiled layers.
        fp16: Those of the same model in FP16, for comparison; ``None`` where the variant is not quantized.
        proxy_for: ``SM90`` where the check compiled for the nearest GPU instead; ``None`` if it was the target's own.
    """

    layers: CompiledLayers
    fp16: CompiledLayers | None
    proxy_for: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What became of one target.

    Attributes:
        target: The device.
        family: The variant it is made from.
        status: ``built``, ``compile_checked``, ``skipped`` or ``failed``.
        reason: Why there is no engine; ``None`` if there is one.
        path: The ONNX that runs here as the engine, or that stands in for it in simulation.
        file: The built engine; ``None`` if there is none.
        seconds: Time to build or check it.
        check: What a compile check found.
    """

    target: Target
    family: str
    status: str
    reason: str | None
    path: Path
    file: Path | None = None
    seconds: float | None = None
    check: Check | None = None

    @property
    def runs_here(self) -> bool:
        """Whether this process can run the engine itself: ONNX Runtime's, whose engine is an ONNX file."""
        return self.file is not None and self.target.runtime == "onnxruntime"
