"""Writes a model into a Triton model repository: a configuration, and the engine as a new version."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline import model as onnx_files
from pipeline.errors import PublishError, StoreError
from pipeline.recipe import TritonConfig
from pipeline.triton.config import configured
from pipeline.triton.served import BACKENDS, ServedModel, plan_name
from pipeline.triton.version_manifest import MANIFEST, manifest_text

Files = Mapping[str, Path | bytes]
"""Path in a version's folder to the file that is copied there, or its content."""

CONFIG = "config.pbtxt"
CONFIGS = ".configs"
"""In a model's folder: the configuration that each version was published with, ``<version>.pbtxt``."""
ROLLED_BACK = ".rolled_back"
"""In a model's folder: versions that were taken back; the server does not look there, and their numbers are not used again."""


def write_repository(root: Path, *, model: ServedModel, config: TritonConfig) -> Path:
    """Publish ``model`` under ``root`` and return its folder, ``root/<name>``.

    A first model gets version 1. One that is there already keeps its versions and gets the next number, unless its
    newest version holds the same files, which is then left as it is: publishing twice changes nothing. Everything is
    written beside its place and renamed, so a server that polls the repository never sees half a version.

    Args:
        root: The repository (``tritonserver --model-repository``); made if it is not there.
        model: What is served.
        config: Batching and instances.

    Raises:
        PublishError: The model cannot be served as asked; see :func:`pipeline.triton.config.configured`.
        ModelError: The engine or its external data cannot be read.
        StoreError: The folder cannot be written.
        MissingError: ``tritonclient`` is not installed.
    """
    made, files = configured(model, config), _engine_files(model)
    manifest = manifest_text(model, files).encode()
    return publish_version(root, model.name, made.text, {**files, MANIFEST: manifest}, beside=made.beside)


def publish_version(
    root: Path, name: str, text: str, files: Files, *, beside: Mapping[str, bytes] | None = None
) -> Path:
    """Write a version of the model ``name`` under ``root`` and return the model's folder.

    Args:
        root: The repository.
        name: The model.
        text: Its configuration.
        files: Path in the version's folder to the file that is copied there, or its content.
        beside: Path in the model's folder to content. Such files are never replaced, because the configurations of older
            versions name them too: their names tell their content apart.

    Raises:
        StoreError: The folder cannot be written.
    """
    folder = root / name
    staging = root / f".{name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
        _publish(folder, staging, text, files, beside or {})
    except OSError as error:
        raise StoreError(
            f"The model repository could not be written: {error.strerror or error}.",
            where=str(folder),
            fix="Free some disk space or choose another folder.",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def republish(model: Path, root: Path) -> Path:
    """Publish the newest version of a model of another repository under ``root``, and return its folder there.

    Args:
        model: The model's folder in the other repository.
        root: The repository.

    Raises:
        PublishError: The folder holds no version.
        StoreError: The folder cannot be written.
    """
    present = versions(model)
    if not present:
        raise PublishError("The model has no version.", where=str(model), fix="Build it again.")
    version, own = model / str(present[-1]), (CONFIGS, ROLLED_BACK, *map(str, present))
    files = {p.relative_to(version).as_posix(): p for p in sorted(version.rglob("*")) if p.is_file()}
    beside = {
        name: p.read_bytes()
        for p in sorted(model.rglob("*"))
        if p.is_file() and (name := p.relative_to(model).as_posix()) != CONFIG and name.split("/")[0] not in own
    }
    return publish_version(root, model.name, (model / CONFIG).read_text(encoding="utf-8"), files, beside=beside)


def versions(folder: Path) -> list[int]:
    """Return the version numbers in a model's folder, ascending; the server ignores every other folder."""
    return sorted(int(d.name) for d in folder.iterdir() if d.is_dir() and is_version(d.name))


def is_version(name: str) -> bool:
    """Return whether the server takes a folder of this name for a version: digits with no leading zero."""
    return name.isascii() and name.isdigit() and not name.startswith("0")


def _publish(folder: Path, staging: Path, text: str, files: Files, beside: Mapping[str, bytes]) -> None:
    present = versions(folder) if folder.is_dir() else []
    if present and _same(folder / str(present[-1]), files):
        version = None
    else:
        taken_back = folder / ROLLED_BACK
        used = [*present, *(versions(taken_back) if taken_back.is_dir() else [])]
        version = str(max(used, default=0) + 1)
        for name, source in files.items():
            target = staging / version / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                # No link: ONNX readers refuse external data that is linked, and a repository is moved about.
                shutil.copyfile(source, target)
        (staging / version).mkdir(parents=True, exist_ok=True)  # an ensemble's holds nothing
    staging.mkdir(exist_ok=True)
    for name, content in beside.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(content)
    (staging / CONFIG).write_text(text, encoding="utf-8")
    kept = staging / CONFIGS / f"{version or present[-1]}.pbtxt"
    kept.parent.mkdir()
    kept.write_text(text, encoding="utf-8")
    if not folder.is_dir():
        staging.replace(folder)
        return
    (folder / CONFIGS).mkdir(exist_ok=True)
    kept.replace(folder / CONFIGS / kept.name)
    for name in beside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(folder / name)
    if version is not None:
        (staging / version).replace(folder / version)
    os.replace(staging / CONFIG, folder / CONFIG)  # noqa: PTH105 - both are files; replace keeps the old one until done


def _engine_files(model: ServedModel) -> dict[str, Path]:
    """Return path in the version directory to source file: the engine under its default name, its data as it is."""
    if model.engines:
        return {plan_name(capability): plan.file for capability, plan in sorted(model.engines.items())}
    engine = model.engine
    default = BACKENDS[model.backend].file
    files = {default: engine}
    for data in onnx_files.files(engine)[1:]:
        name = data.relative_to(engine.parent).as_posix()
        if name == default:
            raise PublishError(
                f"The engine's external data is called {default}, as the engine itself must be.",
                where=str(engine),
                fix="Save the model again with its data under another name.",
            )
        files[name] = data
    return files


def _same(version: Path, files: Files) -> bool:
    there = {p.relative_to(version).as_posix() for p in version.rglob("*") if p.is_file()}
    return there == set(files) and all(
        (version / name).read_bytes() == source
        if isinstance(source, bytes)
        else (version / name).stat().st_size == source.stat().st_size
        and onnx_files.sha256(version / name) == onnx_files.sha256(source)
        for name, source in files.items()
    )
