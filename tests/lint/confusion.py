"""The lint's verdicts beside TensorRT's, counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from pipeline.lint.finding import Finding, Severity
from pipeline.lint.lint import gpu, lint
from tests.lint.oracle import Oracle, Verdict
from tests.lint.suites import Case, Suite, generate


@dataclass
class Matrix:
    """Counts of one suite.

    Attributes:
        flagged: Of the faulty and of the clean graphs: those in which the rule found something.
        outcomes: Of the faulty and of the clean graphs: how many the parser refused, the builder refused, were accepted.
        wrong: (true, false) positives and negatives: flagged as an error against refused (or computed otherwise).
        strange: Graphs where the two disagree, to look into.
    """

    flagged: tuple[int, int] = (0, 0)
    outcomes: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    true_positive: int = 0
    false_positive: int = 0
    true_negative: int = 0
    false_negative: int = 0
    strange: list[str] = field(default_factory=list)

    def count(self, *, error: bool, wrong: bool, about: str) -> None:
        name = ("true" if error is wrong else "false") + ("_positive" if error else "_negative")
        setattr(self, name, getattr(self, name) + 1)
        if error is not wrong:
            self.strange.append(about)


def findings(case: Case) -> tuple[Finding, ...]:
    """Return what the lint finds in a case."""
    model = ir.serde.deserialize_model(onnx.load_model_from_string(case.model))
    return lint(model, name="case", target=gpu(case.target)).findings


def measure(suite: Suite, count: int, oracle: Oracle, seed: int) -> Matrix:
    """Generate ``count`` faulty and ``count`` clean graphs and ask both sides about each."""
    matrix = Matrix()
    flagged = [0, 0]
    for which, make in enumerate((suite.faulty, suite.clean)):
        for index, case in enumerate(generate(make, count, seed)):
            found = [f for f in findings(case) if f.rule == suite.rule]
            verdict = _ask(suite, case, oracle)
            tally = matrix.outcomes[which]
            tally[verdict.outcome] = tally.get(verdict.outcome, 0) + 1
            flagged[which] += bool(found)
            error = bool(found) if suite.judge == "onnx" else any(f.severity is Severity.ERROR for f in found)
            # What a silent change did cannot be seen without a GPU: its generator says that there is one.
            wrong = verdict.refused or (suite.expect == "silent" and which == 0)
            about = f"{('faulty', 'clean')[which]} {index}: {[f.message for f in found]} / {verdict.message}"
            matrix.count(error=error, wrong=wrong, about=about)
    matrix.flagged = (flagged[0], flagged[1])
    return matrix


def compare(cases: Sequence[Case], oracle: Oracle) -> Matrix:
    """Compare any error of any rule with any refusal; what is an error because it is silent is left to :func:`measure`."""
    matrix = Matrix()
    for index, case in enumerate(cases):
        errors = [f for f in findings(case) if f.severity is Severity.ERROR]
        verdict = oracle.ask(case.model, case.capability)
        tally = matrix.outcomes[0]
        tally[verdict.outcome] = tally.get(verdict.outcome, 0) + 1
        silent = bool(errors) and not verdict.refused and all(_silent(f) for f in errors)
        about = f"{index} {case.target}: {[(f.rule, f.message) for f in errors]} / {verdict.outcome} {verdict.message}"
        matrix.count(error=bool(errors), wrong=verdict.refused or silent, about=about)
    return matrix


def _silent(finding: Finding) -> bool:
    said = ("without a word", "the parser does not see it", "TensorRT reads blocks")
    return finding.rule == "QDQ106" or any(text in finding.message for text in said)


def _ask(suite: Suite, case: Case, oracle: Oracle) -> Verdict:
    if suite.judge == "tensorrt-rtx":
        return oracle.ask(case.model, case.capability)
    try:
        onnx.checker.check_model(onnx.load_model_from_string(case.model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Verdict(outcome="parser", message=str(error))
    return Verdict(outcome="accepted")
