"""Markdown tables, and the lines that say where their figures come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

NOT_MEASURED = "not measured"
PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "numba")


def print_header(title: str, module: str, notes: Iterable[str] = ()) -> None:
    """Print a heading with the machine, the versions and the command of this run."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"## {title}\n")
    print(f"- machine: {machine()}")
    print(f"- versions: Python {platform.python_version()}, {versions}")
    command = " ".join(["python -m", module, *map(_shown, sys.argv[1:])])
    print(f"- command: `{command}`")
    for note in notes:
        print(f"- {note}")
    print(flush=True)


def machine() -> str:
    """Return the processor, its cores, the matrix instructions that decide INT8's speed, and the memory."""
    model, flags = platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
        fields = {name.strip(): value.strip() for name, value in lines}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    found = [n for n in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if n in flags.split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {', '.join(found) or 'no wide vectors'}, {memory:.0f} GiB"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a markdown table."""
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median with the least and the greatest value."""
    if not values:
        return NOT_MEASURED
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"


def progress(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def _shown(argument: str) -> str:
    """Return an argument without the folders of an absolute path, which are of this machine."""
    if not Path(argument).is_absolute():
        return shlex.quote(argument)
    parts = Path(argument).parts
    return "…/" + "/".join(parts[-3:] if "bin" in parts[-2:] else parts[-1:])
