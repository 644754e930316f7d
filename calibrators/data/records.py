"""Records of ``.jsonl`` and ``.txt`` files, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

SUFFIXES = (".jsonl", ".txt")


def records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ``(where, record)`` for every line that is not blank; a ``.txt`` line is ``{"text": line}``.

    Raises:
        DataError: The file is missing or not UTF-8, or a line is no JSON object; names the line.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _json(line, where) if path.suffix.lower() == ".jsonl" else {"text": line.strip()}
    except OSError as error:
        raise DataError(
            f"The file cannot be read: {error.strerror or error}.", where=str(path), fix="Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"The text is not UTF-8: {error.reason}.",
            where=f"{path}, after line {number}",
            fix="Save the file as UTF-8 (`iconv -f latin1 -t utf-8`).",
        ) from error


def _json(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"The line is no JSON: {error}.", where=where, fix="Write one JSON object a line.") from error
    if not isinstance(record, dict):
        raise DataError(
            f"The line is a JSON {type(record).__name__}, no object.", where=where, fix='Write {"text": "..."} a line.'
        )
    return record
