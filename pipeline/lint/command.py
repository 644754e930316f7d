"""What the ``lint`` command does: lint or repair, and say so in the format asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.lint.finding import Report
from pipeline.lint.lint import fix, lint_path
from pipeline.lint.sarif import as_sarif
from pipeline.lint.show import as_json, as_text

EXIT_ERRORS = 3
FORMATS: Mapping[str, Callable[[Sequence[Report]], str]] = {"text": as_text, "json": as_json, "sarif": as_sarif}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What to print on stdout, what to say beside it on stderr, and the exit code: 3 if there are errors."""

    text: str
    remark: str
    exit_code: int


def run(path: Path, *, target: str | None, form: str, repair: bool, out: Path | None) -> Outcome:
    """Lint ``path``, or repair it into ``out`` and lint that.

    Raises:
        ModelError: A file is no ONNX model.
        RecipeError: The target, the format or the combination of flags.
        StoreError: ``out`` cannot be written.
    """
    if form not in FORMATS:
        raise RecipeError(f"There is no format {form!r}.", where="--format", fix=f"Write one of {', '.join(FORMATS)}.")
    if repair is not (out is not None):
        raise RecipeError("--fix and -o FILE go together.", where="command line", fix="Write --fix -o FIXED.onnx.")
    remark = ""
    if out is None:
        reports: Sequence[Report] = lint_path(path, target=target)
    else:
        fixed = fix(path, out, target=target)
        reports = (fixed.report,)
        done = ", ".join(f"{count} x {rule}" for rule, count in fixed.changes)
        remark = f"wrote {out}; repaired {done or 'nothing'}"
    errors = any(report.has_errors for report in reports)
    return Outcome(text=FORMATS[form](reports), remark=remark, exit_code=EXIT_ERRORS if errors else 0)
