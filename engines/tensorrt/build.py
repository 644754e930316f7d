"""Build an engine for a target: with TensorRT on that GPU, or with TensorRT for RTX on any machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.compile_check import CHECKABLE
from engines.compiled_layers import CompiledLayers
from engines.layer_log import parse_layers
from engines.target import Target
from engines.tensorrt.child import in_child, report
from engines.tensorrt.flavour import Flavour, require, select
from engines.tensorrt.gpus import Gpu, gpus
from engines.tensorrt.inspector import parse_inspector
from engines.tensorrt.options import BuilderOptions, Implicit, check_options
from engines.tensorrt.profiles import Profile, check_profiles, derive
from pipeline import model as models
from pipeline.errors import EngineError, MissingError
from pipeline.types import Progress, silent

if TYPE_CHECKING:
    from engines.tensorrt.builder import Job

ENGINE, MANIFEST = "model.plan", "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """An engine, what it is made of, and what it belongs to.

    Attributes:
        data: The serialized engine.
        layers: Its compiled layers.
        manifest: TensorRT's version, compute capability, the ONNX files' hashes, options: what must match to use it.
    """

    data: bytes
    layers: CompiledLayers
    manifest: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write ``model.plan`` and ``manifest.json`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ENGINE).write_bytes(self.data)
        text = json.dumps(self.manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def build_engine(
    onnx: Path,
    target: Target,
    options: BuilderOptions,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    implicit: Implicit | None = None,
    progress: Progress = silent,
) -> EngineBuild:
    """Return the engine of ``onnx`` for ``target``.

    Args:
        onnx: A strongly typed graph; with ``builder.quantization: implicit`` a float graph. External data beside it.
        target: A GPU; its ``runtime`` says which TensorRT builds.
        options: How to build; without profiles one is derived for batches up to that of ``shapes``
            (:func:`engines.tensorrt.profiles.derive` makes one for larger batches).
        shapes: A usual shape for every input; compiled layers are told at these.
        implicit: Ranges or data for implicit quantization.
        progress: Told thousandths of the build.

    Raises:
        MissingError: The package, or a GPU of the target's compute capability, is missing; says which.
        RecipeError: The installed version lacks an option, or a profile does not fit the model.
        EngineError: The parser or the builder refuses the graph, or crashes.
    """
    flavour = Flavour(target.runtime)
    gpu = None if flavour is Flavour.RTX else _gpu_for(target, options)
    version = require(flavour, f"The engine for {target.title}")
    check_options(options, flavour, version)
    if (options.quantization == "implicit") != (implicit is not None):
        raise EngineError(
            "Implicit quantization needs builder.quantization: implicit and its ranges or data, both or neither.",
            where=f"target {target.name}",
            fix="Call build_engine with implicit=Implicit(...) for such options and without it for others.",
        )
    inputs = models.inputs(models.load(onnx))
    if options.profiles:
        check_profiles(options.profiles, inputs)
    else:
        options = replace(options, profiles=derive(inputs, shapes))
    assert target.compute_capability is not None
    crashed = EngineError(
        f"{flavour.label} crashed while it built for {target.title}.",
        where=str(onnx),
        fix="Keep more nodes in FP16 with rules, or lower builder.optimization_level.",
    )
    work = _Work(onnx, flavour, target.compute_capability, options, dict(shapes), gpu, implicit)
    made = in_child(_build, work, progress=progress, crashed=crashed)
    return EngineBuild(data=made.data, layers=made.layers, manifest=_manifest(onnx, target, options, made, gpu))


def _gpu_for(target: Target, options: BuilderOptions) -> Gpu:
    """Return a GPU here that builds engines for ``target``.

    Raises:
        MissingError: There is none; names the GPUs that there are.
    """
    here, wanted = gpus(), target.compute_capability or (0, 0)
    for gpu in here:
        # An engine for Ampere and newer can be built on any of them.
        wider = options.hardware_compatibility == "ampere_plus" and gpu.capability >= (8, 0) <= wanted
        if gpu.capability == wanted or wider:
            return gpu
    found = ", ".join(f"{g.name} ({g.sm})" for g in here) or "none"
    raise MissingError(
        f"TensorRT builds the {target.title} engine on a GPU with {target.sm}; this machine has {found}.",
        where=f"target {target.name}",
        fix=f"Run the same command on a machine with {target.title}; everything else of the build is reused.",
    )


@dataclass(frozen=True, slots=True)
class _Work:
    onnx: Path
    flavour: Flavour
    capability: tuple[int, int]
    options: BuilderOptions
    shapes: dict[str, tuple[int, ...]]
    gpu: Gpu | None
    implicit: Implicit | None


@dataclass(frozen=True, slots=True)
class _Made:
    data: bytes
    layers: CompiledLayers
    version: str


def _build(work: _Work) -> _Made:
    """Build in the child process, where TensorRT may be imported."""
    if work.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = work.gpu.uuid
    select(work.flavour)
    from engines.tensorrt.binding import trt
    from engines.tensorrt.builder import Job, build

    device = "SM{}{}".format(*work.capability)
    job = Job(
        onnx=work.onnx,
        device=device,
        capability=work.capability,
        options=work.options,
        profiles=work.options.profiles,
    )
    made = build(job, progress=report, extra=_implicit(work))
    layers = _rtx_layers(job, work.shapes) if work.flavour is Flavour.RTX else _inspected(made.data, work.shapes)
    compiled = CompiledLayers(
        builder=f"{work.flavour} {trt.__version__}",
        compute_capability=CHECKABLE.get(work.capability, device),
        engine_bytes=len(made.data),
        layers=layers,
    )
    return _Made(made.data, compiled, trt.__version__)


def _implicit(work: _Work) -> dict[str, Any]:
    if work.implicit is None:
        return {}
    from engines.tensorrt.implicit import arguments

    return arguments(work.implicit, work.options.calibrator)


def _rtx_layers(job: Job, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
    """Return the layers at concrete shapes: an RTX engine cannot be inspected without a GPU, so it is compiled again."""
    from engines.tensorrt.builder import build

    static = build(replace(job, shapes=shapes, profiles=(), options=replace(job.options, profiles=())))
    return parse_layers(message for _, message in static.messages)


def _inspected(data: bytes, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
    """Return what the engine tells about its layers at concrete shapes."""
    from engines.tensorrt.binding import trt
    from engines.tensorrt.observers import MessageLog

    log = MessageLog()
    engine = trt.Runtime(log).deserialize_cuda_engine(data)
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT and name in shapes:
            context.set_input_shape(name, shapes[name])
    inspector.execution_context = context
    return parse_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _manifest(onnx: Path, target: Target, options: BuilderOptions, made: _Made, gpu: Gpu | None) -> dict[str, Any]:
    cache = options.timing_cache
    return {
        "runtime": target.runtime,
        "version": made.version,
        "target": target.name,
        "compute_capability": "{}.{}".format(*(target.compute_capability or (0, 0))),
        "gpu": gpu.name if gpu is not None else None,
        "driver": gpu.driver if gpu is not None else None,
        "engine": {"file": ENGINE, "bytes": len(made.data), "sha256": hashlib.sha256(made.data).hexdigest()},
        "onnx": {file.name: _sha256(file) for file in models.files(onnx)},
        "options": options.to_dict(),
        "timing_cache_sha256": _sha256(cache) if cache is not None and cache.is_file() else None,
        "plugins": {path.name: _sha256(path) for path in options.plugin_libraries},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def mismatches(manifest: Mapping[str, Any], onnx: Path, *, capability: str | None = None) -> list[str]:
    """Return why an engine does not belong to a graph or a GPU; empty if it does.

    Args:
        manifest: What :meth:`EngineBuild.write` wrote.
        onnx: The variant that it should be made from.
        capability: ``8.0``: the GPU that it should be for; ``None`` does not look.
    """
    found = []
    now = {file.name: _sha256(file) for file in models.files(onnx)}
    if manifest.get("onnx") != now:
        found.append(f"it was built from another {onnx.name}")
    if capability is not None and manifest.get("compute_capability") != capability:
        found.append(f"it is for compute capability {manifest.get('compute_capability')}, not {capability}")
    return found


def profiles_for(
    options: BuilderOptions, onnx: Path, shapes: Mapping[str, tuple[int, ...]], max_batch_size: int
) -> Sequence[Profile]:
    """Return the profiles that a build uses: those asked for, checked, or one for batches up to ``max_batch_size``."""
    inputs = models.inputs(models.load(onnx))
    if options.profiles:
        check_profiles(options.profiles, inputs, max_batch_size=max_batch_size)
        return options.profiles
    return derive(inputs, shapes, max_batch_size=max_batch_size)
