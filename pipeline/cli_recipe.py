"""From a command line to the recipe it asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli_flags import Flags
from pipeline.errors import RecipeError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

_GATE = re.compile(r"^\s*([\w.]+)\s*((?:>=|<=|>|<).+)$")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_FACTORY = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


def recipe_of(flags: Flags, overrides: dict[str, str]) -> tuple[Recipe, Path]:
    """Return the recipe that a command line asks for, and its build directory.

    Raises:
        RecipeError: No model and no recipe, or a wrong key or value.
    """
    from pipeline.recipe import merge, parse, read

    file, values = flags.recipe, dict[str, Any]()
    if file is None and flags.model is None and Path("pipeline.yaml").is_file():
        file = Path("pipeline.yaml")
    if file is not None:
        values = read(file)
    elif flags.model is None and not any(key.startswith("source.") for key in overrides):
        raise RecipeError(
            "There is no model to build: none was named, and there is no ./pipeline.yaml.",
            fix="Name one (`python -m pipeline build model.onnx`) or run `python -m pipeline init` to write a recipe.",
        )
    if flags.model is not None:
        kept = {k: v for k, v in (values.get("source") or {}).items() if k in ("task", "opset", "trust_source")}
        values["source"] = {**kept, **source_of(flags.model)}
    given = {**dict(_shortcuts(flags)), **overrides}
    values = merge(values, given)
    if not values.get("name"):
        values["name"] = _name(values.get("source"))
    where = [str(file)] if file is not None else []
    recipe = parse(values, where=" and ".join([*where, "command line"] if given or not where else where))
    return recipe, flags.output if flags.output is not None else Path("build") / recipe.name


def _shortcuts(flags: Flags) -> Iterator[tuple[str, str]]:
    """Yield the recipe keys that the short flags stand for."""
    given = {
        "policy.preset": flags.precision,
        "policy.fallback": "true" if flags.fallback else None,
        "targets": ",".join(flags.target or ()),
        "name": flags.name,
        "calibration.data": flags.calibration,
        "validate.data": flags.validate,
        "calibration.tokenizer": flags.tokenizer,
        "validate.tokenizer": flags.tokenizer,
        "calibration.samples": flags.samples,
        "calibration.method": flags.method,
        "threads": flags.threads,
        "memory_mb": flags.memory_mb,
        "costs": flags.costs,
        "seed": flags.seed,
        "source.trust_source": "true" if flags.trust_source else None,
        "calibration.trust_data": "true" if flags.trust_data else None,
        "validate.trust_data": "true" if flags.trust_data else None,
        "source.strip_quantization": "true" if flags.strip_quantization else None,
    }
    yield from ((key, str(value)) for key, value in given.items() if value not in (None, ""))
    for gate in flags.gate or ():
        match = _GATE.match(gate)
        if match is None:
            raise RecipeError(
                f"{gate!r} is no gate.",
                where="--gate",
                fix="Write --gate 'sqnr_db>=20' or --gate 'task.f1>=99% of fp32'.",
            )
        yield f"validate.gates.{match[1]}", match[2]


def source_of(model: str) -> dict[str, str]:
    """Return the ``source`` section that ``model`` means.

    Raises:
        RecipeError: There is no such file, or a folder holds no model, several, or simulations of schemes.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "simulations").is_dir():
            raise RecipeError(
                "The folder holds simulations of schemes, which are not models: there is nothing to compile or publish.",
                where=model,
                fix="Name the model that was simulated.",
            )
        if (path / "config.json").is_file():
            return {"huggingface": str(path)}
        found = sorted(path.glob("*.onnx"))
        if len(found) == 1:
            return {"onnx": str(found[0])}
        what = f"The folder holds {len(found)} .onnx files." if found else "The folder holds no model."
        raise RecipeError(what, where=model, fix="Name an .onnx file, or a folder with config.json and safetensors.")
    if path.suffix in (".onnx", ".pt2"):
        if not path.is_file():
            raise RecipeError("There is no such model file.", where=model, fix="Check the path.")
        return {path.suffix[1:]: str(path)}
    if path.is_file():
        raise RecipeError(
            f"A {path.suffix or 'file without suffix'} is no model that can be read.",
            where=model,
            fix="Give an .onnx or .pt2 file, a Hugging Face folder, or package.module:factory for a torch module.",
        )
    if _FACTORY.match(model):
        return {"module": model}
    if _HUB_ID.match(model):
        return {"huggingface": model}
    raise RecipeError(
        "There is no such model.", where=model, fix="Give a file, a folder, a hub id or package.module:factory."
    )


def _name(source: Any) -> str:
    """Return a name for the build, from the model's own."""
    kinds = ("onnx", "pt2", "huggingface", "module")
    given = next((str(source[k]) for k in kinds if source.get(k)), "") if isinstance(source, dict) else ""
    last = given.rpartition(":")[2] if _FACTORY.match(given) else Path(given).resolve().name if given else ""
    stem = re.sub(r"\.(onnx|pt2)$", "", last)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"
