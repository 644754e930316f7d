"""How TensorRT builds engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pipeline.recipe.section import Section, listed


class ProfileShapes(Section):
    """The shapes that one input of an engine may have."""

    min: tuple[int, ...]
    """Smallest shape."""
    opt: tuple[int, ...]
    """The shape that kernels are chosen for."""
    max: tuple[int, ...]
    """Largest shape."""


class BuilderConfig(Section):
    """How TensorRT builds engines; a key that the installed version lacks is an error (versions: docs/tensorrt.md)."""

    profiles: tuple[dict[str, ProfileShapes], ...] = ()
    """Optimization profiles: ``{input: {min: [1, 1], opt: [8, 128], max: [32, 512]}}``; derived from the data's shapes and ``triton.max_batch_size`` if not given."""
    workspace_mb: int | None = Field(default=None, ge=1)
    """Scratch memory that kernels may use, MiB; all of the GPU's if not given."""
    tactic_dram_mb: int | None = Field(default=None, ge=1)
    """Memory that trying out kernels may use, MiB."""
    tactic_shared_memory_kb: int | None = Field(default=None, ge=1)
    """Shared memory that a block of a kernel may use, KiB."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    """0 builds fast, 5 looks longest for a fast engine; TensorRT's own default is 3."""
    timing_cache: Path | None = None
    """File of measured kernels: read, added to and written back; its hash is in the engine's manifest."""
    hardware_compatibility: Literal["ampere_plus", "same_compute_capability"] | None = None
    """GPUs that the engine also runs on."""
    version_compatible: bool = False
    """The engine also runs in later versions of TensorRT."""
    refit: bool = False
    """Weights can be replaced after the build."""
    strip_plan: bool = False
    """Leave out of the engine what refitting puts back."""
    weight_streaming: bool = False
    """Weights may stay in host memory and be streamed."""
    sparsity: bool = False
    """Use 2:4 sparse kernels where weights are sparse."""
    tactic_sources: (
        tuple[Literal["cublas", "cublas_lt", "cudnn", "edge_mask_convolutions", "jit_convolutions"], ...] | None
    ) = None
    """Libraries that kernels may come from; TensorRT's choice if not given."""
    tiling: Literal["none", "fast", "moderate", "full"] | None = None
    """How hard to look for tilings across layers."""
    max_aux_streams: int | None = Field(default=None, ge=0)
    """Streams beside the main one."""
    profiling_verbosity: Literal["none", "layer_names_only", "detailed"] = "detailed"
    """What an engine tells about its layers; compiled layers need ``detailed``."""
    plugin_libraries: Annotated[tuple[Path, ...], BeforeValidator(listed)] = ()
    """Shared libraries with plugins. Loading one runs its code."""
    tf32: bool = True
    """FP32 matrix products may round their inputs to TF32, as TensorRT does by default."""
    quantization: Literal["explicit", "implicit"] = "explicit"
    """``implicit`` gives TensorRT 10 the float graph, its precision flags and our ranges; TensorRT 11 has no such thing."""
    calibrator: Literal["entropy", "minmax"] = "entropy"
    """TensorRT 10's calibrator class for ``implicit``."""
