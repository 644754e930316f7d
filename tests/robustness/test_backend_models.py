"""Every model of onnx's backend tests becomes a valid variant that runs, or is refused with a clean error."""

from __future__ import annotations

import time

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.backend_models import DEFECTS, KINDS, Case, cases
from benchmarks.robustness import Outcome, outcomes, table

pytestmark = pytest.mark.filterwarnings("ignore")


def defects(found: list[Outcome]) -> str:
    return "\n".join(f"{o.name}: {o.status} {o.kind} {o.detail}" for o in found if o.status in DEFECTS)


def test_a_sample_of_the_backend_models() -> None:
    chosen = [*cases(("node",), every=60), *cases(KINDS[1:], every=9)]
    found = list(outcomes(chosen))
    assert len(found) == len(chosen) > 40
    assert not defects(found)
    assert sum(o.status == "quantized" for o in found) >= 3
    assert all(db > 10 for o in found if o.status == "quantized" for db in o.sqnr_db.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_backend_models(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = cases()
    found = list(outcomes(chosen))
    with capsys.disabled():
        print("\n" + table(found))  # noqa: T201
    assert len(found) == len(chosen) > 2000
    assert not defects(found)
    assert sum(o.status == "quantized" for o in found) > 150
    assert sum(o.status == "refused" for o in found) < 500


def test_a_hang_and_a_crash_are_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: a worker that stops answering is replaced, and the models after it still run."""
    from benchmarks import robustness

    monkeypatch.setattr(robustness, "_work", _misbehave)
    monkeypatch.setattr(robustness, "START_SECONDS", 20.0)
    chosen = [Case(name=n, model=b"", feeds=None, expected=None) for n in ("fine", "hang", "fine", "crash", "fine")]
    start = time.monotonic()
    found = sorted((o.name, o.status) for o in outcomes(chosen, workers=1, timeout=-18.0))
    assert found == [("crash", "crash"), *[("fine", "refused")] * 3, ("hang", "hang")]
    assert time.monotonic() - start < 100


def _misbehave(pipe) -> None:
    import os

    while True:
        case = pipe.recv()
        if case.name == "hang":
            time.sleep(1000)
        if case.name == "crash":
            os._exit(7)
        pipe.send(Outcome(name=case.name, status="refused"))


def test_a_model_of_a_newer_label_is_quantized(tmp_path) -> None:
    """The newest onnx package labels every model with its own IR version, which ONNX Runtime does not load."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=onnx.IR_VERSION)
    case = Case(
        name="label",
        model=proto.SerializeToString(),
        feeds={"x": onnx.numpy_helper.np.ones((2, 4), "f4")},
        expected=None,
    )
    from benchmarks.backend_models import attempt

    assert attempt(case, tmp_path).status == "nothing to quantize"
