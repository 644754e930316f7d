from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import latency, plan, ranges, report, slower_report, validation

from pipeline.errors import MissingError
from pipeline.report.contract import Calibration, Notice, Report
from pipeline.report.html import render, write_html
from pipeline.report.measured import nothing_measured

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Text by element, tags that are open, and every attribute: what a browser would make of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.cells: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "dd", "li"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag or tag == "p", f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)
            if {"td", "dd", "li"} & set(self.open):
                self.cells[-1] += data


HOSTILE = "<script>alert('x')</script>\"onmouseover=\"y"


def hostile() -> Report:
    node = plan(1)[0].model_copy(update={"node": HOSTILE, "rule": HOSTILE, "precision": '"><script>'})
    chosen = ranges(1)[0].model_copy(update={"tensor": HOSTILE})
    return report(
        name="a<b>",
        precision_plan=(node,),
        ranges=(chosen,),
        notices=(Notice(code="x", message=HOSTILE, where=HOSTILE),),
    )


def test_every_name_is_escaped() -> None:
    page = Page(render(hostile()))
    assert page.tags.count("script") == 1
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert HOSTILE in page.cells
    assert page.open == []


def test_on_a_gpu_the_engine_is_compared_with_fp16() -> None:
    made = report()
    times = {"p50": 4.0, "p90": 4.0, "min": 4.0, "max": 4.0, "cpu_p50": None}
    row = {
        **latency(8, 2.0, 1.0),
        "cpu_p50": None,
        "fp32": None,
        "speedup": None,
        "speedup_min": None,
        "speedup_cpu": None,
        "fp16": times,
        "speedup_fp16": 2.0,
    }
    on_gpu = validation(latency_ms={"b8": row}, device="NVIDIA A100, driver 580.1, TensorRT 10.13")
    said = render(made.model_copy(update={"validation": {**made.validation, "cpu": on_gpu}}))
    assert "of FP16&#39;s speed" in said or "of FP16's speed" in said
    assert "NVIDIA A100, driver 580.1" in said
    assert "FP16 over engine" in said


@pytest.mark.parametrize("made", [report(), slower_report(), hostile()])
def test_the_page_is_well_formed_and_needs_no_network(made: Report) -> None:
    text = render(made)
    page = Page(text)
    assert page.open == []
    assert not re.findall(r"https?://|//[a-z]", text)
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    links = [value for tag, name, value in page.attributes if name in ("src", "href", "action")]
    assert all(value and value.startswith("#") for value in links)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link} <= set(ids)
    assert "default-src 'none'" in text


def test_tables_can_be_reached_and_filtered_from_the_keyboard() -> None:
    page = Page(render(report()))
    scrolls = page.attributes.count(("div", "class", "scroll"))
    assert (
        scrolls == page.attributes.count(("div", "tabindex", "0")) == page.attributes.count(("div", "role", "region"))
    )
    boxes = {value for tag, name, value in page.attributes if (tag, name) == ("input", "data-table")}
    tables = {value for tag, name, value in page.attributes if (tag, name) == ("table", "id")}
    assert {"plan-table", "range-table"} <= boxes == tables
    labels = {value for tag, name, value in page.attributes if (tag, name) == ("label", "for")}
    assert labels == {value for tag, name, value in page.attributes if (tag, name) == ("input", "id")}


def test_the_verdict_and_a_slower_engine_come_first() -> None:
    text = " ".join("".join(Page(render(slower_report())).text).split())
    slower = text.index("The engine is SLOWER than FP32. cpu: batch 1 takes 20 ms, FP32 10 ms.")
    assert text.index("verdict: failed") < slower < text.index("Size")


def test_nothing_slower_no_alarm() -> None:
    assert "SLOWER" not in render(report())


def test_what_was_not_measured_is_never_zero() -> None:
    made = report(
        targets={"cpu": report().targets["cpu"].model_copy(update={"bytes": None, "seconds": None})},
        validation={"cpu": nothing_measured("no data was given")},
        calibration=Calibration(
            samples=None, seconds=None, fp32_forward_seconds=None, peak_rss_bytes=None, method=None
        ),
        source=report().source.model_copy(update={"fp32_bytes": None, "max_relative_difference": None}),
        precision_plan=(),
        ranges=(),
        stages=(),
    )
    page = Page(render(made))
    shown = [" ".join(cell.split()) for cell in page.cells]
    assert sum("not measured" in cell for cell in shown) >= 8
    figures = [cell for cell in shown if re.search(r"(?<![\w.])0(\.0+)?( |%|$)", cell)]
    assert figures == []
    assert "no data was given" in "".join(page.text)


def test_every_fact_of_the_plan_is_shown() -> None:
    cells = Page(render(report())).cells
    for node in report().precision_plan:
        assert node.node in cells
        assert node.rule in cells
    for reading in ("16.3 dB", "58.9 MB", "130 ms", "1.82x"):
        assert any(reading in cell for cell in cells), reading


def test_same_report_same_page() -> None:
    assert render(report()) == render(Report.from_json(report().to_json()))


def test_zero_milliseconds_draw_no_bar_and_break_nothing() -> None:
    row = latency(1, 1.0, 1.0) | {"p50": 0.0, "fp32": {"p50": 0.0, "p90": 0.0, "min": 0.0, "max": 0.0, "cpu_p50": 0.0}}
    made = report(validation={"cpu": validation(latency_ms={"b1": row}), "a100": nothing_measured("-")})
    assert Page(render(made)).open == []


def test_write(tmp_path: Path) -> None:
    write_html(report(), tmp_path / "out" / "report.html")
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == render(report())


def test_without_jinja_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingError) as caught:
        render(report())
    assert "jinja2" in caught.value.fix
