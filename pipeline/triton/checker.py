"""Checks a model repository the way the server would when it loads it, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline import model as onnx_files
from pipeline.errors import EngineError, ModelError, PublishError
from pipeline.running.memory import open_session
from pipeline.triton.accelerator import check_accelerators
from pipeline.triton.engine_rules import OnnxEngine, check_against_engine
from pipeline.triton.ensemble_rules import check_ensemble
from pipeline.triton.label_rules import check_labels
from pipeline.triton.problem import Problem
from pipeline.triton.profile_rules import check_profiles
from pipeline.triton.protobuf import ModelConfig, parse
from pipeline.triton.repository import CONFIG, CONFIGS, ROLLED_BACK, is_version, versions
from pipeline.triton.served import BACKENDS, PYTHON
from pipeline.triton.serving_rules import check_resources, check_serving
from pipeline.triton.warm_up_rules import check_data_files

_SAME_AGAIN = "Write the repository again with `python -m pipeline publish`."


def check_repository(root: Path) -> list[Problem]:
    """Return every rule of :data:`pipeline.triton.problem.RULES` that the repository at ``root`` breaks.

    Each served ONNX engine is loaded in ONNX Runtime, compared with its configuration and run on the warm-up request.

    Raises:
        MissingError: ``tritonclient`` is not installed.
    """
    folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")) if root.is_dir() else []
    if not folders:
        return [
            Problem(
                rule="repository",
                severity="error",
                where=str(root),
                message="There is no model folder here." if root.is_dir() else "There is no such folder.",
                fix="Name the folder that holds the model folders.",
            )
        ]
    problems = [problem for folder in folders for problem in check_model(folder)]
    configs = {c.name: (c, f) for f in folders if (c := _parsed(f)) is not None}
    for config, folder in configs.values():
        if config.platform == "ensemble":
            others = {name: other for name, (other, _) in configs.items()}
            problems += check_ensemble(config, others, where=f"{folder.name}/{CONFIG}")
    return [*problems, *check_resources({folder.name: config for config, folder in configs.values()})]


def _parsed(folder: Path) -> ModelConfig | None:
    """Return a model's configuration, ``None`` where :func:`check_model` says what is wrong with it."""
    try:
        return parse((folder / CONFIG).read_text(encoding="utf-8"), where=folder.name)
    except (PublishError, OSError, UnicodeDecodeError):
        return None


def check_model(folder: Path) -> list[Problem]:
    """Return the problems of one model folder alone; see :func:`check_repository`."""
    path = folder / CONFIG
    where = f"{folder.name}/{CONFIG}"
    if not path.is_file():
        return [
            Problem(
                rule="config-missing",
                severity="error",
                where=where,
                message="The model has no configuration.",
                fix=_SAME_AGAIN,
            )
        ]
    try:
        config = parse(path.read_text(encoding="utf-8"), where=where)
    except (PublishError, OSError, UnicodeDecodeError) as error:
        what = error.what if isinstance(error, PublishError) else f"The configuration cannot be read: {error}"
        return [Problem(rule="config-parse", severity="error", where=where, message=what, fix=_SAME_AGAIN)]
    problems = [*_identity(folder, config), *_layout(folder, config), *check_serving(config, where=where)]
    problems += check_accelerators(config, where=where)
    problems += [*check_labels(folder, config, where=where), *check_data_files(folder, config, where=where)]
    for version in _served(folder, config):
        if config.backend in BACKENDS:
            problems += _engine(folder / str(version), config, where)
            problems += check_profiles(folder / str(version), config, where=where)
        elif config.backend == PYTHON and not (folder / str(version) / "model.py").is_file():
            problems.append(
                Problem(
                    rule="python-model",
                    severity="error",
                    where=f"{folder.name}/{version}",
                    message="There is no model.py; without it the server hangs while it starts.",
                    fix=_SAME_AGAIN,
                )
            )
    return problems


def _identity(folder: Path, config: ModelConfig) -> Iterator[Problem]:
    where = f"{folder.name}/{CONFIG}"
    if config.name != folder.name:
        yield Problem(
            rule="name",
            severity="error",
            where=f"{where}: name",
            message=f"The configuration names the model {config.name!r}, its folder {folder.name!r}.",
            fix="Give both the same name.",
        )
    if config.backend not in (*BACKENDS, PYTHON) and config.platform != "ensemble":
        yield Problem(
            rule="backend",
            severity="error",
            where=f"{where}: backend",
            message=f"The backend {config.backend!r} is not known here.",
            fix=f"Use one of {', '.join(sorted((*BACKENDS, PYTHON)))}, or platform ensemble.",
        )
    if config.cc_model_filenames and config.default_model_filename:
        yield Problem(
            rule="default-file",
            severity="error",
            where=f"{where}: default_model_filename",
            message="On a GPU that cc_model_filenames lacks, the server would silently load the default file.",
            fix="Delete default_model_filename.",
        )


def _layout(folder: Path, config: ModelConfig) -> Iterator[Problem]:
    if not _served(folder, config):
        there = ", ".join(map(str, versions(folder))) or "none"
        yield Problem(
            rule="version",
            severity="error",
            where=f"{folder.name}/",
            message=f"The version policy serves no version that is there (versions: {there}).",
            fix="Name version folders 1, 2, 3, … and serve one of them.",
        )
    absent = sorted(set(config.version_policy.specific.versions) - set(versions(folder)))
    if absent:
        yield Problem(
            rule="version-missing",
            severity="warning",
            where=f"{folder.name}/{CONFIG}: version_policy",
            message=f"The policy names versions that are not there: {', '.join(map(str, absent))}.",
            fix="Name versions that are there.",
        )
    used = {"warmup", CONFIGS, ROLLED_BACK, *(f for f in (config.backend,) if f)}
    for extra in sorted(d.name for d in folder.iterdir() if d.is_dir()):
        if not is_version(extra) and extra not in used:
            yield Problem(
                rule="version-ignored",
                severity="warning",
                where=f"{folder.name}/{extra}",
                message="The server ignores this folder: its name is no version number.",
                fix="Delete it, or rename it to a number without a leading zero.",
            )


def _served(folder: Path, config: ModelConfig) -> list[int]:
    present = versions(folder)
    policy = config.version_policy.WhichOneof("policy_choice") if config.HasField("version_policy") else None
    if policy == "all":
        return present
    if policy == "specific":
        return [v for v in config.version_policy.specific.versions if v in present]
    count = config.version_policy.latest.num_versions if policy == "latest" else 1
    return present[-max(count, 1) :]


def _engine(version: Path, config: ModelConfig, where: str) -> Iterator[Problem]:
    backend = BACKENDS[config.backend]
    names = sorted(config.cc_model_filenames.values()) or [config.default_model_filename or backend.file]
    for name in names:
        path = version / name
        shown = f"{config.name}/{version.name}/{name}"
        if not path.is_file():
            yield Problem(
                rule="engine-missing",
                severity="error",
                where=shown,
                message="The file that the backend loads is not there.",
                fix=_SAME_AGAIN,
            )
        elif config.backend == "onnxruntime":
            # What TensorRT will build from runs here as it stands: its FP8 nodes have no fused kernels on the CPU.
            plain = bool(config.optimization.execution_accelerators.gpu_execution_accelerator)
            engine = _load(path, shown, optimize=not plain)
            if isinstance(engine, Problem):
                yield engine
            else:
                yield from check_against_engine(config, engine, folder=version.parent, where=where)


def _load(path: Path, where: str, *, optimize: bool) -> OnnxEngine | Problem:
    try:
        onnx_files.load(path)
    except ModelError as error:
        # The two rules share one exception class; its sentence about external data always begins like this.
        rule = "external-data" if error.what.startswith("External data") else "engine-unreadable"
        message = f"{error.what} ({error.where})"
        return Problem(rule=rule, severity="error", where=where, message=message, fix=error.fix or _SAME_AGAIN)
    try:
        return OnnxEngine(open_session(path, threads=1, optimize=optimize))
    except EngineError as error:
        return Problem(
            rule="engine-unreadable", severity="error", where=where, message=error.what, fix=error.fix or _SAME_AGAIN
        )
