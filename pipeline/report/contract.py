"""``report.json`` as types: the contract with programs that read it.

Every key is in every report. ``null`` means "not measured" (or "there is none"), never zero; ``not_measured`` of a
target's validation says why. Floats are finite: outputs that are equal bit for bit have ``sqnr_db: null`` beside
``exact: true``. Maps are kept sorted by key, so equal reports give equal text.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import ValidationError, model_validator

from pipeline.content import write_atomically
from pipeline.errors import StoreError
from pipeline.report.measured import Part, Sorted, Validation, VerdictStatus

SCHEMA_VERSION: Final = 1
"""Raised when a key is taken away or changes its meaning; a new key does not raise it."""


class TargetStatus(StrEnum):
    """What became of a target's engine."""

    BUILT = "built"
    """There is an engine, and it is the one that is served."""
    COMPILE_CHECKED = "compile_checked"
    """It compiles for this GPU; the engine itself has to be built on one."""
    SKIPPED = "skipped"
    FAILED = "failed"


class Tensor(Part):
    """An input or output; a dimension is a number, a symbol or null."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Source(Part):
    """The trained model."""

    kind: Literal["onnx", "huggingface", "module", "pt2"]
    name: str
    """File or folder name, hub id, or ``package.module:factory``; no path."""
    task: str | None
    sha256: str | None
    """Of the source's content."""
    opset: int | None
    """Of the canonical FP32 graph."""
    fp32_bytes: int | None
    """Size of the canonical FP32 graph with its weights."""
    max_relative_difference: float | None
    """Canonical FP32 graph against the source's own outputs: max |difference| / max |reference|."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Calibration(Part):
    """How activation ranges were found; all null where nothing was calibrated."""

    samples: int | None
    seconds: float | None
    """Wall-clock seconds of collecting, with the FP32 forward passes."""
    fp32_forward_seconds: float | None
    """Of these, the forward passes."""
    peak_rss_bytes: int | None
    method: str | None
    """As the recipe asked; ``auto`` chooses per tensor (see ``ranges``)."""


class NodePrecision(Part):
    """One node of the precision plan."""

    variant: str
    """Target family: ``cpu``, ``gpu-int8``, …."""
    node: str
    op_type: str
    role: str
    block: int | None
    """Repeated block it is in."""
    precision: str
    rule: str
    """The rule that decided."""


class Histogram(Part):
    """How many values of a tensor lie in each of some bins of equal width."""

    min: float
    """The smallest value, where the first bin begins."""
    max: float
    """The largest value, where the last bin ends."""
    counts: tuple[int, ...]


class TensorRange(Part):
    """The range chosen for one activation tensor."""

    variant: str
    tensor: str
    dtype: str
    method: str
    """The calibrator whose range was taken."""
    min: float
    max: float
    scale: float
    zero_point: int
    alternatives: Sorted[float]
    """Calibrator to its quantization error (mean square over the calibration values), the chosen one among them."""
    options: Sorted[tuple[float, float]]
    """Calibrator to its range."""
    histogram: Histogram | None
    """The tensor's values on the calibration data."""


class Fp16Twin(Part):
    """The same model in FP16, compiled beside the variant: what quantization is to be better than."""

    kernels: int
    bytes_moved: int
    engine_bytes: int
    estimate_ms: float | None


class Kernel(Part):
    """One compiled layer that runs on the GPU."""

    name: str
    kind: str
    types: str
    """Types read and written: ``Int8 x Int8 -> Half``."""
    bytes_moved: int
    nodes: int
    """How many ONNX nodes it came from."""


class Compiled(Part):
    """What the compiler made of the graph."""

    builder: str
    """What compiled it; ``tensorrt-rtx`` is a check, never the engine that Triton's TensorRT backend loads."""
    compute_capability: str
    """``SM80``; a proxy where it is not the target's own."""
    proxy_for: str | None
    """``SM90`` where the check compiled for the nearest GPU instead of the target's own."""
    kernels: int | None
    fused_attention: int | None
    low_precision_flops_share: float | None
    """0 to 1."""
    bytes_moved: int | None
    """Inputs, constants and outputs of every kernel, for one batch."""
    engine_bytes: int | None
    """Size of what the check compiled."""
    estimate_ms: float | None
    """Roofline ESTIMATE of one batch at the data sheet's rates; never a measurement."""
    requested: int | None
    """Matrix products that the plan quantizes."""
    met: int | None
    """Of these, how many run on a kernel with quantized operands."""
    not_met: tuple[str, ...]
    """The others, by node."""
    fp16: Fp16Twin | None
    layers: tuple[Kernel, ...]
    """Every kernel, in execution order."""


class Target(Part):
    """One target's engine."""

    status: TargetStatus
    reason: str | None
    """Why it was not built; null if it was."""
    variant: str | None
    """The variant it is made from."""
    engine: str | None
    """Path in the build directory."""
    bytes: int | None
    """With external data."""
    seconds: float | None
    """To build or check it."""
    compiled: Compiled | None


class Notice(Part):
    """Something to know that stopped nothing."""

    code: str
    message: str
    where: str


class Stage(Part):
    """One stage of the build."""

    name: str
    seconds: float
    """Wall clock, when it last ran."""
    fresh: bool
    """It ran now; ``false``: an earlier result was still good."""


class Report(Part):
    """Everything a build says."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    versions: Sorted[str]
    source: Source
    calibration: Calibration
    precision_plan: tuple[NodePrecision, ...]
    ranges: tuple[TensorRange, ...]
    targets: Sorted[Target]
    validation: Sorted[Validation]
    """The same keys as ``targets``."""
    repository: str | None
    """Path of the served model in the build directory; null if nothing was published."""
    notices: tuple[Notice, ...]
    stages: tuple[Stage, ...]
    manifest: str | None
    """Path in the build directory."""

    @model_validator(mode="after")
    def _same_targets(self) -> Self:
        if set(self.targets) != set(self.validation):
            raise ValueError("targets and validation must have the same keys")
        return self

    @property
    def verdict(self) -> VerdictStatus:
        """Failed if any target failed; passed if every target that was built passed, and one was; else not measured.

        A target without an engine (compile check, skipped) cannot pass, and does not keep the others from passing.
        """
        if any(validation.verdict is VerdictStatus.FAILED for validation in self.validation.values()):
            return VerdictStatus.FAILED
        built = [self.validation[n].verdict for n, t in self.targets.items() if t.status is TargetStatus.BUILT]
        passed = bool(built) and all(verdict is VerdictStatus.PASSED for verdict in built)
        return VerdictStatus.PASSED if passed else VerdictStatus.NOT_MEASURED

    def to_json(self) -> str:
        """Return the text of ``report.json``; equal reports give equal text."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "report.json") -> Report:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            StoreError: The text is no report of this schema version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            raise StoreError(
                f"The report cannot be read: {first['msg']} ({key}).",
                where=where,
                fix="Run `python -m pipeline build` again with this version.",
            ) from error


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of ``report.json``."""
    return Report.model_json_schema(mode="serialization")


def write_json(report: Report, path: Path) -> None:
    """Write ``report.json``, all of it or nothing.

    Raises:
        StoreError: The file cannot be written.
    """
    write_text(path, report.to_json())


def write_text(path: Path, text: str) -> None:
    """Write a file of the report, all of it or nothing.

    Raises:
        StoreError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise StoreError(
            f"The report could not be written: {error.strerror or error}.",
            where=str(path),
            fix="Free some disk space or choose another -o DIR.",
        ) from error
