"""The summary at the end of a build, for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.report.contract import Report, TargetStatus
from pipeline.report.figures import NOT_MEASURED, number, seconds
from pipeline.report.headline import Headline, headlines, slower_engines
from pipeline.report.measured import Gate, VerdictStatus

if TYPE_CHECKING:
    from rich.text import Text

_WORDS = {
    VerdictStatus.PASSED: "passed",
    VerdictStatus.FAILED: "FAILED",
    VerdictStatus.NOT_MEASURED: NOT_MEASURED,
}
HELD_OUT = "validation/heldout.npz"
"""Samples kept in a build directory, so that a GPU can measure with it alone."""
_STYLES = {"passed": "bold green", "FAILED": "bold red", NOT_MEASURED: "bold yellow"}


def summary_lines(report: Report, folder: Path) -> list[str]:
    """Return the summary as plain lines.

    A build whose engine is slower than FP32 says so in the first line; then, for each target, the verdict with the
    gates that failed, size, accuracy and latency against FP32; at the end where the files are.

    Args:
        report: The build's report.
        folder: The build directory, as the user should read it.
    """
    slower = slower_engines(report)
    lines = [slower] if slower else []
    for headline in headlines(report):
        lines += _target(report, headline, folder)
    fresh = [stage.seconds for stage in report.stages if stage.fresh]
    if report.stages:
        kept = len(report.stages) - len(fresh)
        lines.append(
            f"time      {seconds(sum(fresh))}" + (f" ({_count(kept, 'stage')} kept from before)" if kept else "")
        )
    if report.notices:
        lines.append(f"notices   {_count(len(report.notices), 'warning')} in the report")
    return lines + _files(report, folder)


def summary_text(report: Report, folder: Path) -> Text:
    """Return the same summary for rich: the verdict and a slower engine in colour."""
    from rich.text import Text

    text = Text()
    for line in summary_lines(report, folder):
        row = Text(line + "\n")
        if line.startswith("The engine is SLOWER"):
            row.stylize("bold red")
        elif line.startswith(("verdict", "  gate")):
            for word, style in _STYLES.items():
                row.highlight_words([word], style)
        text.append_text(row)
    text.rstrip()
    return text


def _target(report: Report, headline: Headline, folder: Path) -> list[str]:
    name = headline.target
    if headline.status is not TargetStatus.BUILT:
        status = str(headline.status).replace("_", " ")
        lines = [f"target    {name}: {status}" + (f" ({headline.reason})" if headline.reason else "")]
    else:
        lines = [f"target    {name}"]
    lines.append(f"verdict   {_WORDS[headline.verdict]}{_why(report, headline)}")
    lines += [f"  gate    {_gate(gate)}" for gate in report.validation[name].gates if gate.passed is not True]
    note = " (simulated)" if headline.simulated else ""
    figures = [f"accuracy  {line}{note}" for line in headline.accuracy or (NOT_MEASURED,)]
    figures += [f"latency   {line}" for line in headline.latency or (NOT_MEASURED,)]
    if headline.status is TargetStatus.BUILT:
        return [*lines, f"size      {headline.size}", *figures]
    # Without an engine most figures do not exist; the verdict line has said "not measured" once.
    lines += [line for line in figures if not line.endswith(NOT_MEASURED)]
    if headline.simulated and (folder / HELD_OUT).is_file():
        lines.append(
            f"measure   there: python -m pipeline validate {folder} --target {name} (it needs this folder only)"
        )
    return lines


def _gate(gate: Gate) -> str:
    value = "" if gate.value is None else f" with {number(gate.value)}"
    result = "FAILED" if gate.passed is False else NOT_MEASURED
    return f"{gate.key} {gate.condition}: {result}{value}" + (f" ({gate.reason})" if gate.reason else "")


def _count(number_of: int, what: str) -> str:
    return f"{number_of} {what}" + ("" if number_of == 1 else "s")


def _why(report: Report, headline: Headline) -> str:
    gates = report.validation[headline.target].gates
    if headline.verdict is VerdictStatus.NOT_MEASURED and not gates:
        return " (no gates were judged)"
    held = sum(gate.passed is True for gate in gates)
    return f" ({held} of {len(gates)} gates held)"


def _files(report: Report, folder: Path) -> list[str]:
    lines = [
        f"engine    {folder / target.engine} ({name})"
        for name, target in report.targets.items()
        if target.engine is not None
    ]
    if report.repository is not None:
        repository = folder / report.repository
        lines.append(f"triton    {repository} (tritonserver --model-repository {repository.parent})")
    lines.append(f"report    {folder / 'report.html'}")
    return lines
