"""Work for the nodes of a cluster: a worker imports it by name."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.types import Progress

STEPS = 8


def slow(result: str, *, scratch: Path, progress: Progress) -> str:
    """Return ``result`` after four seconds."""
    for step in range(STEPS):
        time.sleep(0.5)
        progress("slow", step + 1, STEPS)
    return result
