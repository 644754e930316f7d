"""The lint beside TensorRT for RTX: confusion matrices of every rule about validity, and what the others cost.

``python -m benchmarks.lint_confusion [--graphs 50] [--wild 500]`` prints markdown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time

import numpy as np

from benchmarks.tables import print_header, print_table, progress
from tests.lint.confusion import Matrix, compare, measure
from tests.lint.oracle import Oracle
from tests.lint.placements import ATTENTION, MEASURED, attention, attention_fuses
from tests.lint.suites import SM80, SM89, SUITES, Suite, generate
from tests.lint.wild import wild


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=50, help="faulty and clean graphs for each rule")
    parser.add_argument("--wild", type=int, default=500, help="graphs that are random in everything")
    parser.add_argument("--attention", type=int, default=128, help="placements of pairs in one attention core, at most")
    arguments = parser.parse_args()
    started, cpu = time.perf_counter(), time.process_time()
    with Oracle() as oracle:
        judge = f"tensorrt-rtx-cu12 {importlib.metadata.version('tensorrt-rtx-cu12')}"
        print_header("Lint against TensorRT for RTX", "benchmarks.lint_confusion", [f"judge: {judge}, without a GPU"])
        validity(oracle, arguments.graphs)
        everything(oracle, arguments.wild)
        cores(oracle, arguments.attention)
        costs(oracle)
    print(f"{time.perf_counter() - started:.0f} s, of which {time.process_time() - cpu:.0f} s CPU for the lint itself")


def validity(oracle: Oracle, graphs: int) -> None:
    """One row for each suite; who refused is counted apart."""
    rows = []
    for number, suite in enumerate(SUITES):
        progress(f"{suite.rule}: {suite.what}")
        matrix = measure(suite, graphs, oracle, seed=number)
        rows.append(_row(suite, matrix))
        for text in matrix.strange:
            progress(f"  disagreement: {text}")
    print("TP/FP/TN/FN: an error of the rule against a refusal (or, where silent, a change that nobody reports).\n")
    columns = ("rule", "faulty graphs", "judge", "parser refuses", "builder refuses", "accepts", "flagged")
    print_table((*columns, "clean: accepted", "clean: flagged", "TP", "FP", "TN", "FN"), rows)


def _row(suite: Suite, matrix: Matrix) -> tuple[object, ...]:
    faulty, clean = matrix.outcomes
    crashes = faulty.get("crash", 0)
    builder = f"{faulty.get('builder', 0)}" + (f" and {crashes} crash it" if crashes else "")
    verdicts = (faulty.get("parser", 0), builder, faulty.get("accepted", 0))
    what = f"{suite.what} (silent)" if suite.expect == "silent" else suite.what
    counts = (matrix.true_positive, matrix.false_positive, matrix.true_negative, matrix.false_negative)
    return (
        suite.rule,
        what,
        suite.judge,
        *verdicts,
        matrix.flagged[0],
        clean.get("accepted", 0),
        matrix.flagged[1],
        *counts,
    )


def everything(oracle: Oracle, graphs: int) -> None:
    """All rules together on graphs that are random in every parameter."""
    progress("random graphs")
    matrix = compare(generate(wild, graphs, seed=7), oracle)
    for text in matrix.strange:
        progress(f"  disagreement: {text}")
    found = matrix.outcomes[0]
    print(f"Any error of any rule on {graphs} graphs that are random in every parameter:\n")
    columns = ("parser refuses", "builder refuses", "accepts", "TP", "FP", "TN", "FN")
    counts = (matrix.true_positive, matrix.false_positive, matrix.true_negative, matrix.false_negative)
    print_table(columns, [(*(found.get(k, 0) for k in ("parser", "builder", "accepted")), *counts)])


def cores(oracle: Oracle, most: int) -> None:
    """Every placement of pairs in an attention core: does the rule say what the compiler does?"""
    rows = []
    for name, narrow, capability in (("INT8", False, SM80), ("FP8", True, SM89)):
        progress(f"attention, {name}")
        agree = fused = 0
        chosen = np.random.default_rng(0).permutation(len(ATTENTION))[:most]
        for index in chosen:
            places = ATTENTION[int(index)]
            real = oracle.ask(attention(places, narrow=narrow), capability).compiled.fused_attention == 1
            fused += real
            agree += real is attention_fuses(places, narrow=narrow)
        rows.append((name, f"SM{''.join(map(str, capability))}", len(chosen), fused, len(chosen) - fused, agree))
    print("QDQ209, placements of Q/DQ pairs in one attention core:\n")
    print_table(("type", "GPU", "placements", "fused", "not fused", "the rule agrees"), rows)


def costs(oracle: Oracle) -> None:
    """What the rules about speed are about, compiled both ways."""
    rows = []
    for rule, what, advised, against, capability in MEASURED:
        progress(f"{rule}: {what}")
        good, bad = (oracle.ask(make(), capability).compiled for make in (advised, against))
        share = [f"{100 * (layers.low_precision_flops_share or 0):.0f} %" for layers in (good, bad)]
        moved = (
            f"{good.bytes_moved / 1e3:.0f} → {bad.bytes_moved / 1e3:.0f} ({bad.bytes_moved / good.bytes_moved:.2f} x)"
        )
        rows.append((rule, what, f"{good.kernels} → {bad.kernels}", moved, " → ".join(share)))
    print("Rules about speed: as the rule advises → as it advises against.\n")
    print_table(("rule", "graph", "kernels", "kB moved", "low-precision FLOPs"), rows)


if __name__ == "__main__":
    main()
