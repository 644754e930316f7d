"""Gates: conditions on stored measurements, judged without running anything.

A gate is a key and a condition, ``sqnr_db: ">= 20"`` or ``task.f1: ">= 99% of fp32"``. The keys:

* an output metric (``sqnr_db``, ``cosine``, ``max_abs``, …): the worst output decides;
* ``outputs.<name>.<metric>``: one output;
* ``task.<metric>``: the engine's task metric;
* ``generation.token_agreement``, ``generation.identical``: prompts continued by the engine as by FP32;
* ``latency_ms.p50`` or ``.p90``: the smallest batch size measured, ``latency_ms.b8.p90`` that of batch 8;
* ``speedup``, ``speedup.b8``: FP32's median latency over the engine's (on a CPU); ``speedup_fp16``, ``speedup_fp16.b8``: the
  FP16 engine's over the engine's (on a GPU);
* ``engine_bytes``.

``% of fp32`` is allowed where FP32 has the same figure: task metrics, latency and size.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from pipeline.errors import RecipeError
from pipeline.validation.lookup import GENERATION, LATENCY, OUTPUT_METRICS, SPEEDUPS, find, require
from pipeline.validation.measurement import Measurements

_CONDITION = re.compile(
    r"\s*(?P<op>>=|<=|>|<)\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(?P<relative>%\s*of\s*fp32)?\s*",
    re.IGNORECASE,
)
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_BATCH = re.compile(r"b[1-9][0-9]*")


class Status(StrEnum):
    """What the gates say together."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_MEASURED = "not_measured"
    """No gate failed, and there was none to judge or one could not be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """One gate, ready to judge.

    Attributes:
        key: Which measurement.
        condition: As the user wrote it.
        op: ``>=``, ``<=``, ``>`` or ``<``.
        number: The bound; a percentage of FP32's figure if ``relative``.
        relative: The bound is relative to FP32.
    """

    key: str
    condition: str
    op: str
    number: float
    relative: bool

    @classmethod
    def parse(cls, key: str, condition: str) -> Threshold:
        """Return the gate ``key: condition``.

        Raises:
            RecipeError: The key names no measurement (the nearest one is named), the condition cannot be read, or
                it is relative to FP32 where FP32 has no such figure.
        """
        where = f"validate.gates.{key}"
        match = _CONDITION.fullmatch(condition)
        if match is None:
            raise RecipeError(
                f"{condition!r} is not a condition.", where=where, fix="Write '>= 20' or '>= 99% of fp32'."
            )
        relative = match["relative"] is not None
        _check_key(key, where)
        if relative and not key.startswith(("task.", "latency_ms.")) and key != "engine_bytes":
            raise RecipeError(
                f"{key} has no FP32 figure to be a percentage of: it already compares with FP32.",
                where=where,
                fix="Write an absolute condition, such as '>= 20'.",
            )
        return cls(key=key, condition=condition, op=match["op"], number=float(match["number"]), relative=relative)

    def holds(self, value: float, reference: float | None) -> bool:
        """Return whether ``value`` satisfies the condition; ``reference`` is FP32's figure, if it is relative."""
        bound = self.number / 100.0 * reference if self.relative and reference is not None else self.number
        return _OPERATORS[self.op](value, bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """How one gate came out.

    Attributes:
        value: The measurement; ``None`` if there is none, or if it is infinite (``reason`` says which).
        reference: FP32's figure, where there is one.
        passed: ``None`` if it could not be judged.
        reason: Why it could not, or what ``value`` does not show.
    """

    key: str
    condition: str
    value: float | None
    reference: float | None
    passed: bool | None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gates say."""

    status: Status
    gates: tuple[GateResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return ``{verdict, gates}``, JSON-ready."""
        return {"verdict": str(self.status), "gates": [asdict(gate) for gate in self.gates]}


def parse_gates(gates: Mapping[str, str]) -> tuple[Threshold, ...]:
    """Return the recipe's gates, checked, in their order.

    Raises:
        RecipeError: As for :meth:`Threshold.parse`.
    """
    return tuple(Threshold.parse(key, condition) for key, condition in gates.items())


def judge(measurements: Measurements, gates: Mapping[str, str]) -> Verdict:
    """Return the verdict of ``gates`` on stored measurements; nothing is run.

    One failed gate is enough for ``failed``. Without a gate, or with one whose measurement is missing, the verdict is
    ``not_measured``.

    Raises:
        RecipeError: As for :meth:`Threshold.parse`, and for an output or task metric that the measurements show not
            to exist.
    """
    results = tuple(_judge_one(measurements, threshold) for threshold in parse_gates(gates))
    if any(result.passed is False for result in results):
        status = Status.FAILED
    elif results and all(result.passed for result in results):
        status = Status.PASSED
    else:
        status = Status.NOT_MEASURED
    return Verdict(status=status, gates=results)


def _judge_one(measurements: Measurements, threshold: Threshold) -> GateResult:
    found = find(measurements, threshold.key)
    passed: bool | None = None
    reason = found.reason
    if found.broken:
        passed = False
    elif found.value is not None and threshold.relative and found.reference is None:
        reason = "FP32 was not measured beside it"
    elif found.value is not None:
        passed = threshold.holds(found.value, found.reference)
    finite = found.value is not None and math.isfinite(found.value)
    return GateResult(
        key=threshold.key,
        condition=threshold.condition,
        value=found.value if finite else None,
        reference=found.reference,
        passed=passed,
        reason=reason,
    )


def _check_key(key: str, where: str) -> None:
    """Refuse a key that no measurement can have."""
    parts = key.split(".")
    if key in (*OUTPUT_METRICS, *SPEEDUPS, "engine_bytes"):
        return
    if parts[0] == "outputs" and len(parts) >= 3:
        require(parts[-1], OUTPUT_METRICS, where, prefix=".".join(parts[:-1]) + ".")
        return
    if parts[0] == "task" and len(parts) >= 2 and all(parts):
        return
    if parts[0] == "generation" and len(parts) == 2:
        require(parts[1], GENERATION, where, prefix="generation.")
        return
    if parts[0] == "latency_ms" and (len(parts) == 2 or (len(parts) == 3 and _BATCH.fullmatch(parts[1]))):
        require(parts[-1], LATENCY, where, prefix=".".join(parts[:-1]) + ".")
        return
    if parts[0] in SPEEDUPS and len(parts) == 2 and _BATCH.fullmatch(parts[1]):
        return
    known = [*OUTPUT_METRICS, *SPEEDUPS, "engine_bytes", "latency_ms.p50", "latency_ms.p90", "task.accuracy", "task.f1"]
    require(key, known, where)
