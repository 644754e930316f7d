"""The three kinds of job that need torch, one after the other: load, trace, translate, write, check."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import model as onnx_file
from pipeline.errors import SourceError
from pipeline.sources import check, names, torch_export
from pipeline.sources.job import Job
from pipeline.sources.torch_export import Example, Traced
from pipeline.types import Feeds, Progress

STAGE = "export"
STEPS = 4


def run(job: Job, out: Path, progress: Progress) -> float:
    """Write ``exported.onnx`` and ``sample.npz`` into ``out``; return the largest relative difference from torch.

    Raises:
        SourceError: As :func:`pipeline.sources.export.export` says.
    """
    progress(STAGE, 0, STEPS)
    traced = _load(job)
    progress(STAGE, 1, STEPS)
    model = torch_export.translate(traced, opset=job.opset, where=job.target)
    progress(STAGE, 2, STEPS)
    names.tidy(model, wrapper=traced.wrapper, dims=traced.dims)
    path = out / "exported.onnx"
    onnx_file.save(model, path)
    cases = traced.cases
    del model, traced  # the weights, which ONNX Runtime is about to load again
    progress(STAGE, 3, STEPS)
    difference = check.compare(path, cases, where=job.target)
    _save_sample(cases[0][0], out / "sample.npz")
    progress(STAGE, 4, STEPS)
    return difference


def _save_sample(sample: Feeds, path: Path) -> None:
    """Write an ``.npz``; ``np.savez`` cannot, where an input is called ``file``."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in sample.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, value, allow_pickle=False)


def _load(job: Job) -> Traced:
    if job.kind == "pt2":
        return torch_export.read_program(Path(job.target))
    if job.kind == "module":
        return torch_export.trace(*_from_factory(job.target), where=job.target)
    from pipeline.sources import huggingface

    assert job.task is not None
    return huggingface.trace(Path(job.target), task=job.task, pooled=job.pooled, kv_cache=job.kv_cache)


def _from_factory(name: str) -> tuple[Any, Example]:
    factory = _find(name)
    try:
        made = factory()
    except (Exception, SystemExit) as error:  # the user's code
        raise _raised("The factory", error, name) from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not torch_export.is_module(made[0]):
        raise SourceError(
            f"The factory must return (torch.nn.Module, example_inputs[, dynamic_shapes]); it returned {_kind(made)}.",
            where=name,
            fix="Return the module and a tuple or dict of example inputs.",
        )
    module, inputs = made[0], made[1]
    dims = made[2] if len(made) == 3 else None
    if isinstance(inputs, dict):
        return module, Example(kwargs=inputs, dims=dims)
    return module, Example(args=tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), dims=dims)


def _find(name: str) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise SourceError(
            "A torch module is named as package.module:factory.", where=name, fix="Add the function after a colon."
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise _raised(f"Importing {module_name}", error, name) from error
        raise SourceError(
            f"There is no module {error.name!r}.",
            where=name,
            fix=f"Run from the folder that holds it ({Path.cwd()} now), or install it.",
        ) from error
    except (Exception, SystemExit) as error:  # the user's code
        raise _raised(f"Importing {module_name}", error, name) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, [n for n in vars(module) if not n.startswith("_")], n=1)
        raise SourceError(
            f"{module_name} has no function {attribute!r}.",
            where=name,
            fix=f"Did you mean {near[0]!r}?" if near else "Check the name after the colon.",
        )
    return factory  # type: ignore[no-any-return]


def _raised(what: str, error: BaseException, name: str) -> SourceError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return SourceError(
        f"{what} raised {type(error).__name__}: {error}",
        where=f"{name} ({frame.filename}:{frame.lineno})",
        fix="Call it in Python first; it must work there.",
    )


def _kind(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return type(made).__name__
