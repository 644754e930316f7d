"""The engines of several build directories, checked to belong together before one repository serves them all."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.target import Target
from engines.target import target as find_target
from engines.tensorrt.build import mismatches
from pipeline import model as models
from pipeline.errors import PublishError
from pipeline.notices import notice
from pipeline.policy.fallback import policy_on
from pipeline.policy.planning import family
from pipeline.recipe import Recipe, parse
from pipeline.triton.served import Plan
from pipeline.triton.version_manifest import profiles_of

_SAME = "Build every target with the same model and recipe, and with one version of this package."

_DECISIVE = ("failed", "passed", "not_measured")
"""Verdicts of several builds on one target: the first of these that one of them gave counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """One engine of one build directory.

    Attributes:
        target: The device it is for.
        file: ``model.plan`` of TensorRT, or the ONNX that ONNX Runtime serves.
        onnx: The variant that it was built from.
        manifest: What the builder wrote beside it; empty for ONNX Runtime's.
        verdict: ``passed``, ``failed`` or ``not_measured``.
    """

    target: Target
    file: Path
    onnx: Path
    manifest: Mapping[str, Any]
    verdict: str

    @property
    def capability(self) -> str:
        """Return the compute capability, ``8.0``."""
        return "{}.{}".format(*(self.target.compute_capability or (0, 0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What several build directories have built from one model and recipe."""

    recipe: Recipe
    engines: tuple[BuiltEngine, ...]
    folders: tuple[Path, ...]
    unbuilt: Mapping[str, Mapping[str, str]]
    """Variant to TensorRT's targets of it that no build has an engine for, each with the verdict on its simulation."""


def is_build(folder: Path) -> bool:
    """Return whether a folder is a build directory: it holds a recipe of its own."""
    return (folder / ".stages/recipe.json").is_file()


def gather(directories: Sequence[Path]) -> Gathered:
    """Return the engines of all directories.

    Raises:
        PublishError: A directory holds no finished build; two come from another model or recipe, or built one target
            both; an engine is not the one that its manifest describes.
    """
    builds = [_Build(folder) for folder in directories]
    first = builds[0]
    for other in builds[1:]:
        different = [key for key in first.identity if first.identity[key] != other.identity.get(key)]
        if different:
            raise PublishError(
                f"The builds do not come from the same {' and '.join(different)}.",
                where=f"{first.folder} and {other.folder}",
                fix=_SAME,
            )
    engines: dict[str, BuiltEngine] = {}
    places: dict[str, Path] = {}
    for build in builds:
        for engine in build.engines():
            name = engine.target.name
            if name in engines and models.sha256(engines[name].file) != models.sha256(engine.file):
                raise PublishError(
                    f"Two builds made an engine for {name}, and not the same.",
                    where=f"{places[name]} and {build.folder}",
                    fix="Leave one of the directories out.",
                )
            engines.setdefault(name, engine)
            places.setdefault(name, build.folder)
    unbuilt: dict[str, dict[str, str]] = defaultdict(dict)
    for build in builds:
        for name in build.report["targets"]:
            device = find_target(name)
            if name not in engines and device.runtime == "tensorrt":
                verdicts = unbuilt[family(device, policy_on(device, first.recipe.policy))]
                verdicts[name] = min(verdicts.get(name, "not_measured"), build.verdict(name), key=_DECISIVE.index)
    return Gathered(
        recipe=first.recipe,
        engines=tuple(engines.values()),
        folders=tuple(directories),
        unbuilt=unbuilt,
    )


def by_capability(engines: Sequence[BuiltEngine], *, chosen: Sequence[str] = ()) -> dict[str, BuiltEngine]:
    """Return compute capability to the TensorRT engine for it.

    Args:
        engines: TensorRT engines.
        chosen: Targets to take where several have one compute capability.

    Raises:
        PublishError: Several engines have one compute capability and none of them is chosen.
    """
    groups: dict[str, list[BuiltEngine]] = defaultdict(list)
    for engine in engines:
        groups[engine.capability].append(engine)
    found = {}
    for capability, group in groups.items():
        names = [e.target.name for e in group]
        wanted = [e for e in group if e.target.name in chosen] if len(group) > 1 else group
        if len(wanted) != 1:
            raise PublishError(
                f"{' and '.join(names)} have the same compute capability {capability}, and a model can hold one engine for it.",
                where="cc_model_filenames",
                fix=f"Choose one with --target ({names[0]}), or write a model for each with --split-by-target.",
            )
        found[capability] = wanted[0]
    return found


def plan_of(engine: BuiltEngine) -> Plan:
    """Return a TensorRT engine with what its builder wrote beside it.

    Raises:
        PublishError: The manifest's optimization profiles are not readable.
    """
    options = engine.manifest.get("options", {})
    try:
        profiles = profiles_of(options.get("profiles"))
    except ValueError as error:
        raise PublishError(
            f"The engine's manifest has {error}.",
            where=str(engine.file.with_name("manifest.json")),
            fix="Build it again.",
        ) from error
    return Plan(
        file=engine.file,
        target=engine.target.name,
        tensorrt=str(engine.manifest.get("version")),
        profiles=profiles,
        version_compatible=bool(options.get("version_compatible")),
    )


def largest_batch(engine: BuiltEngine) -> int | None:
    """Return the largest batch that a TensorRT engine's profiles take; ``None`` where no input has an open batch."""
    profiles = engine.manifest.get("options", {}).get("profiles") or []
    sizes = [shape["max"][0] for profile in profiles for shape in profile.values() if shape["max"]]
    return min(sizes) if sizes else None


def usual_shapes(engine: BuiltEngine) -> dict[str, tuple[int, ...]]:
    """Return every input's shape that the first profile's kernels were chosen for."""
    profiles = engine.manifest.get("options", {}).get("profiles") or [{}]
    return {name: tuple(shape["opt"]) for name, shape in profiles[0].items()}


class _Build:
    """One finished build directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not is_build(folder):
            raise PublishError("The folder holds no build.", where=str(folder), fix="Name the -o directory of a build.")
        self.recipe = parse(_json(folder / ".stages/recipe.json"), where=str(folder))
        self.report, manifest = _json(folder / "report.json"), _json(folder / "manifest.json")
        recipe = {k: v for k, v in manifest["recipe"].items() if k != "targets"}
        self.identity = {
            "canonical model": [models.sha256(file) for file in sorted(folder.glob("model.fp32.onnx*"))],
            "recipe": recipe,
            "calibration data": sorted(i["sha256"] for i in manifest["inputs"] if i["role"] == "calibration"),
        }

    def engines(self) -> Iterator[BuiltEngine]:
        for name, facts in self.report["targets"].items():
            if facts["status"] != "built":
                continue
            device = find_target(name)
            if device.runtime == "tensorrt-rtx":
                notice("not-served", "Triton loads no engine of TensorRT for RTX.", where=f"target {name}")
                continue
            yield self._engine(device)

    def verdict(self, target: str) -> str:
        """Return ``passed``, ``failed`` or ``not_measured``."""
        facts = (self.report.get("validation") or {}).get(target) or {}
        return str(facts.get("verdict") or "not_measured")

    def _engine(self, device: Target) -> BuiltEngine:
        folder = self.folder / "engines" / device.name
        onnx = self.folder / "variants" / family(device, policy_on(device, self.recipe.policy)) / "model.onnx"
        status = self.verdict(device.name)
        if device.runtime == "onnxruntime":
            file = folder / "model.onnx"
            return BuiltEngine(target=device, file=file, onnx=file, manifest={}, verdict=status)
        file, manifest = folder / "model.plan", _json(folder / "manifest.json")
        found = BuiltEngine(target=device, file=file, onnx=onnx, manifest=manifest, verdict=status)
        wrong = mismatches(manifest, onnx, capability=found.capability)
        if not file.is_file() or manifest.get("engine", {}).get("sha256") != models.sha256(file):
            wrong.append("the file is not the one that the manifest describes")
        if manifest.get("target") != device.name or manifest.get("runtime") != device.runtime:
            wrong.append(f"the manifest is of {manifest.get('runtime')} for {manifest.get('target')}")
        if wrong:
            raise PublishError(
                f"The engine for {device.title} does not belong to its build: {'; '.join(wrong)}.",
                where=str(file),
                fix="Build this target again, and copy its whole build directory.",
            )
        return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(
            f"A file of the build is missing or no JSON: {path.name}.",
            where=str(path),
            fix="Run the build to its end, and copy the whole build directory, hidden files too.",
        ) from error
    return found
