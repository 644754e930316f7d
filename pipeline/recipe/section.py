"""What every section of the recipe shares."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: unknown keys fail, values do not change after they were checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True, populate_by_name=True
    )


def listed(value: Any) -> Any:
    """Let a list be written as one value (``cpu``, ``1``) or as text with commas (``cpu,a100``)."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) else value
