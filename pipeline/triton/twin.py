"""A twin of a repository for a server that has the python backend alone: the same models, ONNX Runtime inside ``model.py``."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.errors import PublishError
from pipeline.triton.ensemble import python_source
from pipeline.triton.protobuf import kind_cpu, parse, to_text
from pipeline.triton.repository import CONFIG, versions
from pipeline.triton.warm_up import FOLDER


def write_twin(repository: Path, out: Path) -> Path:
    """Write the twin of ``repository`` to ``out`` (replaced) and return it; model files are linked or copied.

    Models of the onnxruntime backend become python models with the same inputs, outputs and batching; python models and
    ensembles stay as they are.

    Raises:
        PublishError: There is no model, or one that needs a GPU's engine.
    """
    shutil.rmtree(out, ignore_errors=True)
    folders = sorted(d for d in repository.iterdir() if (d / CONFIG).is_file()) if repository.is_dir() else []
    if not folders:
        raise PublishError(
            "There is no model repository here.",
            where=str(repository),
            fix="Name a build directory with a built cpu engine, or a model repository.",
        )
    for folder in folders:
        config = parse((folder / CONFIG).read_text(encoding="utf-8"), where=f"{folder.name}/{CONFIG}")
        if config.backend == "tensorrt":
            raise PublishError(
                f"The model {folder.name} is a TensorRT engine, which needs its GPU and Triton's own server.",
                where=str(folder),
                fix="Run this in Triton's container on that GPU, or serve a build of the target cpu.",
            )
        converted = config.backend == "onnxruntime"
        if converted:
            config.backend = "python"
            config.ClearField("optimization")
            for group in config.instance_group:
                if group.kind != kind_cpu():
                    group.kind = kind_cpu()
                    del group.gpus[:]
        target = out / folder.name
        target.mkdir(parents=True)
        (target / CONFIG).write_text(to_text(config), encoding="utf-8")
        for file in folder.glob("labels.*"):
            _link(str(file), str(target / file.name))
        if (folder / FOLDER).is_dir():
            shutil.copytree(folder / FOLDER, target / FOLDER, copy_function=_link)
        for version in versions(folder):
            shutil.copytree(folder / str(version), target / str(version), copy_function=_link)
            if converted:
                (target / str(version) / "model.py").write_text(python_source("run_onnx"), encoding="utf-8")
    return out


def _link(source: str, target: str) -> str:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target
