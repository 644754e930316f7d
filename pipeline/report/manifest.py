"""``manifest.json``: what went into a build and what came out, by hash.

Byte for byte the same for two builds of the same recipe, so it holds no time, no figure that was measured and no
absolute path: an input is known by its name and hash, an output by its path in the build directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from pipeline.content import folder_files
from pipeline.errors import StoreError
from pipeline.recipe import Recipe
from pipeline.report.contract import write_text
from pipeline.report.measured import Part, Sorted
from pipeline.report.versions import versions

MANIFEST = "manifest.json"
CHANGING = {"report.json", "report.html", "measurements.json", "costs.json", "model.plan", MANIFEST}
"""Files that hold timings, depend on them (engines), or hold the hashes themselves, and so are not listed."""

_PATHS = {"onnx", "huggingface", "pt2", "data", "tokenizer", "labels", "costs"}
"""Recipe keys whose value may be a path."""


class InputFile(Part):
    """A file that the build read."""

    role: str
    """``source``, ``calibration``, ``validate``, …."""
    name: str
    sha256: str
    bytes: int


class OutputFile(Part):
    """A file that the build wrote."""

    path: str
    """In the build directory, with ``/``."""
    sha256: str
    bytes: int


class Manifest(Part):
    """Inputs, outputs, versions, recipe and seeds."""

    schema_version: int = 1
    name: str
    inputs: tuple[InputFile, ...]
    outputs: tuple[OutputFile, ...]
    versions: Sorted[str]
    recipe: dict[str, JsonValue]
    """As it was read, with paths cut to their last part where they were absolute."""
    seeds: Sorted[int]

    def to_json(self) -> str:
        """Return the text of ``manifest.json``; equal manifests give equal text."""
        values = self.model_dump(mode="json")
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def make_manifest(
    folder: Path,
    *,
    recipe: Recipe,
    inputs: Mapping[str, Path],
    outputs: Iterable[Path] | None = None,
    hash_file: Callable[[Path], str] | None = None,
) -> Manifest:
    """Return the manifest of a build directory.

    Args:
        folder: The build directory.
        recipe: What was asked for.
        inputs: Role (``source``, ``calibration``, …) to the file or folder that was read.
        outputs: Files to list; every file in ``folder`` but hidden and changing ones if not given.
        hash_file: Returns a file's SHA-256 (hex); give one that remembers to save reading large files again.

    Raises:
        StoreError: A file cannot be read.
    """
    hashed = hash_file or _sha256
    try:
        read = tuple(
            InputFile(role=role, name=name, sha256=hashed(path), bytes=path.stat().st_size)
            for role, given in sorted(inputs.items())
            for name, path in _files_of(given)
        )
        wrote = tuple(
            OutputFile(path=path.relative_to(folder).as_posix(), sha256=hashed(path), bytes=path.stat().st_size)
            for path in sorted(output_files(folder) if outputs is None else outputs)
        )
    except OSError as error:
        raise StoreError(
            f"A file for the manifest cannot be read: {error.strerror or error}.",
            where=str(error.filename or folder),
            fix="Run the build again.",
        ) from error
    return Manifest(
        name=recipe.name,
        inputs=read,
        outputs=wrote,
        versions=versions(),
        recipe=recipe_values(recipe),
        seeds={"recipe": recipe.seed},
    )


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Write ``manifest.json`` into the build directory and return its path.

    Raises:
        StoreError: The file cannot be written.
    """
    path = folder / MANIFEST
    write_text(path, manifest.to_json())
    return path


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a build directory.

    Raises:
        StoreError: There is none, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else "it does not follow the schema"
        raise StoreError(
            f"The manifest cannot be read: {why}.", where=str(path), fix="Run `python -m pipeline build` again."
        ) from error


def output_files(folder: Path) -> list[Path]:
    """Return every file of a build directory that is the same for the same recipe, sorted."""
    return [
        path
        for name, path in folder_files(folder)
        if path.name not in CHANGING and not any(part.startswith(".") for part in Path(name).parts)
    ]


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON values: an absolute path is cut to its last part, and where work was done is left out."""
    return _portable(recipe.model_dump(mode="json", by_alias=True, exclude={"executor"}))  # type: ignore[no-any-return]


def _portable(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _portable(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_portable(item, key) for item in value]
    if isinstance(value, str) and key in _PATHS and Path(value).is_absolute():
        return Path(value).name
    return value


def _files_of(path: Path) -> list[tuple[str, Path]]:
    if path.is_dir():
        return [(f"{path.name}/{name}", file) for name, file in folder_files(path)]
    if path.suffix == ".onnx":
        from pipeline import model  # imports onnx: 0.5 s that other inputs do not need

        return [(file.relative_to(path.parent).as_posix(), file) for file in model.files(path)]
    return [(path.name, path)]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
