from __future__ import annotations

from pathlib import Path

import pytest
from report_samples import latency, metrics, report, slower_report, validation

from pipeline.report import figures
from pipeline.report.headline import worst_output
from pipeline.report.measured import nothing_measured
from pipeline.report.summary import summary_lines, summary_text

BUILD = Path("build/minilm")


def lines(**changes: object) -> list[str]:
    made = validation(**changes)
    return summary_lines(report(validation={"cpu": made, "a100": nothing_measured("-")}), BUILD)


def test_the_summary_says_what_a_user_asks_first() -> None:
    assert summary_lines(report(), BUILD) == [
        "target    cpu",
        "verdict   passed (2 of 2 gates held)",
        "size      58.9 MB (65 % of FP32's 90.4 MB)",
        "accuracy  last_hidden_state: SQNR 16.3 dB, cosine 0.98842 (worst output)",
        "accuracy  embedding-similarity pearson: 0.841, FP32 0.8457",
        "latency   batch 1: 9.87 ms, FP32 17.7 ms (1.79x)",
        "latency   batch 8: 71.2 ms, FP32 130 ms (1.82x)",
        "target    a100: compile checked (no A100 in this machine; compiled for sm80 with TensorRT for RTX)",
        "verdict   not measured (no gates were judged)",
        "time      66.6 s (1 stage kept from before)",
        "notices   1 warning in the report",
        f"engine    {BUILD / 'engines/cpu/model.onnx'} (cpu)",
        f"triton    {BUILD / 'triton/minilm'} (tritonserver --model-repository {BUILD / 'triton'})",
        f"report    {BUILD / 'report.html'}",
    ]


def test_a_slower_engine_is_the_first_line() -> None:
    said = summary_lines(slower_report(), BUILD)
    assert said[0] == "The engine is SLOWER than FP32. cpu: batch 1 takes 20 ms, FP32 10 ms."
    assert "verdict   FAILED (0 of 1 gates held)" in said
    assert "  gate    speedup >= 1: FAILED with 0.5" in said
    assert not any(line.startswith("triton") for line in said)


def test_batches_are_in_order_of_size() -> None:
    rows = {f"b{n}": latency(n, n, 2 * n) for n in (16, 1, 8)}
    said = [line for line in lines(latency_ms=rows) if line.startswith("latency")]
    assert [line.split(":")[0] for line in said] == ["latency   batch 1", "latency   batch 8", "latency   batch 16"]


def test_a_gate_that_could_not_be_judged_says_why() -> None:
    gate = {
        "key": "task.f1",
        "condition": ">= 0.9",
        "value": None,
        "reference": None,
        "passed": None,
        "reason": "no task was named (validate.task)",
    }
    said = lines(gates=[gate], verdict="not_measured", task=None)
    assert "verdict   not measured (0 of 1 gates held)" in said
    assert "  gate    task.f1 >= 0.9: not measured (no task was named (validate.task))" in said


def test_unmeasured_latency_is_said() -> None:
    assert "latency   not measured" in lines(latency_ms=None)


def test_a_simulation_is_marked() -> None:
    assert "accuracy  y: SQNR 12.0 dB, cosine 0.98842 (simulated)" in lines(
        outputs={"y": metrics(12.0)}, mode="simulated"
    )


@pytest.mark.parametrize(
    ("outputs", "worst"),
    [
        ({"a": metrics(30.0), "b": metrics(12.0)}, "b"),
        ({"a": metrics(None, exact=True), "b": metrics(60.0)}, "b"),
        ({"a": metrics(5.0), "b": metrics(60.0, nonfinite=2)}, "b"),
        ({"a": metrics(None, exact_match=0.4, cosine=None), "b": metrics(12.0)}, "a"),
    ],
)
def test_the_worst_output_is_the_one_shown(outputs: dict[str, object], worst: str) -> None:
    found = worst_output(validation(outputs=outputs))
    assert found is not None
    assert found[0] == worst


def test_rich_text_has_the_same_words() -> None:
    for made in (report(), slower_report()):
        assert summary_text(made, BUILD).plain.splitlines() == summary_lines(made, BUILD)
    assert any("red" in str(span.style) for span in summary_text(slower_report(), BUILD).spans)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figures.size(None), "not measured"),
        (figures.size(0), "0 B"),
        (figures.size(999), "999 B"),
        (figures.size(1_500), "1.5 kB"),
        (figures.size(90_359_571), "90.4 MB"),
        (figures.size(3_200_000_000), "3.2 GB"),
        (figures.number(None), "not measured"),
        (figures.number(0.0), "0"),
        (figures.number(1234567), "1,234,567"),
        (figures.number(0.00012345), "0.0001234"),
        (figures.milliseconds(0.1234), "0.123 ms"),
        (figures.milliseconds(129.6), "130 ms"),
        (figures.seconds(0.0123), "0.012 s"),
        (figures.seconds(119.94), "119.9 s"),
        (figures.seconds(3725), "62 min 5 s"),
        (figures.percent(0.913), "91.3 %"),
        (figures.times(None), "not measured"),
        (figures.decibels(15.26), "15.3 dB"),
    ],
)
def test_figures(text: str, expected: str) -> None:
    assert text == expected
