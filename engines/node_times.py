"""How long each node takes in ONNX Runtime on this machine, from its own profiler."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import EngineError
from pipeline.running.session import run, session
from pipeline.types import Feeds

REPEATS = 15
WARM_UP = 2


def node_times(model: Path, feeds: Sequence[Feeds], *, threads: int = 1) -> dict[str, float]:
    """Return node name to the median milliseconds of its kernel over repeated runs; fused nodes keep their own name.

    Args:
        model: The model as it is served (graph optimizations on).
        feeds: Batches, taken in turn.
        threads: Intra-op threads.

    Raises:
        EngineError: The model cannot run, or there is no data.
    """
    if not feeds:
        raise EngineError("There is no data to profile with.", where=str(model), fix="Give --calibration DATA.")
    with tempfile.TemporaryDirectory() as folder:
        live = session(model, threads=threads, profile=Path(folder) / "profile", spin=True)
        for index in range(WARM_UP + REPEATS):
            run(live, None, dict(feeds[index % len(feeds)]))
        events = json.loads(Path(live.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
    return {name: statistics.median(values[WARM_UP:] or values) for name, values in times.items()}
