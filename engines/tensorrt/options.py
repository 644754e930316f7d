"""What a user can ask of the builder, as one typed object, and which versions of TensorRT have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from engines.tensorrt.flavour import Flavour, release
from engines.tensorrt.profiles import Profile, ShapeRange
from pipeline.errors import RecipeError
from pipeline.types import CalibrationData, Precision

HardwareCompatibility = Literal["ampere_plus", "same_compute_capability"]
TacticSource = Literal["cublas", "cublas_lt", "cudnn", "edge_mask_convolutions", "jit_convolutions"]
Tiling = Literal["none", "fast", "moderate", "full"]
Verbosity = Literal["none", "layer_names_only", "detailed"]
Quantization = Literal["explicit", "implicit"]
ImplicitCalibrator = Literal["entropy", "minmax"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderOptions:
    """How engines are built. The defaults are TensorRT's own, except that compiled layers are kept in detail.

    Attributes:
        profiles: Optimization profiles; empty derives one from the inputs and the largest batch.
        workspace_mb: Scratch memory that kernels may use, MiB; ``None`` is all of the GPU's.
        tactic_dram_mb: Memory that trying out tactics may use, MiB.
        tactic_shared_memory_kb: Shared memory per block that tactics may use, KiB.
        optimization_level: 0 (fast build) to 5 (fast engine).
        timing_cache: File of measured tactics: read, added to and written back.
        hardware_compatibility: GPUs that the engine also runs on.
        version_compatible: The engine also runs in later versions of TensorRT.
        refit: Weights can be replaced later.
        strip_plan: Leave weights that refitting can put back out of the engine.
        weight_streaming: Weights may stay on the host and be streamed.
        sparsity: Use 2:4 sparse weights where they are sparse.
        tactic_sources: Libraries that tactics may come from; ``None`` is TensorRT's choice.
        tiling: How hard to look for tilings across layers.
        max_aux_streams: Streams beside the main one; 0 is none.
        profiling_verbosity: What an engine tells about its layers.
        plugin_libraries: Shared libraries with plugins. Loading one runs its code.
        tf32: FP32 matrix products may round their inputs to TF32, as TensorRT does by default.
        quantization: ``implicit`` lets TensorRT 10 choose precisions from ranges (no Q/DQ in the graph).
        calibrator: The class of calibrator for ``implicit``.
    """

    profiles: tuple[Profile, ...] = ()
    workspace_mb: int | None = None
    tactic_dram_mb: int | None = None
    tactic_shared_memory_kb: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: HardwareCompatibility | None = None
    version_compatible: bool = False
    refit: bool = False
    strip_plan: bool = False
    weight_streaming: bool = False
    sparsity: bool = False
    tactic_sources: tuple[TacticSource, ...] | None = None
    tiling: Tiling | None = None
    max_aux_streams: int | None = None
    profiling_verbosity: Verbosity = "detailed"
    plugin_libraries: tuple[Path, ...] = ()
    tf32: bool = True
    quantization: Quantization = "explicit"
    calibrator: ImplicitCalibrator = "entropy"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BuilderOptions:
        """Return the options of a recipe's ``builder`` section; keys are the attributes' names."""
        given = dict(values)
        given["profiles"] = tuple(
            {name: _shape_range(shapes) for name, shapes in profile.items()} for profile in given.get("profiles") or ()
        )
        given["plugin_libraries"] = tuple(Path(p) for p in given.get("plugin_libraries") or ())
        if given.get("timing_cache") is not None:
            given["timing_cache"] = Path(given["timing_cache"])
        if given.get("tactic_sources") is not None:
            given["tactic_sources"] = tuple(given["tactic_sources"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON, for a manifest and for a stage's key."""
        raw = asdict(self)
        raw["timing_cache"] = None if self.timing_cache is None else str(self.timing_cache)
        raw["plugin_libraries"] = [str(path) for path in self.plugin_libraries]
        return raw

    def asked(self) -> dict[str, Any]:
        """Return the keys that differ from their default."""
        plain = BuilderOptions()
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != getattr(plain, f.name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Implicit:
    """What an implicitly quantized build needs: a graph without Q/DQ, and ranges or data.

    Attributes:
        precisions: What layers may compute in besides FP32.
        scales: Tensor to scale (amax / 127): our ranges. They win over ``data``.
        data: Batches that TensorRT calibrates on.
    """

    precisions: frozenset[Precision]
    scales: Mapping[str, float] | None = None
    data: CalibrationData | None = None


def _shape_range(shapes: Mapping[str, Any]) -> ShapeRange:
    return ShapeRange(**{end: tuple(int(d) for d in shapes[end]) for end in ("min", "opt", "max")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Since:
    """Which versions have something.

    Attributes:
        first: First TensorRT (major, minor).
        last: Last TensorRT that has it; ``None`` if the newest known still does.
        rtx: Whether TensorRT for RTX has it.
        api: What it is in TensorRT's Python API.
    """

    first: tuple[int, int] = (10, 0)
    last: tuple[int, int] | None = None
    rtx: bool = True
    api: str = ""

    def has(self, flavour: Flavour, version: tuple[int, int]) -> bool:
        """Return whether a version has it."""
        if flavour is Flavour.RTX:
            return self.rtx
        return self.first <= version and (self.last is None or version <= self.last)

    def __str__(self) -> str:
        first, last = (".".join(map(str, v)) if v else "" for v in (self.first, self.last))
        span = f"TensorRT {first} to {last}" if last else f"TensorRT {first} and newer"
        return f"{span} and TensorRT for RTX" if self.rtx else span


_LAST_WEAK = (10, 16)
"""Last TensorRT with implicit quantization and weakly typed networks."""

KEYS: dict[str, Since] = {
    "profiles": Since(api="IBuilderConfig.add_optimization_profile"),
    "workspace_mb": Since(api="MemoryPoolType.WORKSPACE"),
    "tactic_dram_mb": Since(api="MemoryPoolType.TACTIC_DRAM"),
    "tactic_shared_memory_kb": Since(api="MemoryPoolType.TACTIC_SHARED_MEMORY"),
    "optimization_level": Since(api="IBuilderConfig.builder_optimization_level"),
    # RTX tunes nothing by timing while it builds; its timing-cache calls are deprecated and do nothing.
    "timing_cache": Since(api="IBuilderConfig.set_timing_cache", rtx=False),
    # An RTX engine names its compute capabilities instead.
    "hardware_compatibility": Since(api="IBuilderConfig.hardware_compatibility_level", rtx=False),
    # RTX 1.7 looks for a lean runtime that its packages do not have.
    "version_compatible": Since(api="BuilderFlag.VERSION_COMPATIBLE", rtx=False),
    "refit": Since(api="BuilderFlag.REFIT"),
    "strip_plan": Since(api="BuilderFlag.STRIP_PLAN"),
    "weight_streaming": Since(api="BuilderFlag.WEIGHT_STREAMING"),
    "sparsity": Since(api="BuilderFlag.SPARSE_WEIGHTS"),
    "tactic_sources": Since(api="IBuilderConfig.set_tactic_sources"),
    "tiling": Since(api="IBuilderConfig.tiling_optimization_level", first=(10, 8)),
    "max_aux_streams": Since(api="IBuilderConfig.max_aux_streams"),
    "profiling_verbosity": Since(api="IBuilderConfig.profiling_verbosity"),
    "plugin_libraries": Since(api="Builder.get_plugin_registry"),
    "tf32": Since(api="BuilderFlag.TF32", rtx=False),
}
"""Each key's versions, as the bindings of every release from 10.0 to 11.4 and of TensorRT for RTX 1.7 have them."""

VALUES: dict[tuple[str, str], Since] = {
    ("hardware_compatibility", "ampere_plus"): Since(api="HardwareCompatibilityLevel.AMPERE_PLUS", rtx=False),
    ("hardware_compatibility", "same_compute_capability"): Since(
        api="HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", first=(10, 9), rtx=False
    ),
    ("tactic_sources", "cublas"): Since(api="TacticSource.CUBLAS", last=_LAST_WEAK, rtx=False),
    ("tactic_sources", "cublas_lt"): Since(api="TacticSource.CUBLAS_LT", last=_LAST_WEAK, rtx=False),
    ("tactic_sources", "cudnn"): Since(api="TacticSource.CUDNN", last=_LAST_WEAK, rtx=False),
    ("tactic_sources", "edge_mask_convolutions"): Since(api="TacticSource.EDGE_MASK_CONVOLUTIONS"),
    ("tactic_sources", "jit_convolutions"): Since(api="TacticSource.JIT_CONVOLUTIONS"),
    ("quantization", "implicit"): Since(api="BuilderFlag.INT8", last=_LAST_WEAK, rtx=False),
    ("calibrator", "entropy"): Since(api="IInt8EntropyCalibrator2", last=_LAST_WEAK, rtx=False),
    ("calibrator", "minmax"): Since(api="IInt8MinMaxCalibrator", last=_LAST_WEAK, rtx=False),
}
"""Values that have versions of their own."""

_REPLACED = {
    "implicit": "TensorRT 11 takes precisions from the graph alone: leave the key out, and the Q/DQ pairs and casts that "
    "`python -m pipeline quantize` writes say the same (a calibration cache goes in as calibration.cache).",
}


def check_options(options: BuilderOptions, flavour: Flavour, version: str) -> None:
    """Refuse what the installed version lacks.

    Args:
        options: What is asked for.
        flavour: Which TensorRT.
        version: Its version, such as ``10.13.3.9``.

    Raises:
        RecipeError: Names the key, the versions that have it, and what replaced it.
    """
    here = release(version)
    for key, value in options.asked().items():
        needs = KEYS.get(key)
        if needs is not None and not needs.has(flavour, here):
            raise _lacking(f"builder.{key}", needs, flavour, version, fix=f"Leave {key} out, or build with {needs}.")
        for item in value if isinstance(value, tuple) else (value,):
            found = VALUES.get((key, item)) if isinstance(item, str) else None
            if found is not None and not found.has(flavour, here):
                fix = _REPLACED.get(item, f"Leave {item} out, or build with {found}.")
                raise _lacking(f"builder.{key}: {item}", found, flavour, version, fix=fix)


def _lacking(what: str, needs: Since, flavour: Flavour, version: str, *, fix: str) -> RecipeError:
    return RecipeError(
        f"{flavour.label} {version} has no `{what}` ({needs.api}); it is in {needs}.", where=what.split(":")[0], fix=fix
    )
