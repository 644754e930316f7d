"""What a machine must have in common with others for them to compute the same bytes, and what it can build."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import calibrators
import engines
import pipeline
from engines.tensorrt.flavour import Flavour, ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine's software and processor.

    Attributes:
        software: Package to version; this package's own is the hash of its code.
        processor: Its model: kernels are chosen by it, and other kernels round otherwise.
        tensorrt: Version of each TensorRT that can build there.
    """

    software: dict[str, str]
    processor: str
    tensorrt: dict[Flavour, str]


def differing(driver: dict[str, str], there: dict[str, str]) -> str:
    """Return the first package whose version is not the driver's, with both versions; empty if all are."""
    for package, version in driver.items():
        if there.get(package) != version:
            return f"{package} {there.get(package)}, and the driver has {version}"
    return ""


def this_machine() -> Machine:
    """Return the facts of the machine that runs this."""
    software = {name: importlib.metadata.version(name) for name in ("numpy", "onnx", "onnx-ir", "onnxruntime", "numba")}
    found = {flavour: ready(flavour) for flavour in Flavour}
    return Machine(
        software={"enginewright": _code(), "python": platform.python_version(), **software},
        processor=_processor(),
        tensorrt={flavour: version for flavour, version in found.items() if version is not None},
    )


@functools.cache
def _code() -> str:
    """Return a hash of this package's source, which says more than a version: 12 hex digits of SHA-256."""
    total = hashlib.sha256()
    for package in (calibrators, engines, pipeline):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            total.update(f"{root.name}/{file.relative_to(root).as_posix()}\n".encode())
            total.update(file.read_bytes())
    return total.hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
