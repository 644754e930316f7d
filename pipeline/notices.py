"""Things a user should know that stop nothing: said when they happen, kept in the report.

A notice goes through :mod:`logging` (logger ``pipeline.notice``), so a caller from Python sees it with no set-up.
:func:`collecting` gathers the notices of a block, so that a stage which is skipped because its result is already
there says again what it said when it ran.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass

_log = logging.getLogger("pipeline.notice")
_collected: contextvars.ContextVar[tuple[list[Notice], ...]] = contextvars.ContextVar("collected", default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One thing to know: a stable ``code`` (``few-samples``), a sentence, and what it concerns."""

    code: str
    message: str
    where: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the three fields as JSON-ready text."""
        return asdict(self)


def notice(code: str, message: str, *, where: str = "") -> None:
    """Say something the user should know, without stopping."""
    item = Notice(code=code, message=message, where=where)
    for sink in _collected.get():
        if item not in sink:
            sink.append(item)
    _log.warning("%s%s", message, f" ({where})" if where else "", extra={"notice": item})


@contextlib.contextmanager
def collecting() -> Iterator[list[Notice]]:
    """Gather every notice given inside the block, each once, in order."""
    sink: list[Notice] = []
    token = _collected.set((*_collected.get(), sink))
    try:
        yield sink
    finally:
        _collected.reset(token)
