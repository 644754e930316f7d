"""What this machine can do, and what to install for the rest. Looks; imports and changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from engines.compile_check import CHECKABLE, available, checked_capability
from engines.target import Target, targets
from engines.tensorrt.flavour import Flavour, installed
from engines.tensorrt.gpus import gpus
from pipeline.table import Table

_GIB = 1 << 30

# Module, what it is for, and how to get it.
_PACKAGES = (
    ("onnx", "reads and checks models", "pip install ."),
    ("onnxruntime", "calibrates, validates, runs the cpu engine", "pip install ."),
    ("numba", "collects statistics", "pip install ."),
    ("torch", "exports torch and Hugging Face models", "pip install '.[torch]'"),
    ("transformers", "exports Hugging Face models", "pip install '.[torch]'"),
    ("tokenizers", "reads text data", "pip install '.[text]'"),
    ("PIL", "reads image data", "pip install '.[images]'"),
    ("tritonclient", "checks config.pbtxt with Triton's own definition", "pip install '.[triton]'"),
    ("tensorrt_rtx", "checks without a GPU that a graph compiles for one", "pip install '.[rtx]'"),
    ("ray", "sends work to the nodes of a cluster", "pip install '.[ray]'"),
)
_DISTRIBUTIONS = {
    "PIL": ("pillow",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt_rtx": ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "tensorrt-rtx"),
}
# Flags of /proc/cpuinfo that decide which INT8 kernels ONNX Runtime takes.
_CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "amx_int8": "AMX INT8",
    "asimddp": "dot product",
    "i8mm": "INT8 matmul",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An installed or missing package; ``version`` is ``None`` if it is missing."""

    module: str
    version: str | None
    purpose: str
    install: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that the driver lists."""

    name: str
    compute_capability: str
    memory: str
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """What a build on this machine does for a target: ``built``, ``compile_checked`` or ``skipped``, and why."""

    target: str
    title: str
    status: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything :func:`examine` found."""

    python: str
    system: str
    cpu: str
    cores: int
    cpu_features: tuple[str, ...]
    memory_gib: float
    memory_free_gib: float
    disk_free_gib: float
    gpus: tuple[Gpu, ...]
    packages: tuple[Package, ...]
    targets: tuple[TargetStatus, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON."""
        return asdict(self)

    def tables(self) -> tuple[Table, ...]:
        """Return the findings for people: machine, packages, targets."""
        gpus = "; ".join(f"{g.name} (SM{g.compute_capability.replace('.', '')}, {g.memory})" for g in self.gpus)
        machine = (
            ("python", self.python),
            ("system", self.system),
            ("cpu", f"{self.cpu}, {self.cores} cores"),
            ("cpu features", ", ".join(self.cpu_features) or "none known"),
            ("memory", f"{self.memory_gib:.1f} GiB, {self.memory_free_gib:.1f} free"),
            ("disk here", f"{self.disk_free_gib:.1f} GiB free"),
            ("gpus", gpus or "none"),
        )
        packages = tuple(
            (p.module, p.version or "missing", p.purpose, "" if p.version else p.install) for p in self.packages
        )
        status = tuple((t.target, t.title, t.status, t.reason) for t in self.targets)
        return (
            Table(title="this machine", columns=("what", "found"), rows=machine),
            Table(title="packages", columns=("package", "version", "for", "to install"), rows=packages),
            Table(title="targets", columns=("target", "device", "here", "why"), rows=status),
        )


def examine(folder: Path = Path()) -> Findings:
    """Look at this machine; ``folder`` is where free disk space matters."""
    memory = psutil.virtual_memory()
    return Findings(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_field("model name") or platform.processor() or platform.machine(),
        cores=psutil.cpu_count(logical=True) or 1,
        cpu_features=_cpu_features(),
        memory_gib=round(memory.total / _GIB, 2),
        memory_free_gib=round(memory.available / _GIB, 2),
        disk_free_gib=round(shutil.disk_usage(folder).free / _GIB, 2),
        gpus=_gpus(),
        packages=tuple(Package(module=m, version=_version(m), purpose=p, install=i) for m, p, i in _PACKAGES),
        targets=tuple(_status(target) for target in targets()),
    )


def _version(module: str) -> str | None:
    """Return a package's version without importing it."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in _DISTRIBUTIONS.get(module, (module,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "present"


def _cpu_field(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def _cpu_features() -> tuple[str, ...]:
    flags = set((_cpu_field("flags") or _cpu_field("Features")).split())
    return tuple(title for flag, title in _CPU_FEATURES.items() if flag in flags)


def _gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that ``nvidia-smi`` lists; none without it or without a driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        said = subprocess.run(
            [command, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines()]
    return tuple(
        Gpu(name=row[0], compute_capability=row[1], memory=row[2], driver=row[3]) for row in rows if len(row) == 4
    )


def _status(target: Target) -> TargetStatus:
    if target.runtime == "onnxruntime":
        built = _version("onnxruntime") is not None
        status, reason = ("built", "ONNX Runtime") if built else ("skipped", "install onnxruntime: pip install .")
    else:
        status, compiled = _compile_check(target)
        precisions = ", ".join(sorted(target.precisions, key=str))
        where = _engine_place(target)
        status = "built" if where == "built here" else status
        reason = f"{target.sm} has {precisions}; its ONNX is made and simulated here{compiled}, its engine is {where}"
    return TargetStatus(target=target.name, title=target.title, status=status, reason=reason)


def _engine_place(target: Target) -> str:
    """Return where a GPU target's engine is built."""
    if target.runtime == "tensorrt-rtx":
        return "built here" if available() else "built anywhere with '.[rtx]'"
    here = any(gpu.capability == target.compute_capability for gpu in gpus())
    if here and installed(Flavour.TENSORRT) is not None:
        return "built here"
    return "built with '.[tensorrt]' here" if here else "built on that GPU with '.[tensorrt]'"


def _compile_check(target: Target) -> tuple[str, str]:
    """Return a GPU target's status, and what is to be said about compiling for it."""
    capability = checked_capability(target.compute_capability or (0, 0))
    if capability is None or not available():
        return "skipped", " (with '.[rtx]' also compiled)" if capability else ""
    proxy = "" if capability == target.compute_capability else ", its nearest"
    return "compile_checked", f" and compiled for {CHECKABLE[capability]}{proxy}"
