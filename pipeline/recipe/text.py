"""Between the recipe's types and what people write: YAML, dotted flags, and errors that name the nearest right key.

Nothing here knows a key of the recipe; everything is read from the types, so a new key needs no change.
"""

from __future__ import annotations

import copy
import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline.errors import RecipeError

_CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a key given twice: one of the two would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        RecipeError: The file cannot be read, is no YAML, is no mapping, or names a key twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RecipeError(
            f"The recipe cannot be read: {error.strerror}.",
            where=str(path),
            fix="Check the path, or write one with `python -m pipeline init`.",
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        place, problem = _yaml_problem(error)
        raise RecipeError(
            f"The recipe is no valid YAML: {problem}.",
            where=f"{path}{place}",
            fix="Quote text that holds ':' or starts with one of >, @, *, & and %.",
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(
            "The recipe must be a mapping (key: value).", where=str(path), fix="Start from `python -m pipeline init`."
        )
    return values


def _yaml_problem(error: Exception) -> tuple[str, str]:
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return place, getattr(error, "problem", None) or " ".join(str(error).split())[:200]


def resolve_path(values: dict[str, Any], keys: Sequence[str], folder: Path) -> None:
    """Make the path at ``keys`` start at ``folder``, in place; hub ids and ``module:callable`` are left alone."""
    *parents, last = keys
    section: Any = values
    for key in parents:
        section = section.get(key) if isinstance(section, dict) else None
    text = section.get(last) if isinstance(section, dict) else None
    if isinstance(text, list):
        section[last] = [str(folder / Path(part).expanduser()) if isinstance(part, str) else part for part in text]
    if not isinstance(text, str) or not text:
        return
    resolved = folder / Path(text).expanduser()
    if (last == "huggingface" or _CALLABLE.match(text)) and not resolved.exists():
        return
    section[last] = str(resolved)


def merged(values: Mapping[str, Any], overrides: Mapping[str, str], recipe: type[BaseModel]) -> dict[str, Any]:
    """Return ``values`` with every dotted override set; see :func:`pipeline.recipe.merge`."""
    result: dict[str, Any] = copy.deepcopy(dict(values))
    for dotted, text in overrides.items():
        path, field = find_key(dotted.replace("-", "_"), recipe)
        section = result
        for key in path[:-1]:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[path[-1]] = _value(text, field)
    return result


def find_key(dotted: str, recipe: type[BaseModel]) -> tuple[list[str], FieldInfo | None]:
    """Return the keys that ``dotted`` names and the field; a plain mapping takes the rest of the name as one key.

    Raises:
        RecipeError: There is no such key; names the nearest.
    """
    section, parts, path = recipe, dotted.split("."), list[str]()
    while parts:
        fields = keys_of(section)
        if parts[0] not in fields:
            raise unknown_key(dotted, section, recipe, where="command line", prefix="--")
        field = fields[parts[0]]
        path.append(parts.pop(0))
        inner = section_of(field.annotation)
        if inner is None:
            if parts and dict not in _origins(field.annotation):
                raise RecipeError(
                    f"{'.'.join(path)} has no keys of its own.",
                    where=f"--{dotted}",
                    fix=f"Write --{'.'.join(path)} VALUE.",
                )
            return ([*path, ".".join(parts)], None) if parts else (path, field)
        section = inner
    return path, field


def is_switch(dotted: str, recipe: type[BaseModel]) -> bool:
    """Return whether a key is true or false, so that its flag needs no value."""
    field = find_key(dotted, recipe)[1]
    return field is not None and field.annotation is bool


def _value(text: str, field: FieldInfo | None) -> Any:
    if field is None:
        return text
    leaves = set(leaves_of(field.annotation))
    if text in ("null", "~") and type(None) in leaves:
        return None
    if leaves & {str, Path} and not set(_origins(field.annotation)) & {tuple, list, dict}:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def keys_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section by the name that people write."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds (``None`` for lists of sections and for plain values)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := section_of(part))), None)
    return None


def choices_of(annotation: Any) -> list[str]:
    """Return the values that a field takes, if they are few: those of its enumerations and literals."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in choices_of(part)]


def dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key below ``section``, dotted."""
    for key, field in keys_of(section).items():
        yield f"{prefix}{key}"
        inner = section_of(field.annotation)
        if inner is not None:
            yield from dotted_keys(inner, f"{prefix}{key}.")


def unknown_key(
    dotted: str, section: type[BaseModel], recipe: type[BaseModel], *, where: str, prefix: str = ""
) -> RecipeError:
    """Return the error for a key that ``section`` has not, with the nearest that it or another section has."""
    parent, _, last = dotted.rpartition(".")
    everywhere = list(dotted_keys(recipe))
    near = [f"{parent}.{key}".lstrip(".") for key in difflib.get_close_matches(last, keys_of(section), n=1)]
    if prefix:  # the section itself may be misspelt
        alike = [key for key in everywhere if difflib.SequenceMatcher(None, last, key.rpartition(".")[2]).ratio() > 0.6]
        near = difflib.get_close_matches(dotted, alike, n=1)
    found = near or [key for key in everywhere if key.rpartition(".")[2] == last][:3]
    mean = " or ".join(f"{prefix}{key}" for key in found)
    return RecipeError(
        f"There is no key {prefix}{dotted}" + (f"; did you mean {mean}?" if mean else "."),
        where=where,
        fix=f"The keys of {parent or 'the recipe'} are: {', '.join(keys_of(section))}.",
    )


def explained(error: ValidationError, recipe: type[BaseModel], *, where: str) -> RecipeError:
    """Return pydantic's findings as one error: one line for each key, and what to write instead."""
    lines: dict[str, str] = {}
    fix = ""
    for item in error.errors(include_url=False):
        path, section, field = _walk(item["loc"], recipe)
        if item["type"] == "extra_forbidden":
            unknown = unknown_key(".".join([path, str(item["loc"][-1])]).lstrip("."), section, recipe, where=where)
            lines.setdefault(unknown.what, unknown.what)
            fix = fix or unknown.fix
        elif path not in lines:
            lines[path] = _line(path, item, field)
    return RecipeError("\n".join(lines.values()), where=where, fix=fix or "The keys are described in docs/recipe.md.")


def _walk(loc: tuple[int | str, ...], recipe: type[BaseModel]) -> tuple[str, type[BaseModel], FieldInfo | None]:
    """Return the dotted path, innermost section and field of an error; union branches in ``loc`` are left out."""
    path, section, field = "", recipe, None
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        fields = keys_of(section)
        if part in fields:
            field = fields[part]
            path += f".{part}" if path else part
            section = section_of(field.annotation) or _item_section(field.annotation) or section
        elif field is not None and dict in _origins(field.annotation):
            path += f".{part}"
    return path, section, field


def _line(path: str, item: Any, field: FieldInfo | None) -> str:
    given, said = item["input"], item["msg"]
    name = path or "the recipe"
    if item["type"] == "missing":
        return f"{name}: is missing"
    if item["type"] == "value_error":
        return f"{name}: {item['ctx']['error']}"
    choices = choices_of(field.annotation) if field is not None else []
    if choices and isinstance(given, str):
        near = difflib.get_close_matches(given, choices, n=1)
        return f"{name}: {given!r} is not one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
    if item["type"] in ("model_type", "dict_type"):
        said = "should be a mapping (key: value)"
    shown = repr(given)
    return f"{name}: {shown if len(shown) <= 60 else shown[:57] + '...'}: {said[:1].lower()}{said[1:]}"


def _item_section(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (tuple, list):
        return next((found for part in get_args(annotation) if (found := section_of(part))), None)
    return None


def _origins(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is not None:
        yield origin
        for part in get_args(annotation):
            yield from _origins(part)


def leaves_of(annotation: Any) -> Iterator[Any]:
    """Yield the types that a field takes, without what holds them together."""
    if get_origin(annotation) is None:
        yield annotation
    for part in get_args(annotation):
        yield from leaves_of(part)
