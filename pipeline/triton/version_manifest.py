"""``manifest.json`` in a version's folder: what the version needs of the server, and which files it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines.tensorrt.profiles import Profile, ShapeRange
from pipeline import model as onnx_files
from pipeline.errors import PublishError
from pipeline.triton.served import ServedModel, plan_name

MANIFEST = "manifest.json"


def manifest_text(model: ServedModel, files: Mapping[str, Path]) -> str:
    """Return the text of a version's manifest; the same model gives the same text.

    ``requires`` says what must load it: for engines of TensorRT that version (or a later one, where they are
    version-compatible) and a GPU of one of these compute capabilities, for ONNX the opsets and the IR version.

    Args:
        model: What is served.
        files: Path in the version's folder to the file.
    """
    values: dict[str, Any] = {
        "schema_version": 1,
        "model": model.name,
        "backend": model.backend,
        "requires": _of_plans(model) if model.engines else _of_onnx(model),
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": onnx_files.sha256(path)} for name, path in files.items()
        },
        "profiles": {
            plan_name(capability): [
                {name: asdict(shapes) for name, shapes in profile.items()} for profile in plan.profiles
            ]
            for capability, plan in model.engines.items()
        },
        "targets": {plan_name(capability): plan.target for capability, plan in model.engines.items()},
    }
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _of_plans(model: ServedModel) -> dict[str, Any]:
    plans = list(model.engines.values())
    version, wider = plans[0].tensorrt, all(plan.version_compatible for plan in plans)
    found: dict[str, Any] = {
        "compute_capability": sorted(model.engines),
        "tensorrt": f">={version}" if wider else f"=={version}",
        "triton": f"a release with TensorRT {version}" + (" or later" if wider else ""),
    }
    # Without this flag the backend refuses an engine of another version, compatible or not.
    return found | ({"backend_config": "tensorrt,version-compatible=true"} if wider else {})


def _of_onnx(model: ServedModel) -> dict[str, Any]:
    graph = onnx_files.load(model.engine)
    opsets = {domain or "ai.onnx": version for domain, version in sorted(graph.opset_imports.items())}
    found = {"onnx_ir": graph.ir_version, "opsets": opsets, "triton": "a release with ONNX Runtime for these opsets"}
    # From TensorRT 9 on the provider makes strongly typed networks, which compute in the graph's own precisions.
    return (
        found
        if model.at_load is None
        else found | {"tensorrt": ">=10", "gpu": "any that has the precisions of the graph"}
    )


def read_manifest(version: Path) -> dict[str, Any] | None:
    """Return what a version's manifest says; ``None`` where there is none.

    Raises:
        PublishError: It is no JSON object.
    """
    path = version / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"The manifest cannot be read: {error}", where=str(path), fix="Publish again.") from error
    if not isinstance(values, dict):
        raise PublishError("The manifest is no JSON object.", where=str(path), fix="Publish again.")
    return values


def profiles_of(values: object) -> tuple[Profile, ...]:
    """Return the optimization profiles that a manifest lists.

    Raises:
        ValueError: They are no list of mappings from input to ``{min, opt, max}``.
    """
    try:
        return tuple(
            {
                name: ShapeRange(**{end: tuple(map(int, shapes[end])) for end in ("min", "opt", "max")})
                for name, shapes in profile.items()
            }
            for profile in values or ()  # type: ignore[attr-defined]
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"no optimization profiles: {error}") from error
