"""The template that turns a record into text: ``{field}`` and ``{field.inner}``, nothing that runs code."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from string import Formatter
from typing import Any

from pipeline.errors import DataError


class Template:
    """A checked template such as ``"{question} {context}"``; ``{{`` and ``}}`` are literal braces.

    Args:
        text: The template.

    Raises:
        DataError: Its braces do not match, it names no field, or it asks for more than a field's value.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise DataError(
                f"The template is malformed: {error}.",
                where=f"template {text!r}",
                fix="Write it like '{title} {text}'.",
            ) from error
        for _, field, spec, conversion in parts:
            if field is not None and (not field or "[" in field or spec or conversion):
                raise DataError(
                    f"The template's field {{{field}}} is not a plain name.",
                    where=f"template {text!r}",
                    fix="Use {name}, or {outer.inner} for nested records.",
                )
        self._parts = [(literal, field) for literal, field, _, _ in parts]
        if not any(field for _, field in self._parts):
            raise DataError(
                "The template names no field, so every sample would be the same.",
                where=f"template {text!r}",
                fix="Put a field in it, for example {text}.",
            )

    def render(self, record: Mapping[str, Any], where: str) -> str:
        """Return the text for one record.

        Raises:
            DataError: A field is missing or is neither text nor a number; names the line and the field.
        """
        return "".join(literal + (_value(record, field, where) if field else "") for literal, field in self._parts)


def _value(record: Mapping[str, Any], field: str, where: str) -> str:
    found: Any = record.get(field)
    if field not in record:
        found = record
        for part in field.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise _missing(field, record, where)
            found = found[part]
    if isinstance(found, str):
        return found
    if isinstance(found, (bool, int, float)):
        return str(found)
    raise DataError(
        f"The field {field!r} holds {_kind(found)}, which is no text.",
        where=where,
        fix="Name a field that holds text in `template`.",
    )


def _missing(field: str, record: Mapping[str, Any], where: str) -> DataError:
    near = difflib.get_close_matches(field, map(str, record), n=1)
    names = ", ".join(map(str, record)) or "none"
    hint = f"Did you mean {{{near[0]}}}? " if near else ""
    return DataError(
        f"The record has no field {field!r}; it has {names}.",
        where=where,
        fix=f"{hint}Set `template` to the fields that the records have.",
    )


def _kind(value: object) -> str:
    return {type(None): "null", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
